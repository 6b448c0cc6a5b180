"""Finished and unfinished runs as one page: `metatt-scale report RUN [RUN ...]`."""

MARK = '<meta name="generator" content="metatt-scale report">'
"""By which a page is known as ours, and may be replaced."""

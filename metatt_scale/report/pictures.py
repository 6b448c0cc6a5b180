"""All figures of a report, as far as the runs have logged what they show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from matplotlib.figure import Figure

from metatt_scale.report import chain, curves
from metatt_scale.report.groups import Group
from metatt_scale.report.page import Picture
from metatt_scale.report.theme import Theme, render

_SCORES = (
    "Means over seeds; bands are standard errors. Arrows show where the ranks of the chain change, and to what. "
    "Training losses are as logged, of long runs averaged over neighbouring steps. Of more than 39 scores the first "
    "are drawn; the table has all."
)
_RANKS = "Inner bonds of the chain count from the left; where all have the same rank, one panel shows it."
_SPEED = "As logged, of long runs averaged over neighbouring steps."
_SPECTRA = (
    "Singular values of the chain at each bond with the orthogonality centre there, means over seeds, a line per "
    "index (of more than 128 indices, of as many of them). Dotted lines show where ranks change; values of exactly "
    "zero are left out."
)
_GRADIENTS = (
    "Norm of the gradient of each core, and of each slice of the middle ones, over the square root of its number of "
    "elements (paper, appendix B), means over seeds and over the steps logged in each column; the score above for "
    "comparison."
)


def pictures(groups: Sequence[Group]) -> list[Picture]:
    """Draw everything that the runs have numbers for; the files' names are known to `command.py`."""
    with_ranks = any(group.rank_curves() for group in groups)
    return [
        _overall("scores", "Loss and scores", _SCORES, groups, curves.scores),
        *([_overall("ranks", "Ranks", _RANKS, groups, curves.ranks)] if with_ranks else []),
        _overall("speed", "Throughput and memory", _SPEED, groups, curves.speed),
        *_by_group("spectra", "Singular values", _SPECTRA, [g for g in groups if g.spectra()], chain.spectra),
        *_by_group("gradients", "Gradients", _GRADIENTS, [g for g in groups if g.gradients()[1]], chain.gradients),
    ]


def _overall(
    file: str, heading: str, text: str, groups: Sequence[Group], draw: Callable[[Sequence[Group], Theme], Figure]
) -> Picture:
    pngs = render(lambda theme: draw(groups, theme))
    return Picture(file=file, above=f"<h2>{heading}</h2>\n<p>{text}</p>", alt=heading, pngs=pngs)


def _by_group(
    file: str, heading: str, text: str, groups: Sequence[Group], draw: Callable[[Group, Theme], Figure]
) -> Iterator[Picture]:
    for number, group in enumerate(groups, start=1):
        above = f"<h2>{heading}</h2>\n<p>{text}</p>\n" if number == 1 else ""
        yield Picture(
            file=f"{file}-{number}",
            above=f"{above}<h3>{escape(group.name)}</h3>",
            alt=f"{heading} of {group.name}",
            pngs=render(lambda theme, group=group: draw(group, theme)),
        )

"""What a recipe trains and what that takes: memory, bytes on the wire, time. Without weights and without a GPU."""

GPUS_PER_NODE = 8
"""Of the nodes that are usual, and taken where none are named."""

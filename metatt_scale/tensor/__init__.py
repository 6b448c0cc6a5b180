"""The chain as mathematics: cores, canonical forms, rounding. Imports torch only."""

from metatt_scale.tensor.canonical import canonicalise, move_centre, shift_left, shift_right, singular_values
from metatt_scale.tensor.cores import (
    Chain,
    check_chain,
    inner,
    largest_ranks,
    materialise,
    mode_sizes,
    norm,
    ranks,
    subtract,
)
from metatt_scale.tensor.rounding import Rounded, Truncation, kept_rank, round_chain

__all__ = [
    "Chain",
    "Rounded",
    "Truncation",
    "canonicalise",
    "check_chain",
    "inner",
    "kept_rank",
    "largest_ranks",
    "materialise",
    "mode_sizes",
    "move_centre",
    "norm",
    "ranks",
    "round_chain",
    "shift_left",
    "shift_right",
    "singular_values",
    "subtract",
]

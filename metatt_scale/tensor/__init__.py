"""The chain as mathematics: cores, canonical forms, sweeps, gauges. Imports torch only."""

from metatt_scale.tensor.canonical import canonicalise, shift_left, shift_right, singular_values
from metatt_scale.tensor.cores import (
    Chain,
    NotFiniteError,
    check_chain,
    check_finite,
    inner,
    materialise,
    mode_sizes,
    norm,
    ranks,
    subtract,
)
from metatt_scale.tensor.gauge import (
    GaugeChange,
    balance,
    enrich,
    feasible_ranks,
    gauge_change,
    transport_gradient,
    transport_variance,
)
from metatt_scale.tensor.sweep import Cut, Scores, Swept, cut_pair, sweep

__all__ = [
    "Chain",
    "Cut",
    "GaugeChange",
    "NotFiniteError",
    "Scores",
    "Swept",
    "balance",
    "canonicalise",
    "check_chain",
    "check_finite",
    "cut_pair",
    "enrich",
    "feasible_ranks",
    "gauge_change",
    "inner",
    "materialise",
    "mode_sizes",
    "norm",
    "ranks",
    "shift_left",
    "shift_right",
    "singular_values",
    "subtract",
    "sweep",
    "transport_gradient",
    "transport_variance",
]

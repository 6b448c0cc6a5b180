"""Means over seeds and differences between arms, with Student's t (scipy)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# scipy is slow to import, and every command imports this module.

DIGITS = 12
"""Means that differ by less are equal: sums of the same numbers in another order are rounded otherwise."""
_LEVEL = 0.95
_ROUNDING = 1e-12  # relative: gains that differ by less are equal, and their t would be rounding over rounding


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over n seeds."""

    n: int
    mean: float
    stderr: float
    """Standard error, from the standard deviation with n - 1; NaN for one seed."""
    half_width: float
    """Half-width of the 95 % interval, t(0.975, n - 1) x standard error; NaN for one seed."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What the first of two arms has over the second, seed by seed."""

    over_seeds: Mean
    """Mean of the differences over the common seeds, with its interval."""
    p: float
    """Two-sided p value of the paired t-test; NaN for fewer than two seeds, or where all differences are equal."""


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of at least one value; where one is NaN everything is."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2 or not math.isfinite(mean):
        return Mean(n=n, mean=mean, stderr=math.nan, half_width=math.nan)
    from scipy import stats

    stderr = statistics.stdev(values) / math.sqrt(n)
    half_width = float(stats.t.ppf((1 + _LEVEL) / 2, n - 1)) * stderr
    return Mean(n=n, mean=mean, stderr=stderr, half_width=half_width)


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return first - second for values of the same seeds in the same order."""
    from scipy import stats

    gains = [a - b for a, b in zip(first, second, strict=True)]
    varies = all(map(math.isfinite, gains)) and max(gains) - min(gains) > _ROUNDING * max(map(abs, (*first, *second)))
    p = float(stats.ttest_rel(first, second).pvalue) if varies else math.nan  # type: ignore[attr-defined]
    return Difference(over_seeds=mean_of(gains), p=p)

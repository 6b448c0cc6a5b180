"""When sweeps happen and to which ranks: pure functions of the recipe and the step, so a resumed run has the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from metatt_scale.recipe import Recipe, SweepRecipe
from metatt_scale.recipe.adapter import Rank


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The steps after which ranks change."""

    recipe: SweepRecipe | None
    targets: dict[int, Rank | None]
    """Steps done -> ranks after the sweep; None where the discarded weight decides."""

    def due(self, step: int) -> bool:
        """Whether a sweep follows when `step` steps are done."""
        return step in self.targets

    def warmup(self, step: int) -> float:
        """Return the factor on the learning rate of step `step` (from 0) that follows a sweep; 1 away from sweeps."""
        if self.recipe is None or not self.recipe.warmup_steps:
            return 1.0
        since = min((step - swept for swept in self.targets if swept <= step), default=self.recipe.warmup_steps)
        return min(1.0, (since + 1) / (self.recipe.warmup_steps + 1))


def plan_sweeps(recipe: Recipe, steps_per_epoch: int, total_steps: int) -> SweepPlan:
    """Place the recipe's sweeps on the steps of a run.

    Raises:
        ValueError: the run ends before its sweeps do, or they follow each other faster than the warm-up behind them.
    """
    sweep = recipe.sweep
    if sweep is None:
        return SweepPlan(recipe=None, targets={})
    unit = steps_per_epoch if sweep.unit == "epoch" else 1
    # An epoch that max_steps cuts short is none.
    sweep.check_reach(total_steps // unit, f"{total_steps} steps, {steps_per_epoch} per epoch")
    targets: dict[int, Rank | None]
    if sweep.formula is not None:
        assert isinstance(recipe.adapter.rank, int), "the recipe checks this"
        ranks = sweep.formula.ranks(recipe.adapter.rank)
        targets = {i * sweep.every * unit: rank for i, rank in enumerate(ranks, start=1)}
    elif sweep.schedule:
        targets = {point.after * unit: point.rank for point in sweep.schedule}
    else:
        end = total_steps if sweep.last is None else min(total_steps, sweep.last * unit)
        targets = dict.fromkeys(range(sweep.every * unit, end + 1, sweep.every * unit))
    _check_warmup(sweep.warmup_steps, targets, total_steps)
    return SweepPlan(recipe=sweep, targets=targets)


def _check_warmup(warmup_steps: int, targets: Iterable[int], total_steps: int) -> None:
    for step, after in itertools.pairwise(sorted({*targets, total_steps})):
        if after - step < warmup_steps:
            what = "the run ends" if after == total_steps else "the next sweep follows"
            raise ValueError(
                f"`sweep.warmup_steps` is {warmup_steps}, but {what} {after - step} steps after the sweep at step "
                f"{step}: the learning rate would not recover; give at most so many"
            )

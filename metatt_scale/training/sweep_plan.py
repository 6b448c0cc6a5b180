"""When sweeps happen and to which ranks: pure functions of the recipe and the step, so a resumed run has the same."""

from __future__ import annotations

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
        ValueError: a sweep of the schedule or the formula lies behind the end of the run.
    """
    sweep = recipe.sweep
    if sweep is None:
        return SweepPlan(recipe=None, targets={})
    unit = steps_per_epoch if sweep.unit == "epoch" else 1
    targets: dict[int, Rank | None] = {}
    if sweep.formula is not None:
        assert isinstance(recipe.adapter.rank, int), "the recipe checks this"
        first, last = recipe.adapter.rank, sweep.formula.final_rank
        for i in range(1, sweep.formula.sweeps + 1):
            left = 1 - (i / sweep.formula.sweeps) ** sweep.formula.gamma
            targets[i * sweep.every * unit] = round(last + (first - last) * left)
    elif sweep.schedule:
        targets = {point.after * unit: point.rank for point in sweep.schedule}
    else:
        end = total_steps if sweep.last is None else min(total_steps, sweep.last * unit)
        targets = dict.fromkeys(range(sweep.every * unit, end + 1, sweep.every * unit))
        if not targets:
            raise ValueError(
                f"the first sweep is due after step {sweep.every * unit}, but none is made after step {end} (the end "
                "of the run, or sweep.last); lower sweep.every, raise sweep.last, or train longer"
            )
    if max(targets, default=0) > total_steps:
        raise ValueError(
            f"the last sweep is due after step {max(targets)}, but the run ends after {total_steps} "
            f"({steps_per_epoch} per epoch); sweep earlier (sweep.schedule, sweep.every), or train longer"
        )
    return SweepPlan(recipe=sweep, targets=targets)

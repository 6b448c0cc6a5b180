"""What an evaluation says of a run: is it the best so far, is it time to stop, what was forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from metatt_scale.recipe import Recipe, task_headline
from metatt_scale.recipe.scores import is_loss
from metatt_scale.training.checkpoint import RunState


def judge(progress: RunState, recipe: Recipe, scores: Mapping[str, float]) -> tuple[bool, str | None]:
    """Take note of an evaluation; return whether it is the best so far and, if the run ends with it, why."""
    by_metric, patience = recipe.training.best_by == "metric", recipe.training.early_stopping_patience
    if progress.improved(scores["eval_loss"], scores[recipe.headline] if by_metric else None):
        return True, None
    if patience is None or progress.evaluations_without_gain < patience:
        return False, None
    progress.finished = True
    wanted = f"higher {recipe.headline}" if by_metric else "lower loss"
    if progress.best_step is None:
        wanted = f"finite {recipe.headline if by_metric else 'loss'}"
    return False, f"stopped early after step {progress.step}: no {wanted} in {patience} evaluations"


def forgetting(
    recipe: Recipe, tasks: Sequence[str], before: Mapping[str, float], now: Mapping[str, float]
) -> dict[str, float]:
    """Return by how much the headline of every known task has become worse; negative where it has become better.

    Args:
        recipe: of a run that goes on from another one.
        tasks: those of the other run; none where it had but one.
        before: scores before the first step; empty where the run starts afresh.
        now: the evaluation's.
    """
    result: dict[str, float] = {}
    if recipe.tasks and not tasks:  # a language model that knew no tasks: what it could is not measured here
        return result
    for task in tasks or ("",):
        key = task_headline(recipe.label_sets, task)
        if key in before and math.isfinite(now.get(key, math.nan)):
            worse = before[key] - now[key]
            result[task or "all"] = -worse if is_loss(key) else worse
    return result

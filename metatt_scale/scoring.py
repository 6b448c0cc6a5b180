"""Scores of a run: the adapter's, and the frozen backbone's beside them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from metatt_scale.backbone import pick_device
from metatt_scale.evaluation import TaskScore, evaluate
from metatt_scale.parallel import World, join, make_engine, place_in_world, read_launch
from metatt_scale.recipe import EvaluationRecipe, ParallelRecipe
from metatt_scale.reopen import Reopened, adapter_folder, fingerprint, read_recipe, reopen

ZERO_SHOT, FINE_TUNED = "zero_shot", "fine_tuned"


def score_run(
    path: str | Path,
    settings: EvaluationRecipe,
    console: Console,
    *,
    backbone: Mapping[str, Any] | None = None,
    zero_shot: bool = False,
) -> dict[str, dict[str, TaskScore]]:
    """Score a run directory or adapter folder; results.json in the run directory keeps every finished task.

    Every rank of a job calls this. They share the questions; the launcher says who holds the backbone.
    """
    recipe = read_recipe(adapter_folder(path), backbone)[1]
    launch = read_launch(ParallelRecipe())
    if launch.strategy == "replicate" and place_in_world()[1] > 1:  # the launcher leaves it to the recipe
        launch = read_launch(recipe.parallel)
    timeout = timedelta(minutes=recipe.parallel.timeout_minutes)
    with join(pick_device(), timeout, group=launch.strategy != "replicate") as world:
        opened = reopen(path, console, backbone, make_engine(world, launch, recipe))
        return score_opened(opened, settings, zero_shot=zero_shot, world=world)


def score_opened(
    opened: Reopened, settings: EvaluationRecipe, *, zero_shot: bool = False, world: World | None = None
) -> dict[str, dict[str, TaskScore]]:
    """Score a model in memory: with the adapter switched off first if asked for, then with it."""
    results = opened.run / "results.json"
    score = functools.partial(evaluate, opened.model, opened.tokenizer, settings, results, world=world)
    scores: dict[str, dict[str, TaskScore]] = {}
    if zero_shot:
        with opened.adapter.disabled():
            key = fingerprint(opened.recipe, None)
            scores[ZERO_SHOT] = score(ZERO_SHOT, key)
    key = fingerprint(opened.recipe, opened.description["weights_sha256"])
    scores[FINE_TUNED] = score(FINE_TUNED, key)
    return scores

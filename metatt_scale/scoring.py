"""Scores of a run: the adapter's, and the frozen backbone's beside them."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from metatt_scale.evaluation import TaskScore, evaluate
from metatt_scale.hardware import pick_device
from metatt_scale.parallel import (
    ContradictionError,
    Launch,
    Place,
    World,
    check_engine,
    join,
    make_engine,
    place_in_world,
    read_launch,
    with_fitting_shards,
)
from metatt_scale.recipe import EvaluationRecipe, ParallelRecipe, Recipe
from metatt_scale.reopen import Reopened, adapter_folder, fingerprint, read_recipe, reopen, task_index

ZERO_SHOT, FINE_TUNED = "zero_shot", "fine_tuned"


def score_run(
    path: str | Path,
    settings: EvaluationRecipe,
    console: Console,
    *,
    backbone: Mapping[str, Any] | None,
    zero_shot: bool,
    task: str | None,
    device: str = "auto",
) -> dict[str, dict[str, TaskScore]]:
    """Score a run directory or adapter folder; results.json in the run directory keeps every finished task.

    `task` names one of the run's, where each has weights of its own. Every rank of a job calls this. They share the
    questions; who holds the backbone is as in the run, unless the launcher says otherwise. `device` is auto, cpu or
    cuda: the run's own word for it counts for the run's machine.
    """
    place, recipe = place_in_world(), read_recipe(adapter_folder(path), backbone)[1]
    chosen = pick_device(device, console, recipe.backbone.dtype)
    launch, recipe = _here(recipe, place, chosen)
    timeout = timedelta(minutes=recipe.parallel.timeout_minutes)
    sharded, offload = launch.strategy != "replicate", recipe.parallel.cpu_offload
    with join(chosen, timeout, group=sharded, cpu_tensors=offload) as world:
        index = task_index(recipe, task)
        opened = reopen(path, console, chosen, backbone, make_engine(world, launch, recipe))
        opened.adapter.task = index
        return score_opened(opened, settings, world, zero_shot=zero_shot)


def _here(recipe: Recipe, place: Place, device: torch.device) -> tuple[Launch, Recipe]:
    """Return who holds the backbone in this job, and a run's recipe with `parallel` as it can be here.

    Scoring may have other ranks, devices and another launcher than the run had, and its recipe cannot be changed: a
    launcher that contradicts it wins, shards that the ranks cannot share evenly go over all of them, and what would
    be offloaded from a GPU stays where it is on a CPU. One process that no launcher started holds everything.
    """
    parallel = recipe.parallel
    if "WORLD_SIZE" not in os.environ:
        parallel = _launchers_own(parallel)
    try:
        launch = read_launch(parallel)
    except ContradictionError:
        parallel = _launchers_own(parallel)
        launch = read_launch(parallel)
    parallel = with_fitting_shards(parallel, place.size, place.local_size)
    if device.type == "cpu":
        parallel = parallel.model_copy(update={"cpu_offload": False})
    recipe = recipe.model_copy(update={"parallel": parallel})
    check_engine(launch, recipe, size=place.size, local_size=place.local_size, device=device)
    return launch, recipe


def _launchers_own(parallel: ParallelRecipe) -> ParallelRecipe:
    return ParallelRecipe(timeout_minutes=parallel.timeout_minutes)


def score_opened(
    opened: Reopened, settings: EvaluationRecipe, world: World, *, zero_shot: bool = False
) -> dict[str, dict[str, TaskScore]]:
    """Score a model in memory: with the adapter switched off first if asked for, then with it."""
    opened.adapter.one_task()  # or says that one has to be chosen
    results = opened.run / "results.json"
    score = functools.partial(evaluate, opened.model, opened.tokenizer, settings, results, world=world)
    scores: dict[str, dict[str, TaskScore]] = {}
    if zero_shot:
        with opened.adapter.disabled():
            key = fingerprint(opened.recipe, opened.weights, None)
            scores[ZERO_SHOT] = score(ZERO_SHOT, key)
    task = opened.adapter.task
    label = FINE_TUNED if task is None else f"{FINE_TUNED} {list(opened.recipe.tasks)[task]}"
    adapter = opened.description["weights_sha256"]
    scores[label] = score(label, fingerprint(opened.recipe, opened.weights, adapter, task))
    return scores

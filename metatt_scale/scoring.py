"""Scores of a run: the adapter's, and the frozen backbone's beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from metatt_scale.evaluation import TaskScore, evaluate
from metatt_scale.recipe import EvaluationRecipe
from metatt_scale.reopen import Reopened, fingerprint, reopen

ZERO_SHOT, FINE_TUNED = "zero_shot", "fine_tuned"


def score_run(
    path: str | Path,
    settings: EvaluationRecipe,
    console: Console,
    *,
    backbone: Mapping[str, Any] | None = None,
    zero_shot: bool = False,
) -> dict[str, dict[str, TaskScore]]:
    """Score a run directory or adapter folder; results.json in the run directory keeps every finished task."""
    return score_opened(reopen(path, console, backbone), settings, zero_shot=zero_shot)


def score_opened(
    opened: Reopened, settings: EvaluationRecipe, *, zero_shot: bool = False
) -> dict[str, dict[str, TaskScore]]:
    """Score a model in memory: with the adapter switched off first if asked for, then with it."""
    results = opened.run / "results.json"
    scores: dict[str, dict[str, TaskScore]] = {}
    if zero_shot:
        with opened.adapter.disabled():
            key = fingerprint(opened.recipe, None)
            scores[ZERO_SHOT] = evaluate(opened.model, opened.tokenizer, settings, results, ZERO_SHOT, key)
    key = fingerprint(opened.recipe, opened.description["weights_sha256"])
    scores[FINE_TUNED] = evaluate(opened.model, opened.tokenizer, settings, results, FINE_TUNED, key)
    return scores

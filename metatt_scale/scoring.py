"""Scores of a run: the adapter's, and the frozen backbone's beside them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from metatt_scale.evaluation import TaskScore, evaluate
from metatt_scale.recipe import EvaluationRecipe
from metatt_scale.reopen import Reopened, reopen

ZERO_SHOT, FINE_TUNED = "zero_shot", "fine_tuned"


def score_run(
    path: str | Path,
    settings: EvaluationRecipe,
    console: Console,
    *,
    backbone: str | None = None,
    zero_shot: bool = False,
) -> dict[str, dict[str, TaskScore]]:
    """Score a run directory or adapter folder; results.json in the run directory keeps every finished task."""
    return score_opened(reopen(path, console, backbone=backbone), settings, zero_shot=zero_shot)


def score_opened(
    opened: Reopened, settings: EvaluationRecipe, *, zero_shot: bool = False
) -> dict[str, dict[str, TaskScore]]:
    """Score a model in memory: with the adapter switched off first if asked for, then with it."""
    results = opened.run / "results.json"
    scores: dict[str, dict[str, TaskScore]] = {}
    if zero_shot:
        with opened.adapter.disabled():
            fingerprint = opened.fingerprint(with_adapter=False)
            scores[ZERO_SHOT] = evaluate(opened.model, opened.tokenizer, settings, results, ZERO_SHOT, fingerprint)
    fingerprint = opened.fingerprint()
    scores[FINE_TUNED] = evaluate(opened.model, opened.tokenizer, settings, results, FINE_TUNED, fingerprint)
    return scores

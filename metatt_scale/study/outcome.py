"""From the files of a finished run to its line of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metatt_scale.recipe import validate
from metatt_scale.report.runs import of_last_ranks, ranks_of
from metatt_scale.study.runs import OpenStudy, Run, digest_of
from metatt_scale.study.schema import HEADLINE, Score


def is_trained(run: Run) -> bool:
    """Return whether a run has its adapter, made by this very definition and seed."""
    try:
        recipe = validate(_description(run)["recipe"], str(run.folder))
    except (OSError, ValueError, KeyError):
        return False  # training itself refuses what it cannot go on with
    return digest_of(recipe) == run.digest and recipe.seed == run.seed


def collect(opened: OpenStudy, run: Run, seconds: float, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a run that has ended well.

    Raises:
        OSError: a file of the run is missing.
        ValueError: the files do not hold what the study reports, or were made by another definition.
    """
    description = _description(run)
    if not is_trained(run):
        raise ValueError(f"{run.folder} was trained with other settings: the recipe changed while the study ran")
    metrics, score = run.folder / "metrics.jsonl", opened.study.score
    evaluations = _evaluations(metrics, score)
    scores = {**_numbers(evaluations, score), **_task_scores(run.folder / "results.json", opened.tasks(run))}
    names, headline = opened.numbers(run), opened.headline(run.arm)
    if HEADLINE in names and headline in scores:
        scores[HEADLINE] = scores[headline]
    if missing := [_shown(name, headline) for name in names if name not in scores]:
        raise ValueError(
            f"{metrics} has no {', '.join(missing)}; it has {', '.join(scores) or 'no evaluations'}. Name one of "
            "these in the study file, or give the recipe validation records"
        )
    return {
        "arm": run.arm,
        "seed": run.seed,
        "tried": run.tried,
        "digest": run.digest,
        "overrides": list(run.overrides),
        "scores": scores,
        "seconds": round(seconds, 1),
        "trainable_parameters": description["trainable_parameters"],
        "ranks": (ranks_of(evaluations[-1]) if evaluations else None) or description.get("ranks", []),  # of a chain
        **machine,
    }


def _shown(name: str, headline: str) -> str:
    return f"{name} ({headline})" if name == HEADLINE else name


def _description(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "adapter" / "metatt.json").read_text(encoding="utf-8"))


def _evaluations(metrics: Path, score: Score) -> list[dict[str, Any]]:
    """Return the lines that hold a number of an evaluation, or one that the study reports."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if any(_is_number(key, score) for key in line)]


def _numbers(evaluations: list[dict[str, Any]], score: Score) -> dict[str, Any]:
    """Return every number of the evaluations: the last, the best of those with its ranks, and one by one."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(key for line in evaluations for key in line if _is_number(key, score)):
        values = [line[name] for line in evaluations if name in line]
        finite = [value for line in of_last_ranks(evaluations) if (value := line.get(name)) is not None]
        best = (max if score.prefers_more(name) else min)(finite) if finite else None
        found[name] = {"last": values[-1], "best": best, "per_epoch": values}
    return found


def _is_number(key: str, score: Score) -> bool:
    return key.startswith("eval_") or key in score.metrics


def _task_scores(results: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the scores that `evaluate` has left, each by the metric that its task is usually reported by."""
    if not tasks:
        return {}
    scores = json.loads(results.read_text(encoding="utf-8"))["scores"]["fine_tuned"]
    return {task: {"last": scores[task][scores[task]["metric"]], "best": None, "per_epoch": []} for task in tasks}

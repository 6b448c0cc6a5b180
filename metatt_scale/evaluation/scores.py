"""What a task scored, question by question, and the results file that keeps it."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import metatt_scale
from metatt_scale.files import write_json
from metatt_scale.json_files import read_json
from metatt_scale.run_files import ResultsForm
from metatt_scale.versions import git_commit, package_version

_MAX_BYTES = 256 << 20  # a character a question, for every task, metric and label
Key = dict[str, str | int | None]
"""Everything that decides a score; a score is reused only where the whole key is the same."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The outcome of one task; means and standard errors follow from the answers."""

    metric: str
    """The metric that this task is usually reported by: "acc" or "acc_norm"."""
    samples: dict[str, str]
    """Per metric one character a question, in the order of the data: "1" if it holds, else "0"."""
    key: Key
    """What the score depends on."""
    seconds: float
    """Wall time of the scoring."""

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.samples[self.metric])

    def mean(self, metric: str) -> float:
        """Return the share of questions, in [0, 1], for which `metric` holds."""
        return self.samples[metric].count("1") / self.n

    def stderr(self, metric: str) -> float:
        """Return the standard error of `mean` as the harness defines it; NaN for a single question."""
        mean = self.mean(metric)
        return math.sqrt(mean * (1 - mean) / (self.n - 1)) if self.n > 1 else math.nan


def paired_difference(a: TaskScore, b: TaskScore, metric: str) -> tuple[float, float]:
    """Return the mean over the questions of (b - a), what `b` gained on `a`, and its standard error.

    Both answered the same questions, so the error is that of the per-question differences: smaller than that of
    two independent samples wherever the two mostly agree. NaN for a single question.

    Raises:
        ValueError: the two did not answer the same questions.
    """
    if a.n != b.n:
        raise ValueError(
            f"paired difference of {a.n} and {b.n} questions; both must answer the same questions: score both with "
            "the same `evaluation.limit` and data"
        )
    if a.key.get("data") != b.key.get("data"):
        raise ValueError(
            f"paired difference over two data files (SHA-256 {a.key.get('data')} and {b.key.get('data')}); "
            "score both models on the same file"
        )
    pairs = zip(a.samples[metric], b.samples[metric], strict=True)
    gains = [int(after) - int(before) for before, after in pairs]
    mean = sum(gains) / a.n
    if a.n == 1:
        return mean, math.nan
    variance = sum((gain - mean) ** 2 for gain in gains) / (a.n - 1)
    return mean, math.sqrt(variance / a.n)


def read_scores(results: Path) -> dict[str, dict[str, TaskScore]]:
    """Return {label: {task: score}} of a results file; empty when there is no such file.

    Raises:
        ValueError: the file is not one that `evaluate` wrote.
    """
    scores = _read(results).get("scores", {})
    return {label: {task: score_from_json(entry) for task, entry in tasks.items()} for label, tasks in scores.items()}


def finished(results: Path, label: str, keys: Mapping[str, Key]) -> dict[str, TaskScore]:
    """Return those tasks of `keys` that `results` holds under `label` with exactly the given key."""
    known = read_scores(results).get(label, {})
    return {task: known[task] for task, key in keys.items() if task in known and known[task].key == key}


def record(results: Path, label: str, task: str, score: TaskScore) -> None:
    """Add one score to the results file, which is replaced as a whole; what else it holds is kept."""
    content = _read(results)
    content["versions"] = versions()
    content["git_commit"] = git_commit()
    content.setdefault("scores", {}).setdefault(label, {})[task] = score_to_json(score)
    write_json(results, content)


def versions() -> dict[str, str | None]:
    """Return the versions that scores may depend on; None for what is not installed."""
    found: dict[str, str | None] = {"metatt_scale": metatt_scale.__version__}
    for package in ("torch", "transformers", "lm_eval", "bitsandbytes"):
        found[package] = package_version(package)
    return {**found, "python": platform.python_version()}


def _read(results: Path) -> dict[str, Any]:
    try:
        return read_json(results, ResultsForm, "move it away to start afresh", _MAX_BYTES)
    except FileNotFoundError:
        return {}


def score_to_json(score: TaskScore) -> dict[str, Any]:
    """Return what the results file says of a score: its answers, and for readers their means and errors."""
    entry: dict[str, Any] = {"n": score.n}
    for metric in score.samples:
        stderr = score.stderr(metric)
        entry[metric] = score.mean(metric)
        entry[f"{metric}_stderr"] = None if math.isnan(stderr) else stderr
    return {
        **entry,
        "metric": score.metric,
        "samples": score.samples,
        "key": score.key,
        "seconds": score.seconds,
    }


def score_from_json(entry: dict[str, Any]) -> TaskScore:
    """Undo `score_to_json`."""
    return TaskScore(metric=entry["metric"], samples=entry["samples"], key=entry["key"], seconds=entry["seconds"])

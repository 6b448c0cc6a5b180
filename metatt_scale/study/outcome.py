"""From the files of a finished run to its line of results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from metatt_scale.json_files import Count, Form, Number, parse_object, problem_of
from metatt_scale.recipe import validate
from metatt_scale.report.runs import of_last_ranks, ranks_of
from metatt_scale.run_files import ChainForm, ResultsForm, Sizes
from metatt_scale.study.contents import changed_files
from metatt_scale.study.runs import OpenStudy, Run, digest_of
from metatt_scale.study.schema import HEADLINE, Score

_ADAPTER, _METRICS, _SCORES = "adapter/metatt.json", "metrics.jsonl", "results.json"


class _AdapterForm(ChainForm):
    recipe: dict[str, Any]
    trainable_parameters: Count


class _EvaluationForm(Form):
    ranks: Sizes | None = None
    settled: bool = True
    __pydantic_extra__: dict[str, Number | None] = Field(init=False)  # type: ignore[assignment]


def is_trained(run: Run) -> bool:
    """Return whether a run has its adapter, made by this very definition and seed, from the records of now."""
    try:
        description = _description(run)
        recipe = validate(description["recipe"], str(run.folder))
    except (OSError, ValueError):
        return False  # training itself refuses what it cannot go on with
    same = digest_of(recipe) == run.digest and recipe.seed == run.seed
    return same and not changed_files(description.get("contents", {}), run.data)


def collect(opened: OpenStudy, run: Run, seconds: float, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a run that has ended well.

    Raises:
        OSError: a file of the run cannot be read.
        ValueError: one is missing or damaged, or they do not hold what the study reports, or were made by another
            definition.
    """
    description = _description(run)
    if not is_trained(run):
        raise ValueError(
            f"{run.folder} was trained with other settings or records: the recipe or a data file changed while the "
            "study ran; remove the folder, and start the study again"
        )
    score = opened.study.score
    evaluations = _evaluations(run, score)
    scores = {**_numbers(evaluations, score), **_task_scores(run, opened.tasks(run))}
    names, headline = opened.numbers(run), opened.headline(run.arm)
    if HEADLINE in names and headline in scores:
        scores[HEADLINE] = scores[headline]
    if missing := [_shown(name, headline) for name in names if name not in scores]:
        raise ValueError(
            f"{run.folder / _METRICS} has no {', '.join(missing)}; it has {', '.join(scores) or 'no evaluations'}. "
            "Name one of these in the study file, or give the recipe validation records"
        )
    ranks = (ranks_of(evaluations[-1]) if evaluations else None) or description.get("ranks") or []  # of a chain
    return _line(run, scores, seconds, description, ranks, machine)


def diverged(opened: OpenStudy, run: Run, seconds: float, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a run that came to no usable end: its numbers are not finite, which is worse than any."""
    nothing = {"last": None, "best": None, "per_epoch": []}
    return _line(run, dict.fromkeys(opened.numbers(run), nothing), seconds, {}, [], machine)


def _line(
    run: Run,
    scores: dict[str, Any],
    seconds: float,
    description: Mapping[str, Any],
    ranks: list[int],
    machine: dict[str, Any],
) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "seed": run.seed,
        "tried": run.tried,
        "digest": run.digest,
        "overrides": list(run.overrides),
        "data": dict(run.data),
        "scores": scores,
        "seconds": round(seconds, 1),
        "trainable_parameters": description.get("trainable_parameters", 0),
        "head_parameters": description.get("head_parameters", 0),
        "ranks": ranks,
        **machine,
    }


def _shown(name: str, headline: str) -> str:
    return f"{name} ({headline})" if name == HEADLINE else name


@contextmanager
def _telling(run: Run, file: str, line: int | None = None) -> Iterator[None]:
    """Say of a file of a run that is missing or damaged which it is, and how the run is done again."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        where = f"{run.folder / file}{'' if line is None else f', line {line}'}"
        problem = "it is missing" if isinstance(error, FileNotFoundError) else problem_of(error)
        raise ValueError(f"{where}: {problem}; remove {run.folder}, and the run is done again") from None


def _description(run: Run) -> dict[str, Any]:
    with _telling(run, _ADAPTER):
        return parse_object((run.folder / _ADAPTER).read_bytes(), _AdapterForm)


def _evaluations(run: Run, score: Score) -> list[dict[str, Any]]:
    """Return the lines that hold a number of an evaluation, or one that the study reports: these, and the ranks."""
    with _telling(run, _METRICS):
        lines = (run.folder / _METRICS).read_bytes().split(b"\n")
    evaluations: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        with _telling(run, _METRICS, number):
            told = parse_object(line, Form)
            found = {key: value for key, value in told.items() if _is_number(key, score)}
            if found:
                about = {key: told[key] for key in ("ranks", "settled") if key in told}
                evaluations.append(_EvaluationForm(**about, **found).model_dump())
    return evaluations


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


def _task_scores(run: Run, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the scores that `evaluate` has left, each by the metric that its task is usually reported by."""
    if not tasks:
        return {}
    with _telling(run, _SCORES):
        results = parse_object((run.folder / _SCORES).read_bytes(), ResultsForm, 256 << 20)
        scores = results.get("scores", {}).get("fine_tuned", {})
        if missing := [task for task in tasks if task not in scores]:
            raise ValueError(f"it has no score of {', '.join(missing)}")
    return {task: {"last": _mean(scores[task]), "best": None, "per_epoch": []} for task in tasks}


def _mean(score: Mapping[str, Any]) -> float:
    answers = score["samples"][score["metric"]]
    return answers.count("1") / len(answers)

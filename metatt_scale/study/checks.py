"""What is refused in a study before its first run: hours later nobody would want to hear of it."""

from __future__ import annotations

from pathlib import Path

from metatt_scale.paths import user_path
from metatt_scale.recipe import STEP_NUMBERS, DataSource, Recipe, RecipeError
from metatt_scale.study.runs import OWN_KEYS, OpenStudy, Run, resolve
from metatt_scale.study.schema import HEADLINE


def check_study(opened: OpenStudy, path: Path) -> None:
    """Check every run that a study defines.

    Raises:
        RecipeError: with the rule and the remedy.
    """
    _check_own_keys(opened, path)
    _check_pairs(opened, path)
    _check_definitions(opened, path)
    _check_directions(opened, path)


def _check_own_keys(opened: OpenStudy, path: Path) -> None:
    """Refuse overrides of what the study itself sets."""
    choose = opened.study.choose
    for arm, overrides in opened.arms.items():
        for override in (*overrides, *opened.trial_overrides(arm)):
            key = override.partition("=")[0].strip()
            if key in OWN_KEYS:
                remedy = "list seeds under `seeds`" if key == "seed" else "set `runs_dir`"
                raise RecipeError(f"{path}: override {override!r}: the study sets `{key}` of every run; {remedy}")
            if choose and key == choose.key:
                raise RecipeError(
                    f"{path}: override {override!r} of arm {arm} sets what `choose` decides; remove one of them"
                )


def _check_pairs(opened: OpenStudy, path: Path) -> None:
    for pair in opened.study.compare:
        for arm in pair:
            if arm not in opened.rows:
                raise RecipeError(f"{path}: `compare` names {arm}; the arms are {', '.join(opened.rows)}")
        if pair[0] == pair[1]:
            raise RecipeError(f"{path}: `compare` pairs {pair[0]} with itself; name two arms")


def _check_definitions(opened: OpenStudy, path: Path) -> None:
    """Resolve every recipe once; refuse arms or values that are one, and trials on records that are reported."""
    seen: dict[str, tuple[str, int]] = {}
    for arm in opened.arms:
        for place, tried in enumerate(opened.candidates or (None,)):
            try:
                reported = opened.reported(arm, tried, opened.study.seeds[0])
                trial = None if tried is None else opened.trial(arm, tried, opened.study.seeds[0])
            except RecipeError as error:
                raise RecipeError(f"{path}, arm {arm}: {error}") from None
            _check_numbers(opened, reported, path)
            if trial is not None:
                _check_numbers(opened, trial, path)
            other, before = seen.setdefault(reported.digest, (arm, place))
            if other != arm:
                raise RecipeError(f"{path}: arms {other} and {arm} define the same runs; remove one of them")
            if before != place:
                raise RecipeError(
                    f"{path}: `choose.values` gives {opened.candidates[before]} and {tried}, which define the same "
                    "runs; remove one of them"
                )
            if trial is not None:
                _check_apart(opened, resolve(trial.recipe, trial.overrides), reported, path)


def _check_numbers(opened: OpenStudy, run: Run, path: Path) -> None:
    """Refuse a run that will not have the numbers it is judged by."""
    recipe, tasks = resolve(run.recipe, run.overrides), opened.tasks(run)
    where = f"{path}, arm {run.arm}: `{'choose.by' if run.tried else 'score'}`"
    if tasks and recipe.classifier is not None:
        raise RecipeError(
            f"{where} names the task {tasks[0]}, a question to a language model, but the recipe has a `classifier`; "
            f"name {HEADLINE} under `score.metrics`"
        )
    evaluated = bool(recipe.data.validation or recipe.data.validation_size) and recipe.training.eval_every != "never"
    known = (HEADLINE, *recipe.evaluation_keys) if evaluated else ()
    for name in opened.numbers(run):
        if name not in (*known, *STEP_NUMBERS, *tasks):
            has = f"evaluations give {', '.join(known)}"
            if not evaluated:
                has = "there are no evaluations; give validation records, and leave out training.eval_every: never"
            raise RecipeError(f"{where} names {name}, which this run does not report; {has}")


def _check_directions(opened: OpenStudy, path: Path) -> None:
    """Refuse a direction of what is neither reported nor chosen by: a mistyped name would turn a table around."""
    choose, names = opened.study.choose, opened.study.score.names
    used = {*names, *([choose.by] if choose else [])}
    if HEADLINE in used:
        used = {*(used - {HEADLINE}), *(opened.headline(arm) for arm in opened.arms)}
    for name in opened.study.score.higher_is_better:
        if name not in used:
            raise RecipeError(
                f"{path}: `score.higher_is_better` names {name}, which is neither reported nor chosen by; these are "
                f"{', '.join(sorted(used))}"
            )


def _check_apart(opened: OpenStudy, trial: Recipe, reported: Run, path: Path) -> None:
    """Refuse a choice that would be made on records whose scores are reported."""
    if not opened.study.score.metrics:
        return
    scored = resolve(reported.recipe, reported.overrides).data
    judged_on = trial.data.train if trial.data.validation_size else trial.data.validation
    if scored.validation_size or any(_meet(one, other) for one in scored.validation for other in judged_on):
        what = "records split off data.train" if scored.validation_size else "the records of data.validation"
        remedy = (
            "name files of their own under data.validation"
            if scored.validation_size
            else "set, for example, data.validation=[] and data.validation_size=400 in `choose.overrides`"
        )
        raise RecipeError(
            f"{path}: arm {reported.arm} would choose {opened.study.choose and opened.study.choose.key} on {what}, "
            f"which are also reported; {remedy}"
        )


def _meet(one: DataSource, other: DataSource) -> bool:
    """Return whether two sources may share records, however they are spelt: a file has no splits, a hub id has."""
    places = [user_path(source.path, "data source").resolve() for source in (one, other)]
    if any(path.suffix in (".json", ".jsonl", ".gz") or path.exists() for path in places):
        first, second = places
        return first == second or first in second.parents or second in first.parents
    return places[0] == places[1] and one.subset == other.subset and bool(_splits(one) & _splits(other))


def _splits(source: DataSource) -> set[str]:
    """Return the names of the splits that are read, be it in part (`train[:50%]+test`)."""
    return {part.partition("[")[0].strip() for part in source.split.split("+")}

"""A study's runs: what each arm trains, with which seed and where, and by what it is recognised later."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from metatt_scale.recipe import DataRecipe, Recipe, RecipeError, check, load_recipe, read_mapping
from metatt_scale.study.schema import HEADLINE, Study

_OWN = ("seed", "output_dir")
# Keys that change neither a bit of a run nor how it is scored.
_FREE = {
    "output_dir": True,
    "seed": True,  # recorded beside the digest
    "logging": True,
    "parallel": True,
    "data": {"cache_dir"},
    "training": {"save_every", "keep_checkpoints", "resume", "max_nonfinite_steps"},
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a study."""

    arm: str
    """Of several recipes ARM@COLUMN."""
    recipe: Path
    seed: int
    tried: str | None
    """The override that this run tries for its arm; None for a run that is reported."""
    overrides: tuple[str, ...]
    digest: str
    """Of everything in the resolved recipe that decides the result, but for the seed."""
    folder: Path

    @property
    def key(self) -> tuple[str, int, str | None]:
        """What names the run within its study."""
        return self.arm, self.seed, self.tried

    @property
    def label(self) -> str:
        """The run in words."""
        return f"{self.arm}{f' with {self.tried}' if self.tried else ''}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class OpenStudy:
    """A study file that was read and checked, and where its runs and results are."""

    study: Study
    recipes: Mapping[str, Path]
    """By column; the only one has no name."""
    results: Path
    """NAME.jsonl; the tables stand beside it."""
    runs: Path
    rows: tuple[str, ...]
    """The arms of the study file and its grid."""
    arms: Mapping[str, tuple[str, ...]]
    """Overrides of every row (in every column: ARM@COLUMN), those of `base` and `grid` among them."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """The overrides among which each arm chooses; none where nothing is chosen."""
        choose = self.study.choose
        return tuple(_override(choose.key, value) for value in choose.values) if choose else ()

    def headline(self, arm: str) -> str:
        """Return the number that stands for all of an arm's."""
        return headline_of(resolve(self._recipe_of(arm), self.arms[arm]))

    def prefers_more(self, arm: str, name: str) -> bool:
        """Return whether more of a number is better for an arm."""
        higher = self.study.score.higher_is_better
        return self.study.score.prefers_more(self.headline(arm) if name == HEADLINE and name not in higher else name)

    def numbers(self, run: Run) -> tuple[str, ...]:
        """Return the numbers that a run must have to count as finished."""
        choose = self.study.choose
        return (choose.by,) if run.tried and choose else self.study.score.names

    def tasks(self, run: Run) -> tuple[str, ...]:
        """Return the tasks that a run is scored on; a trial never sees what is reported."""
        return () if run.tried else self.study.score.tasks

    def trial(self, arm: str, tried: str, seed: int) -> Run:
        """Return the run that tries an override for an arm."""
        assert self.study.choose is not None
        overrides = (*self.arms[arm], *self.study.choose.overrides, tried)
        return self._run(arm, seed, overrides, self.runs / arm / "choose" / _file_name(tried), tried)

    def reported(self, arm: str, chosen: str | None, seed: int) -> Run:
        """Return a run that is reported, with the override that its arm has chosen."""
        return self._run(arm, seed, (*self.arms[arm], *([chosen] if chosen else [])), self.runs / arm)

    def _recipe_of(self, arm: str) -> Path:
        return self.recipes[arm.rpartition("@")[2] if self.study.recipes else ""]

    def _run(self, arm: str, seed: int, overrides: tuple[str, ...], folder: Path, tried: str | None = None) -> Run:
        recipe = self._recipe_of(arm)
        return Run(
            arm=arm,
            recipe=recipe,
            seed=seed,
            tried=tried,
            overrides=overrides,
            digest=digest_of(resolve(recipe, overrides)),
            folder=folder / f"seed-{seed}",
        )


def open_study(path: str | Path) -> OpenStudy:
    """Read a study file and check every run it defines against the recipe, before the first of them starts.

    Raises:
        RecipeError: unknown key, wrong type or contradiction in the study file, the recipe or the overrides.
    """
    path = Path(path)
    study = check(read_mapping(path, "study", "recipe"), str(path), Study)
    name = study.name or path.stem
    rows = _rows(study, path)
    columns = {column: path.parent / recipe for column, recipe in study.recipes.items()}
    opened = OpenStudy(
        study=study,
        recipes=columns or {"": path.parent / study.recipe},
        results=path.parent / "results" / f"{name}.jsonl",
        runs=Path(study.runs_dir or f"runs/studies/{name}").expanduser(),
        rows=tuple(rows),
        arms=_arms(study, rows),
    )
    _check_own_keys(opened, path)
    _check_pairs(opened, path)
    _check_definitions(opened, path)
    return opened


@functools.cache
def resolve(recipe: Path, overrides: tuple[str, ...]) -> Recipe:
    """Return the recipe of a run; seed and output_dir are still those of the file."""
    return load_recipe(recipe, overrides)


def digest_of(recipe: Recipe) -> str:
    """Return by what a definition is recognised: it stays as new keys with defaults come to the schema."""
    decides = recipe.model_dump(mode="json", exclude=_FREE, exclude_defaults=True)
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def headline_of(recipe: Recipe) -> str:
    """Return the key of metrics.jsonl that a recipe is judged by."""
    if len(recipe.label_sets) > 1:
        return "eval_mean"
    return next((f"eval_{labels.headline}" for labels in recipe.label_sets.values()), "eval_loss")


def _arms(study: Study, rows: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return all overrides of every row, in every column."""
    if not study.recipes:
        return {row: (*study.base, *own) for row, own in rows.items()}
    return {
        f"{row}@{column}": (*study.base, *study.columns.get(column, ()), *own)
        for row, own in rows.items()
        for column in study.recipes
    }


def _rows(study: Study, path: Path) -> dict[str, tuple[str, ...]]:
    """Return the overrides of every arm at every point of the grid, without those of `base`."""
    last = [key.split(".")[-1] for key in study.grid]
    short = {key: key if last.count(name) > 1 else name for key, name in zip(study.grid, last, strict=True)}
    arms: dict[str, tuple[str, ...]] = {}
    points = list(itertools.product(*([(key, value) for value in values] for key, values in study.grid.items())))
    for (arm, own), point in itertools.product((study.arms or {"": ()}).items(), points):
        name = ",".join(filter(None, [arm, *(_file_name(_override(short[key], value)) for key, value in point)]))
        if name in arms:
            raise RecipeError(f"{path}: two arms are named {name}; give every value of `grid` once")
        arms[name] = (*own, *(_override(key, value) for key, value in point))
    return arms


def _override(key: str, value: object) -> str:
    return f"{key}={value if isinstance(value, str) and _is_plain(value) else json.dumps(value)}"


def _is_plain(text: str) -> bool:
    """Return whether YAML reads a text as itself."""
    return re.fullmatch(r"[A-Za-z][\w/.-]*", text) is not None and text.lower() not in ("true", "false", "null")


def _file_name(override: str) -> str:
    return re.sub(r"[^\w.=+-]", "-", re.sub(r"[\[\]{}\"\s]", "", override))


def _check_own_keys(opened: OpenStudy, path: Path) -> None:
    """Refuse overrides of what the study itself sets."""
    choose = opened.study.choose
    for arm, overrides in opened.arms.items():
        for override in (*overrides, *(choose.overrides if choose else ())):
            key = override.partition("=")[0].strip()
            if key in _OWN:
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


def _check_apart(opened: OpenStudy, trial: Recipe, reported: Run, path: Path) -> None:
    """Refuse a choice that would be made on records whose scores are reported."""
    if not opened.study.score.metrics:
        return
    scored = resolve(reported.recipe, reported.overrides).data
    if scored.validation_size or _places(scored) & _places(trial.data):
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


def _places(data: DataRecipe) -> set[tuple[Path, str]]:
    """Return where the validation records come from, however it is spelt: a file has no splits, a hub id has."""
    paths = ((Path(source.path).expanduser().resolve(), source.split) for source in data.validation)
    return {
        (path, "" if path.suffix in (".json", ".jsonl", ".gz") or path.exists() else split) for path, split in paths
    }

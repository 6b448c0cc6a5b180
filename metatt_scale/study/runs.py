"""A study's runs: what each arm trains, with which seed and where, and by what it is recognised later."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from metatt_scale.recipe import Recipe, load_recipe
from metatt_scale.study.contents import Contents
from metatt_scale.study.schema import HEADLINE, Study

OWN_KEYS = ("seed", "output_dir")
"""What a study sets of every run."""
# Keys that change neither a bit of a run nor how it is scored; but `max_nonfinite_steps` says when one has diverged.
_FREE = {
    "output_dir": True,
    "device": True,
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
    data: Mapping[str, str]
    """Hashes of what is read, by its path (`Contents.of`)."""
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
    contents: Contents = field(default_factory=Contents)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The overrides among which each arm chooses; none where nothing is chosen."""
        choose = self.study.choose
        return tuple(override_of(choose.key, value) for value in choose.values) if choose else ()

    def headline(self, arm: str) -> str:
        """Return the number that stands for all of an arm's."""
        return resolve(self._recipe_of(arm), self.arms[arm]).headline

    def prefers_more(self, arm: str, name: str) -> bool:
        """Return whether more of a number is better for an arm."""
        return self.study.score.prefers_more(self.headline(arm) if name == HEADLINE else name)

    @property
    def device(self) -> str:
        """The recipe's `device`: that of the first arm."""
        arm, overrides = next(iter(self.arms.items()))
        return resolve(self._recipe_of(arm), overrides).device

    def numbers(self, run: Run) -> tuple[str, ...]:
        """Return the numbers that a run must have to count as finished."""
        choose = self.study.choose
        return (choose.by,) if run.tried and choose else self.study.score.names

    def tasks(self, run: Run) -> tuple[str, ...]:
        """Return the tasks that a run is scored on; a trial never sees what is reported."""
        return () if run.tried else self.study.score.tasks

    def trial(self, arm: str, tried: str, seed: int) -> Run:
        """Return the run that tries an override for an arm."""
        overrides = (*self.arms[arm], *self.trial_overrides(arm), tried)
        return self._run(arm, seed, overrides, self.runs / arm / "choose" / file_name(tried), tried)

    def trial_overrides(self, arm: str) -> tuple[str, ...]:
        """Return what an arm's trials have beside its own overrides; nothing where nothing is chosen."""
        choose = self.study.choose
        return (*choose.overrides, *choose.columns.get(self._column_of(arm), ())) if choose else ()

    def reported(self, arm: str, chosen: str | None, seed: int) -> Run:
        """Return a run that is reported, with the override that its arm has chosen."""
        return self._run(arm, seed, (*self.arms[arm], *([chosen] if chosen else [])), self.runs / arm)

    def _column_of(self, arm: str) -> str:
        return arm.rpartition("@")[2] if self.study.recipes else ""

    def _recipe_of(self, arm: str) -> Path:
        return self.recipes[self._column_of(arm)]

    def _run(self, arm: str, seed: int, overrides: tuple[str, ...], folder: Path, tried: str | None = None) -> Run:
        file = self._recipe_of(arm)
        recipe = resolve(file, overrides)
        return Run(
            arm=arm,
            recipe=file,
            seed=seed,
            tried=tried,
            overrides=overrides,
            digest=digest_of(recipe),
            data=self.contents.of(recipe, () if tried else self.study.score.tasks),
            folder=folder / f"seed-{seed}",
        )


@functools.cache
def resolve(recipe: Path, overrides: tuple[str, ...]) -> Recipe:
    """Return the recipe of a run; seed and output_dir are still those of the file."""
    return load_recipe(recipe, overrides)


def digest_of(recipe: Recipe) -> str:
    """Return by what a definition is recognised: it stays as new keys with defaults come to the schema.

    A default that changes would leave it as it is too: tests/unit/test_defaults.py holds them.
    """
    decides = recipe.model_dump(mode="json", exclude=_FREE, exclude_defaults=True)
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def override_of(key: str, value: object) -> str:
    """Return an override that gives a key this very value."""
    return f"{key}={value if isinstance(value, str) and _is_plain(value) else json.dumps(value)}"


def _is_plain(text: str) -> bool:
    """Return whether YAML reads a text as itself."""
    return re.fullmatch(r"[A-Za-z][\w/.-]*", text) is not None and text.lower() not in ("true", "false", "null")


def file_name(override: str) -> str:
    """Return an override as a part of names and paths."""
    return re.sub(r"[^\w.=+-]", "-", re.sub(r"[\[\]{}\"\s]", "", override))

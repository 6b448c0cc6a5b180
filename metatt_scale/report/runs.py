"""A run as its folder tells it: recipe.yaml, metrics.jsonl and, once it has finished, adapter/metatt.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from metatt_scale.json_files import Form, parse_object, read_json
from metatt_scale.paths import user_path
from metatt_scale.recipe import Recipe, load_recipe
from metatt_scale.run_files import DescriptionForm, Sizes, Step

RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"
LARGEST = 1e30
"""Numbers beyond are taken for what is not finite: sums of their squares are not, and no axis holds them."""
_Values = Annotated[list[float | None], Field(min_length=1, max_length=8192)]
"""No bond has more singular values; nor has a mode that is told slice by slice more slices."""
_Modes = Literal["input", "layer", "site", "task", "projection", "head", "output"]


class _SweepForm(Form):
    ranks_before: Sizes | None = None
    ranks_after: Sizes | None = None


class _LineForm(Form):
    """What is there must have this form; where a null stands, or a number of no interest, nothing is asked."""

    step: Step
    epoch: Step
    skipped: Step | None = None
    ranks: Sizes | None = None
    sweep: _SweepForm | None = None
    gradient_norms: dict[_Modes, _Values] | None = None
    spectra: Annotated[list[_Values], Field(min_length=1, max_length=8)] | None = None

    @model_validator(mode="after")
    def _check(self) -> _LineForm:
        if self.epoch > self.step:
            raise ValueError("every epoch has a step")
        return self

    def bonds(self) -> set[int]:
        """Return how many bonds the line speaks of: one number, if it is right."""
        sweep = self.sweep or _SweepForm()
        return {len(found) for found in (self.ranks, sweep.ranks_before, sweep.ranks_after, self.spectra) if found}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory, read."""

    folder: Path
    recipe: Recipe
    lines: tuple[dict[str, Any], ...]
    """Lines of metrics.jsonl in the order of their steps."""
    passed_over: int
    """Lines that could not be read, such as the one a killed run was writing, or of another form than ours."""
    description: Mapping[str, Any]
    """adapter/metatt.json; empty where the run has not finished."""

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        """Return whether the run has left an adapter."""
        return bool(self.description)

    @property
    def parameters(self) -> int | None:
        """Return the number of trained values; None where no adapter tells it."""
        return self.description.get("trainable_parameters")

    @property
    def last(self) -> dict[str, Any]:
        """Return the last line."""
        return self.lines[-1]

    def values(self, key: str) -> list[float]:
        """Return the finite numbers that lines have under a key."""
        return values_of(self.lines, key)


def values_of(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return the finite numbers that lines have under a key."""
    return [value for value in (number(line, key) for line in lines) if math.isfinite(value)]


def number(line: Mapping[str, Any], key: str) -> float:
    """Return what a line has under a key, nan where that is no number, or too large."""
    value = line.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST:
        return math.nan
    return float(value)


def ranks_of(line: Mapping[str, Any]) -> list[int] | None:
    """Return the ranks after a line's step and its sweep, if it had one."""
    return (line.get("sweep") or {}).get("ranks_after") or line.get("ranks")


def of_last_ranks(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines with the ranks of the last one, among which a run has its best score.

    A sweep, and AdaLoRA, changes the ranks, and a score of larger ones is no result of those that a run ends with.
    """

    def ranks(line: dict[str, Any]) -> tuple[Any, ...]:
        return ranks_of(line), line.get("settled", True)

    return [line for line in evaluations if ranks(line) == ranks(evaluations[-1])]


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run directories.

    Raises:
        ValueError: a folder is no run, has no readable step, or is given twice; or a recipe cannot be used.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        run = _read_run(user_path(path))
        if run.folder.resolve() in runs:
            raise ValueError(f"{path} is given twice, which would count it twice; leave one out")
        runs[run.folder.resolve()] = run
    return list(runs.values())


def _read_run(folder: Path) -> Run:
    for name in (RECIPE, METRICS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no run, it has no {name}; give run directories as `train` leaves them")
    lines, passed_over = _read_lines(folder / METRICS)
    if not lines:
        raise ValueError(f"{folder / METRICS}: holds no readable step; leave this run out until it has logged one")
    return Run(
        folder=folder,
        recipe=load_recipe(folder / RECIPE),
        lines=tuple(lines),
        passed_over=passed_over,
        description=_read_description(folder / "adapter" / "metatt.json"),
    )


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines in the order of steps, the later one where a step stands twice, and how many were passed over.

    A line is passed over that is no step, or whose chain has another number of bonds than most lines have.
    """
    read: list[tuple[dict[str, Any], set[int]]] = []
    texts = path.read_bytes().splitlines()
    for text in texts:
        try:
            line = parse_object(text, _LineForm, parse_constant=lambda _: None)  # NaN, Infinity: of earlier versions
        except ValueError:
            continue
        read.append((line, _LineForm.model_validate(line).bonds()))
    usual = {bonds for bonds, _ in Counter(next(iter(b)) for _, b in read if len(b) == 1).most_common(1)}
    lines = [line for line, bonds in read if bonds <= usual]
    found = {line["step"]: line for line in lines}
    return [found[step] for step in sorted(found)], len(texts) - len(lines)


def _read_description(path: Path) -> dict[str, Any]:
    """Return an adapter's description; a report does without one that is missing or damaged."""
    try:
        return read_json(path, DescriptionForm, "")
    except (OSError, ValueError):
        return {}

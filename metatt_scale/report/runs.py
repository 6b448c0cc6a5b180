"""A run as its folder tells it: recipe.yaml, metrics.jsonl and, once it has finished, adapter/metatt.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metatt_scale.recipe import Recipe, load_recipe

RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory, read."""

    folder: Path
    recipe: Recipe
    lines: tuple[dict[str, Any], ...]
    """Lines of metrics.jsonl in the order of their steps."""
    passed_over: int
    """Lines that could not be read, such as the one a killed run was writing."""
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
        """Return the number of trained values: the sum of P N Q over the cores; None where no adapter tells it."""
        sizes, ranks = self.description.get("sizes"), self.description.get("ranks")
        if not sizes or not ranks or len(sizes) != len(ranks) + 1:
            return None
        bonds = [1, *ranks, 1]
        return sum(left * size * right for left, size, right in zip(bonds[:-1], sizes, bonds[1:], strict=True))

    @property
    def last(self) -> dict[str, Any]:
        """Return the last line."""
        return self.lines[-1]

    def values(self, key: str) -> list[float]:
        """Return the finite numbers that lines have under a key."""
        return [value for value in (number(line, key) for line in self.lines) if math.isfinite(value)]


def number(line: Mapping[str, Any], key: str) -> float:
    """Return what a line has under a key, nan where that is no number."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def ranks_of(line: Mapping[str, Any]) -> list[int] | None:
    """Return the ranks after a line's step and its sweep, if it had one."""
    return (line.get("sweep") or {}).get("ranks_after") or line.get("ranks")


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run directories.

    Raises:
        ValueError: a folder is no run, has no readable step, or is given twice; or a recipe cannot be used.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        run = _read_run(Path(path).expanduser())
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
    """Return the lines in the order of steps, the later one where a step stands twice, and how many were no step."""
    found, passed_over = {}, 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            found[int(line["step"])] = line | {"epoch": int(line["epoch"])}
        except (ValueError, KeyError, TypeError, RecursionError):
            passed_over += 1
    return [found[step] for step in sorted(found)], passed_over


def _read_description(path: Path) -> dict[str, Any]:
    """Return an adapter's description; a report does without one that is missing or damaged."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return description if isinstance(description, dict) else {}

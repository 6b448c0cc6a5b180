"""From a study file to everything it defines, checked before the first run starts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from metatt_scale.paths import user_path
from metatt_scale.recipe import RecipeError, check, read_mapping
from metatt_scale.study.checks import check_study
from metatt_scale.study.runs import OpenStudy, file_name, override_of
from metatt_scale.study.schema import Study


def open_study(path: str | Path) -> OpenStudy:
    """Read a study file and check every run it defines against the recipe, before the first of them starts.

    Raises:
        RecipeError: unknown key, wrong type or contradiction in the study file, the recipe or the overrides.
    """
    path = user_path(path)
    study = check(read_mapping(path, "study", "recipe"), str(path), Study)
    name = study.name or path.stem
    rows = _rows(study, path)
    columns = {column: path.parent / user_path(recipe, "`recipes`") for column, recipe in study.recipes.items()}
    opened = OpenStudy(
        study=study,
        recipes=columns or {"": path.parent / user_path(study.recipe, "`recipe`")},
        results=path.parent / "results" / f"{name}.jsonl",
        runs=user_path(study.runs_dir or f"runs/studies/{name}", "`runs_dir`"),
        rows=tuple(rows),
        arms=_arms(study, rows),
    )
    check_study(opened, path)
    return opened


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
        name = ",".join(filter(None, [arm, *(file_name(override_of(short[key], value)) for key, value in point)]))
        if name in arms:
            raise RecipeError(f"{path}: two arms are named {name}; give every value of `grid` once")
        arms[name] = (*own, *(override_of(key, value) for key, value in point))
    return arms

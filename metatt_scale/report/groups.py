"""Runs that differ only in their seed, as one: names, means and standard errors.

Shape legend: R runs, T logged steps, S slices of a core or singular values of a bond.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metatt_scale.recipe import Recipe
from metatt_scale.report.runs import LARGEST, Run, number, ranks_of

_NO_DIFFERENCE = ("seed", "output_dir", "device")
_FEW_EPOCHS, _MOST_COLUMNS = 5, 40  # a heat map of two epochs would show nothing: it gets finer columns
_MOST_EPOCHS = 500  # of which each has a column; of more, several have one
MODES = ("input", "layer", "task", "projection", "head", "output")
"""The paper's orders of the chain, of all kinds in one."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Something over time, one entry a step that at least one run has logged."""

    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    """Standard error of the mean over seeds; nan where a single run has a value."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one recipe with different seeds."""

    name: str
    runs: tuple[Run, ...]
    steps_per_epoch: int
    unit: str
    """`epoch`, or `step` where no run of the report has reached a second epoch: its length is not known then."""

    def x(self, steps: Any) -> Any:
        """Return where steps lie on the axis of the report's unit."""
        return np.asarray(steps) / self.steps_per_epoch if self.unit == "epoch" else np.asarray(steps)

    def curve(self, key: str, most: int | None = None) -> Curve | None:
        """Return a number of the lines over time; of more than `most` steps, means of neighbours."""

        def read(line: Mapping[str, Any]) -> list[float]:
            return [number(line, key)]

        steps, table_RTS = self._table(read)
        if most is not None and len(steps) > most:
            windows = np.array_split(np.arange(len(steps)), most)
            table_RTS = np.stack([mean_and_error(table_RTS[:, w], axis=1)[0] for w in windows], axis=1)
            steps = np.array([steps[window].mean() for window in windows])
        mean, error = mean_and_error(table_RTS[..., 0])
        there = np.isfinite(mean)
        if not there.any():
            return None
        return Curve(x=self.x(steps)[there], mean=mean[there], error=error[there])

    def rank_curves(self) -> list[Curve]:
        """Return the rank of every bond over time."""
        steps, table_RTS = self._table(lambda line: ranks_of(line) or ())
        mean_TS, error_TS = mean_and_error(table_RTS)
        return [Curve(x=self.x(steps), mean=mean_TS[:, s], error=error_TS[:, s]) for s in range(mean_TS.shape[1])]

    def rank_changes(self) -> dict[float, list[list[int]]]:
        """Return where ranks change: position on the axis -> new ranks of the runs in which they do."""
        found: dict[float, list[list[int]]] = {}
        for run in self.runs:
            current = (run.lines[0].get("sweep") or {}).get("ranks_before") or run.lines[0].get("ranks")
            for line in run.lines:
                ranks = ranks_of(line) or current
                if ranks and current and ranks != current:
                    found.setdefault(float(self.x(line["step"])), []).append(ranks)
                current = ranks
        return dict(sorted(found.items()))

    def spectra(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return per bond (positions, singular values by time and index), means over seeds, nan where a rank ends."""
        bonds = max((len(line.get("spectra") or ()) for run in self.runs for line in run.lines), default=0)
        result = []
        for bond in range(bonds):
            steps, table_RTS = self._table(
                lambda line, bond=bond: found[bond] if bond < len(found := line.get("spectra") or ()) else ()
            )
            mean_TS, _ = mean_and_error(table_RTS)
            there = np.isfinite(mean_TS).any(axis=1)
            result.append((self.x(steps)[there], mean_TS[there]))
        return result

    def gradients(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the edges of the columns and per core, in chain order, normalised gradient norms (slice, column)."""
        lines = [line for run in self.runs for line in run.lines if line.get("gradient_norms")]
        logged = {mode for line in lines for mode in line.get("gradient_norms") or {}}
        result: dict[str, np.ndarray] = {}
        if not logged:
            return np.zeros(0), result
        edges = self._columns(lines)
        for mode in sorted(logged, key=self._place):
            steps, table_RTS = self._table(lambda line, mode=mode: (line.get("gradient_norms") or {}).get(mode, ()))
            mean_TS, _ = mean_and_error(table_RTS)
            column = np.searchsorted(edges, steps) - 1  # column k holds the steps in (edge k, edge k + 1]
            columns = [mean_and_error(mean_TS[column == k])[0] for k in range(len(edges) - 1)]
            result[mode] = np.stack(columns, axis=1)
        return self.x(edges), result

    def slice_names(self, mode: str) -> list[str] | None:
        """Return the names of a core's slices where the adapter has them."""
        first = self.runs[0]
        names = list(first.recipe.tasks) if mode == "task" else first.description.get(f"{mode}s")
        return [str(name) for name in names] if isinstance(names, list) and mode != "head" else None

    def final_ranks(self) -> str:
        """Return the ranks that the runs ended with."""
        return span([ranks for run in self.runs if (ranks := ranks_of(run.last))])

    def _place(self, mode: str) -> int:
        """Return where a mode stands along the chain."""
        order = list(self.runs[0].description.get("modes") or self.runs[0].recipe.adapter.mode_order or MODES)
        return order.index(mode) if mode in order else len(order)

    def _columns(self, lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return edges of a heat map's columns in steps: epochs, or finer where there are few."""
        last, epochs = max(line["step"] for line in lines), max(line["epoch"] for line in lines) + 1
        if epochs >= _FEW_EPOCHS:
            every = -(-epochs // _MOST_EPOCHS)
            return np.arange(-(-epochs // every) + 1) * every * self.steps_per_epoch
        return np.linspace(0, last, min(_MOST_COLUMNS, len({line["step"] for line in lines})) + 1)

    def _table(self, read: Callable[[Mapping[str, Any]], Iterable[float]]) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, table_RTS) of what `read` finds on each line; nan where it finds nothing."""
        found = [{line["step"]: list(read(line)) for line in run.lines} for run in self.runs]
        steps = sorted({step for values in found for step in values})
        width = max(len(row) for values in found for row in values.values())
        table_RTS = np.full((len(found), len(steps), width), np.nan)
        place = {step: t for t, step in enumerate(steps)}
        for r, values in enumerate(found):
            for step, row in values.items():
                table_RTS[r, place[step], : len(row)] = row  # None, where a number was not finite, becomes nan
        table_RTS[~(np.abs(table_RTS) <= LARGEST)] = np.nan
        return np.array(steps), table_RTS


def mean_and_error(table: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error along an axis, leaving out nan; nan where too few are left."""
    there = np.isfinite(table)
    count = there.sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, table, 0).sum(axis=axis) / count
        squares = np.where(there, table - np.expand_dims(mean, axis), 0) ** 2
        error = np.sqrt(squares.sum(axis=axis) / (count - 1) / count)
    return mean, np.where(count > 1, error, np.nan)


def span(rows: Sequence[Sequence[int]]) -> str:
    """Return ranks of several runs in short: `8`, `8·6·4`, or `8·5–6·4` where the runs differ."""
    if not rows:
        return "–"
    bonds = [sorted({row[bond] for row in rows if bond < len(row)}) for bond in range(max(map(len, rows)))]
    texts = [str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}" for found in bonds]
    return texts[0] if len(set(texts)) == 1 else "·".join(texts)


def make_groups(runs: Sequence[Run], labels: Sequence[str] | None = None) -> list[Group]:
    """Put runs that differ only in seed, output_dir and device together, in the order in which they are given.

    Groups are called after the recipe keys in which they differ; a single one after its first run.

    Raises:
        ValueError: another number of labels than of groups.
    """
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(json.dumps(_settings(run.recipe), sort_keys=True), []).append(run)
    members = list(together.values())
    names = _names([group[0].recipe for group in members]) or [members[0][0].name]
    if labels is not None:
        if len(labels) != len(members):
            found = "; ".join(names)
            raise ValueError(
                f"--label has {len(labels)} names for {len(members)} groups of runs; give one for each of: {found}"
            )
        names = list(labels)
    unit = "epoch" if any(run.last["epoch"] > 0 for run in runs) else "step"
    lengths: dict[str, int] = {}
    for run in runs:
        lengths[_batches(run)] = max(lengths.get(_batches(run), 1), _epoch_length(run))
    return [
        Group(name=name, runs=tuple(group), steps_per_epoch=lengths[_batches(group[0])], unit=unit)
        for name, group in zip(names, members, strict=True)
    ]


def _settings(recipe: Recipe, *, without_defaults: bool = False) -> dict[str, Any]:
    """Return the dotted keys of a recipe with their values, without those that make no difference."""
    flat: dict[str, Any] = {}

    def add(section: Mapping[str, Any], prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, Mapping):
                add(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    given = recipe.model_dump(mode="json", exclude=set(_NO_DIFFERENCE), exclude_defaults=without_defaults)
    add(given, "")
    return flat


def _names(recipes: Sequence[Recipe]) -> list[str]:
    """Return a name per group out of the keys in which they differ; none for a single group.

    Of a section that some have not (`sweep`) those say so once, and the others what they set in it.
    """
    if len(recipes) < 2:
        return []
    settings = [_settings(recipe) for recipe in recipes]
    given = {key for recipe in recipes for key in _settings(recipe, without_defaults=True)}
    told = given | {key.rpartition(".")[0] for key in given}  # where a section is absent it is a key itself

    def differs(key: str) -> bool:
        values = {json.dumps(group[key]) if key in group else "" for group in settings}
        return len(values) > 1 and (key in told or "" not in values)

    keys = [key for key in dict.fromkeys(key for group in settings for key in group) if differs(key)]
    return [", ".join(f"{key}={_shown(group[key])}" for key in keys if key in group) for group in settings]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _batches(run: Run) -> str:
    """Return what decides how many steps an epoch has."""
    return json.dumps([run.recipe.data.model_dump(mode="json"), run.recipe.training.batch_size])


def _epoch_length(run: Run) -> int:
    """Return the fewest steps an epoch can have: exactly its length where the last step of one is logged.

    Step s (from 1) lies in epoch e (from 0) if e n < s <= (e + 1) n, so n >= s / (e + 1); evaluations stand at the
    end of epochs and are always logged.
    """
    return max(math.ceil(line["step"] / (line["epoch"] + 1)) for line in run.lines)

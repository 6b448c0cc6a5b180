"""The table of a study over several recipes: one row per arm, one column per recipe, and the mean over columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from metatt_scale.study import cells
from metatt_scale.study.agenda import Agenda
from metatt_scale.study.cells import (
    chosen,
    comparison,
    distinct,
    markdown_table,
    marks_of,
    parameters,
    provenance,
    values,
    with_error,
)
from metatt_scale.study.results import Line
from metatt_scale.study.runs import OpenStudy
from metatt_scale.study.schema import HEADLINE, MEAN
from metatt_scale.study.statistics import Mean, mean_of

_LEGEND = (
    "Mean over seeds ± standard error; of fewer seeds than planned, how many. The mean over columns is there once\n"
    "all of them are finished, its error that of the seeds' means. Best arm of a column **bold**, second _italic_."
)
_TITLES = {
    "last": "last evaluation",
    "best": "best evaluation of each run among those with the ranks of its last one: chosen on the very records it "
    "is reported on, so too good by nature",
}


@dataclass(frozen=True)
class _Grid:
    """What is finished, by row and column."""

    opened: OpenStudy
    agenda: Agenda

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.opened.recipes)

    @property
    def rows(self) -> tuple[str, ...]:
        """Rows with a finished run."""
        return tuple(row for row in self.opened.rows if any(self.lines(row, column) for column in self.columns))

    def lines(self, row: str, column: str) -> tuple[Line, ...]:
        return self.agenda.finished[f"{row}@{column}"]

    def choice(self, row: str, column: str) -> Line | None:
        return self.agenda.chosen.get(f"{row}@{column}")

    def all_lines(self) -> Iterator[Line]:
        for lines in self.agenda.finished.values():
            yield from lines

    def mean(self, row: str, column: str, name: str, which: str) -> Mean | None:
        """Return the mean of one cell, of MEAN that over columns; None where it is not known."""
        if column != MEAN:
            lines = self.lines(row, column)
            return mean_of(values(lines, name, which)) if lines else None
        seeds = self.opened.study.seeds
        if not self.has_mean(name) or any(len(self.lines(row, it)) < len(seeds) for it in self.columns):
            return None
        return mean_of(list(self.over_columns(row, name, which).values()))

    def over_columns(self, row: str, name: str, which: str) -> dict[int, float]:
        """Return the mean over columns of every seed that all of them have finished."""
        found = {column: self.by_seed(row, column, name, which) for column in self.columns}
        seeds = [seed for seed in self.opened.study.seeds if all(seed in it for it in found.values())]
        return {seed: sum(it[seed] for it in found.values()) / len(found) for seed in seeds}

    def by_seed(self, row: str, column: str, name: str, which: str) -> dict[int, float]:
        lines = self.lines(row, column)
        return dict(zip((line["seed"] for line in lines), values(lines, name, which), strict=True))

    def prefers_more(self, column: str, name: str) -> bool:
        column = self.columns[0] if column == MEAN else column
        return self.opened.prefers_more(f"{self.opened.rows[0]}@{column}", name)

    def has_mean(self, name: str) -> bool:
        """Return whether a mean over columns means anything: of several, in all of which more, or less, is better."""
        return len(self.columns) > 1 and len({self.prefers_more(column, name) for column in self.columns}) == 1


def as_markdown(opened: OpenStudy, agenda: Agenda) -> str:
    """Return the tables of the last and of the best evaluations, what was compared, and where the runs were done."""
    grid, score = _Grid(opened, agenda), opened.study.score
    parts = [f"# {opened.results.stem}"]
    for name in score.names:
        for which in ("last", "best") if name in score.metrics else ("last",):
            parts += [f"**{name}, {_TITLES[which]}**", _table(grid, name, which)]
    parts.append(_LEGEND)
    if opened.study.choose:
        parts += [f"**{opened.study.choose.key}, as chosen**", _choices(grid)]
    parts += _comparisons(grid)
    if waiting := [arm for arm, lines in agenda.finished.items() if not lines]:
        parts.append(f"Without a finished run: {', '.join(waiting)}.")
    parts.append(provenance(grid.all_lines()))
    return "\n\n".join(parts) + "\n"


def as_csv(opened: OpenStudy, agenda: Agenda) -> str:
    """Return one record per arm; what is not known is empty."""
    grid = _Grid(opened, agenda)
    return cells.as_csv([_record(grid, row) for row in grid.rows])


def _record(grid: _Grid, row: str) -> dict[str, Any]:
    score = grid.opened.study.score
    lines = [line for column in grid.columns for line in grid.lines(row, column)]
    record: dict[str, Any] = {
        "arm": row,
        "trainable_parameters": distinct(line["trainable_parameters"] for line in lines),
        "head_parameters": distinct(line.get("head_parameters", 0) for line in lines),
    }
    for column in (*grid.columns, *([MEAN] if len(grid.columns) > 1 else [])):
        if column != MEAN:
            if grid.opened.study.choose:
                choice = grid.choice(row, column)
                record[f"{column}_chosen"] = choice["chosen"] if choice else ""
            record[f"{column}_seeds"] = " ".join(str(line["seed"]) for line in grid.lines(row, column))
        for name in score.names:
            mean = grid.mean(row, column, name, "last") or _UNKNOWN
            key = f"{column}_{name}"
            record |= {key: mean.mean, f"{key}_stderr": mean.stderr, f"{key}_half_width_95": mean.half_width}
            if name in score.metrics:
                record[f"{key}_best"] = (grid.mean(row, column, name, "best") or _UNKNOWN).mean
    return record


_UNKNOWN = Mean(n=0, mean=math.nan, stderr=math.nan, half_width=math.nan)


def _table(grid: _Grid, name: str, which: str) -> str:
    columns = (*grid.columns, MEAN) if grid.has_mean(name) else grid.columns
    rows = [[row, parameters(it for column in grid.columns for it in grid.lines(row, column))] for row in grid.rows]
    for column in columns:
        means = {row: mean for row in grid.rows if (mean := grid.mean(row, column, name, which))}
        marks = marks_of({row: mean.mean for row, mean in means.items()}, grid.prefers_more(column, name))
        planned = len(grid.opened.study.seeds)
        for cell, row in zip(rows, grid.rows, strict=True):
            mean, mark = means.get(row), marks.get(row, "")
            few = f" ({mean.n} of {planned})" if mean and mean.n < planned else ""
            cell.append(f"{mark}{with_error(mean)}{mark}{few}" if mean else "")
    return markdown_table(["arm", "parameters x 10^3", *(_title(grid, column, name) for column in columns)], rows)


def _title(grid: _Grid, column: str, name: str) -> str:
    """Return the head of a column, which says what its recipe's headline is."""
    if name != HEADLINE or column == MEAN:
        return column
    return f"{column} ({grid.opened.headline(f'{grid.opened.rows[0]}@{column}').removeprefix('eval_')})"


def _choices(grid: _Grid) -> str:
    choices = {row: [grid.choice(row, column) for column in grid.columns] for row in grid.rows}
    rows = [[row, *(chosen(choice) if choice else "" for choice in found)] for row, found in choices.items()]
    return markdown_table(["arm", *grid.columns], rows)


def _comparisons(grid: _Grid) -> list[str]:
    """Return a line per pair, number and column, and one on the mean over columns."""
    text: list[str] = []
    for first, second in grid.opened.study.compare:
        for name in grid.opened.study.score.names:
            found = len(text)
            for column in grid.columns:
                pair = [grid.by_seed(row, column, name, "last") for row in (first, second)]
                text += _compared(f"{first} - {second}, {name} of {column}", *pair)
            if len(text) - found == len(grid.columns) and grid.has_mean(name):
                pair = [grid.over_columns(row, name, "last") for row in (first, second)]
                text += _compared(f"{first} - {second}, {name}, mean over columns", *pair)
            if len(text) == found:
                text.append(f"- {first} - {second}, {name}: no common seed is finished")
    return ["\n".join(text)] if text else []


def _compared(what: str, first: dict[int, float], second: dict[int, float]) -> Sequence[str]:
    common = [seed for seed in first if seed in second]
    return [comparison(what, [first[seed] for seed in common], [second[seed] for seed in common])] if common else []

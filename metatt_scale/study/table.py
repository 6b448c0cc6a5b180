"""The table of a study: one row per arm, as Markdown for people and as CSV with all digits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    width,
    with_error,
)
from metatt_scale.study.results import Line
from metatt_scale.study.runs import OpenStudy
from metatt_scale.study.statistics import Mean, mean_of

_Marks = dict[str, dict[str, str]]
_LEGEND = (
    "Mean over seeds of the last evaluation ± standard error, and half-width of its 95 % interval (Student's t).\n"
    "The columns `best` are means of each run's best evaluation, for each number by itself, among those with the\n"
    "ranks of its last one (the `ranks at the end`), the paper's per-trial maximum: chosen on the very records it\n"
    "is reported on, it is too good by nature. Best arm **bold**, second _italic_."
)


def as_markdown(opened: OpenStudy, agenda: Agenda) -> str:
    """Return the table, what was compared, and where the runs were done."""
    study, score = opened.study, opened.study.score
    head = ["arm", "parameters x 10^3", "ranks at the end", "seeds"]
    if study.choose:
        head.insert(1, study.choose.key)
    for name in score.names:
        head += [name, "95 %", *([f"{name}, best"] if name in score.metrics else [])]
    marks = {name: _marks(opened, agenda, name) for name in score.names}
    rows = [[*_facts(opened, agenda, arm), *_cells(opened, lines, arm, marks)] for arm, lines in _arms(agenda)]
    parts = [f"# {opened.results.stem}", markdown_table(head, rows), _LEGEND, *_comparisons(opened, agenda)]
    waiting = [arm for arm, lines in agenda.finished.items() if not lines]
    if waiting:
        parts.append(f"Without a finished run: {', '.join(waiting)}.")
    parts.append(provenance(line for lines in agenda.finished.values() for line in lines))
    return "\n\n".join(parts) + "\n"


def as_csv(opened: OpenStudy, agenda: Agenda) -> str:
    """Return one record per arm; what is not known is empty."""
    rows: list[dict[str, Any]] = []
    for arm, lines in _arms(agenda):
        row: dict[str, Any] = {"arm": arm}
        if opened.study.choose:
            row["chosen"] = agenda.chosen[arm]["chosen"]
        row["trainable_parameters"] = distinct(line["trainable_parameters"] for line in lines)
        row["head_parameters"] = distinct(line.get("head_parameters", 0) for line in lines)
        row["ranks"] = distinct(" ".join(map(str, line["ranks"])) for line in lines)
        row["seeds"] = " ".join(str(line["seed"]) for line in lines)
        for name in opened.study.score.names:
            mean = mean_of(values(lines, name, "last"))
            row |= {name: mean.mean, f"{name}_stderr": mean.stderr, f"{name}_half_width_95": mean.half_width}
            if name in opened.study.score.metrics:
                row[f"{name}_best"] = mean_of(values(lines, name, "best")).mean
        rows.append(row)
    return cells.as_csv(rows)


def _arms(agenda: Agenda) -> Iterable[tuple[str, tuple[Line, ...]]]:
    return ((arm, lines) for arm, lines in agenda.finished.items() if lines)


def _facts(opened: OpenStudy, agenda: Agenda, arm: str) -> list[str]:
    lines = agenda.finished[arm]
    choice = [chosen(agenda.chosen[arm])] if opened.study.choose else []
    ranks = distinct(" ".join(map(str, line["ranks"])) for line in lines)
    planned = len(opened.study.seeds)
    seeds = f"{len(lines)}" + (f" of {planned}" if len(lines) < planned else "")
    return [arm, *choice, parameters(lines), ranks, seeds]


def _cells(opened: OpenStudy, lines: Sequence[Line], arm: str, marks: Mapping[str, _Marks]) -> list[str]:
    row: list[str] = []
    for name in opened.study.score.names:
        mean = mean_of(values(lines, name, "last"))
        row += [_marked(mean, marks[name]["last"].get(arm, "")), width(mean)]
        if name in opened.study.score.metrics:
            row.append(_marked(mean_of(values(lines, name, "best")), marks[name]["best"].get(arm, "")))
    return row


def _marked(mean: Mean, mark: str) -> str:
    return f"{mark}{with_error(mean)}{mark}"


def _marks(opened: OpenStudy, agenda: Agenda, name: str) -> _Marks:
    """Return how the two best arms are marked, by their last and by their best evaluations."""
    marks = {}
    for which in ("last", "best"):
        means = {arm: mean_of(values(lines, name, which)).mean for arm, lines in _arms(agenda)}
        marks[which] = marks_of(means, opened.prefers_more(next(iter(means)), name))
    return marks


def _comparisons(opened: OpenStudy, agenda: Agenda) -> list[str]:
    """Return a line per pair and number: the mean difference over common seeds, its interval, and the t-test."""
    text: list[str] = []
    for first, second in opened.study.compare:
        a, b = ({line["seed"]: line for line in agenda.finished[arm]} for arm in (first, second))
        common = [seed for seed in opened.study.seeds if seed in a and seed in b]
        for name in opened.study.score.names if common else ():
            text.append(
                comparison(
                    f"{first} - {second}, {name}",
                    *(values([arm[seed] for seed in common], name, "last") for arm in (a, b)),
                )
            )
        if not common:
            text.append(f"- {first} - {second}: no common seed is finished")
    return ["\n".join(text)] if text else []

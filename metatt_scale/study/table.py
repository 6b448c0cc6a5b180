"""The table of a study: one row per arm, as Markdown for people and as CSV with all digits."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from metatt_scale.study.agenda import Agenda
from metatt_scale.study.results import Line
from metatt_scale.study.runs import OpenStudy
from metatt_scale.study.statistics import Mean, difference, mean_of

_MARKS = ("**", "_")
_LEGEND = (
    "Mean over seeds of the last evaluation ± standard error, and half-width of its 95 % interval (Student's t).\n"
    "The columns `best` are means of each run's best evaluation among those with the ranks of its last one (the\n"
    "`ranks at the end`), the paper's per-trial maximum: chosen on the very records it is reported on, it is too\n"
    "good by nature. Best arm **bold**, second _italic_."
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
    parts = [f"# {opened.results.stem}", _markdown_table(head, rows), _LEGEND, *_comparisons(opened, agenda)]
    waiting = [arm for arm, lines in agenda.finished.items() if not lines]
    if waiting:
        parts.append(f"Without a finished run: {', '.join(waiting)}.")
    parts.append(_provenance(line for lines in agenda.finished.values() for line in lines))
    return "\n\n".join(parts) + "\n"


def as_csv(opened: OpenStudy, agenda: Agenda) -> str:
    """Return one record per arm; what is not known is empty."""
    rows: list[dict[str, Any]] = []
    for arm, lines in _arms(agenda):
        row: dict[str, Any] = {"arm": arm}
        if opened.study.choose:
            row["chosen"] = agenda.chosen[arm]["chosen"]
        row["trainable_parameters"] = _distinct(line["trainable_parameters"] for line in lines)
        row["ranks"] = _distinct(" ".join(map(str, line["ranks"])) for line in lines)
        row["seeds"] = " ".join(str(line["seed"]) for line in lines)
        for name in opened.study.score.names:
            mean = mean_of(_values(lines, name, "last"))
            row |= {name: mean.mean, f"{name}_stderr": mean.stderr, f"{name}_half_width_95": mean.half_width}
            if name in opened.study.score.metrics:
                row[f"{name}_best"] = mean_of(_values(lines, name, "best")).mean
        rows.append(
            {key: "" if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        )
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _arms(agenda: Agenda) -> Iterable[tuple[str, tuple[Line, ...]]]:
    return ((arm, lines) for arm, lines in agenda.finished.items() if lines)


def _facts(opened: OpenStudy, agenda: Agenda, arm: str) -> list[str]:
    lines = agenda.finished[arm]
    chosen = [agenda.chosen[arm]["chosen"].partition("=")[2]] if opened.study.choose else []
    parameters = _distinct(f"{line['trainable_parameters'] / 1000:.4g}" for line in lines)
    ranks = _distinct(" ".join(map(str, line["ranks"])) for line in lines)
    planned = len(opened.study.seeds)
    return [arm, *chosen, parameters, ranks, f"{len(lines)}" + (f" of {planned}" if len(lines) < planned else "")]


def _cells(opened: OpenStudy, lines: Sequence[Line], arm: str, marks: dict[str, dict[str, str]]) -> list[str]:
    cells: list[str] = []
    for name in opened.study.score.names:
        mean, mark = mean_of(_values(lines, name, "last")), marks[name].get(arm, "")
        cells += [f"{mark}{_with_error(mean)}{mark}", _width(mean)]
        if name in opened.study.score.metrics:
            cells.append(_number(mean_of(_values(lines, name, "best")).mean))
    return cells


def _marks(opened: OpenStudy, agenda: Agenda, name: str) -> dict[str, str]:
    """Return how the two best arms are marked."""
    means = {arm: mean_of(_values(lines, name, "last")).mean for arm, lines in _arms(agenda)}
    finite = [arm for arm, mean in means.items() if math.isfinite(mean)]
    ranked = sorted(finite, key=lambda arm: means[arm], reverse=opened.study.score.prefers_more(name))
    return dict(zip(ranked, _MARKS, strict=False))


def _comparisons(opened: OpenStudy, agenda: Agenda) -> list[str]:
    """Return a line per pair and number: the mean difference over common seeds, its interval, and the t-test."""
    text: list[str] = []
    for first, second in opened.study.compare:
        a, b = ({line["seed"]: line for line in agenda.finished[arm]} for arm in (first, second))
        common = [seed for seed in opened.study.seeds if seed in a and seed in b]
        for name in opened.study.score.names if common else ():
            gain = difference(*(_values([arm[seed] for seed in common], name, "last") for arm in (a, b)))
            mean = gain.over_seeds
            p = "" if math.isnan(gain.p) else f", p = {gain.p:.3g} (paired t-test)"
            seeds = f"{mean.n} common seed{'s' if mean.n > 1 else ''}"
            text.append(
                f"- {first} - {second}, {name}: {mean.mean:+.4f}{_width(mean, ' ± ')} at 95 % over {seeds}{p}"
            )
        if not common:
            text.append(f"- {first} - {second}: no common seed is finished")
    return ["\n".join(text)] if text else []


def _provenance(lines: Iterable[Line]) -> str:
    places = dict.fromkeys(
        f"{line.get('device')}, torch {line.get('torch')}, metatt_scale {line.get('metatt_scale')} "
        f"at {_commit(line.get('git_commit'))}"
        for line in lines
    )
    return "Runs on: " + "; ".join(places) + "."


def _commit(commit: str | None) -> str:
    head, _, dirty = (commit or "no commit").partition("-")
    return head[:12] + (f"-{dirty}" if dirty else "")


def _values(lines: Sequence[Line], name: str, which: str) -> list[float]:
    """Return one number per line; NaN where the run's was not finite, or has none (tasks have no best)."""
    values = [line["scores"][name][which] for line in lines]
    return [math.nan if value is None else float(value) for value in values]


def _distinct(values: Iterable[Any]) -> str:
    """Return what all seeds share, or everything that occurs (adaptive ranks may differ)."""
    return " / ".join(dict.fromkeys(map(str, values)))


def _with_error(mean: Mean) -> str:
    return _number(mean.mean) + ("" if math.isnan(mean.stderr) else f" ± {mean.stderr:.4f}")


def _number(value: float) -> str:
    return "not finite" if math.isnan(value) else f"{value:.4f}"


def _width(mean: Mean, before: str = "± ") -> str:
    return "" if math.isnan(mean.half_width) else f"{before}{mean.half_width:.4f}"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose source is aligned: it is read on terminals as well."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

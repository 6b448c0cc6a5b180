"""Cells, marks and lines that all tables of studies are made of."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metatt_scale.study.results import Line
from metatt_scale.study.statistics import DIGITS, Mean, difference

_MARKS = ("**", "_")


def provenance(lines: Iterable[Line]) -> str:
    """Return on what and with what some runs were done."""
    places = dict.fromkeys(
        f"{line.get('device')}, torch {line.get('torch')}, metatt_scale {line.get('metatt_scale')} "
        f"at {_commit(line.get('git_commit'))}"
        for line in lines
    )
    return "Runs on: " + "; ".join(places) + "."


def _commit(commit: str | None) -> str:
    head, _, dirty = (commit or "no commit").partition("-")
    return head[:12] + (f"-{dirty}" if dirty else "")


def values(lines: Sequence[Line], name: str, which: str) -> list[float]:
    """Return one number per line; NaN where the run's was not finite, or has none (tasks have no best)."""
    values = [line["scores"][name][which] for line in lines]
    return [math.nan if value is None else float(value) for value in values]


def parameters(lines: Iterable[Line]) -> str:
    """Return how many thousands of values were trained, those of a head apart."""
    return distinct(_thousands(line["trainable_parameters"], line.get("head_parameters", 0)) for line in lines)


def _thousands(own: int, head: int) -> str:
    return f"{own / 1000:.4g}" + (f" + head {head / 1000:.4g}" if head else "")


def distinct(values: Iterable[Any]) -> str:
    """Return what all seeds share, or everything that occurs (adaptive ranks may differ)."""
    return " / ".join(dict.fromkeys(map(str, values)))


def chosen(choice: Line) -> str:
    """Return what an arm chose, and whether it is the last number tried on a side: a better one may lie beyond."""
    value, *tried = (text.partition("=")[2] for text in (choice["chosen"], *choice["means"]))
    try:
        numbers = sorted(map(float, tried))
        sides = {numbers[-1]: "highest", numbers[0]: "lowest"} if len(numbers) > 1 else {}
        side = sides.get(float(value))
    except ValueError:
        return value
    return value + (f" ({side} tried)" if side else "")


def with_error(mean: Mean) -> str:
    """Return a mean with its standard error, where it has one."""
    return number(mean.mean) + ("" if math.isnan(mean.stderr) else f" ± {mean.stderr:.4f}")


def number(value: float) -> str:
    """Return a number as all tables have it."""
    return "not finite" if math.isnan(value) else f"{value:.4f}"


def marks_of(means: Mapping[str, float], more_is_better: bool) -> dict[str, str]:
    """Return how the two best of some means are marked: equal ones alike."""
    rounded = {arm: round(mean, DIGITS) for arm, mean in means.items() if math.isfinite(mean)}
    marks = dict(zip(sorted(set(rounded.values()), reverse=more_is_better), _MARKS, strict=False))
    return {arm: marks[mean] for arm, mean in rounded.items() if mean in marks}


def comparison(what: str, first: Sequence[float], second: Sequence[float]) -> str:
    """Return a line on first - second over common seeds: the mean difference, its interval and the t-test if any."""
    gain = difference(first, second)
    mean = gain.over_seeds
    gained = number(mean.mean) if math.isnan(mean.mean) else f"{mean.mean:+.4f}"
    interval = "" if math.isnan(mean.half_width) else f"{width(mean, ' ± ')} at 95 %"
    p = "" if math.isnan(gain.p) else f", p = {gain.p:.3g} (paired t-test)"
    seeds = f"{mean.n} common seed{'s' if mean.n > 1 else ''}"
    return f"- {what}: {gained}{interval} over {seeds}{p}"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one record per row; what is not known is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        known = {key: "" if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        writer.writerow(known)
    return file.getvalue()


def width(mean: Mean, before: str = "± ") -> str:
    """Return the half-width of a mean's interval; nothing where it has none."""
    return "" if math.isnan(mean.half_width) else f"{before}{mean.half_width:.4f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose source is aligned: it is read on terminals as well."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

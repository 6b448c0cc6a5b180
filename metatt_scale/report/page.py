"""The page: one HTML file that holds its table, its figures and its style, and asks for nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from metatt_scale import __version__
from metatt_scale.recipe.scores import is_loss
from metatt_scale.report import MARK
from metatt_scale.report.groups import Group, mean_and_error, span
from metatt_scale.report.runs import Run, of_last_ranks, ranks_of, values_of
from metatt_scale.report.scores import PREFIX, label, readable, score_keys

_NOTHING = "–"
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #24292f; --soft: #5c646d; --line: #d9dde1 }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #d7dce2; --soft: #9aa3ad; --line: #343b43 } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
       max-width: 1040px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .3rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
h1, h2, h3, td:first-child { overflow-wrap: anywhere }
p { color: var(--soft); margin: .3rem 0 .8rem; max-width: 75ch }
img { max-width: 100%; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line) }
td { white-space: nowrap }
th { vertical-align: bottom; font-weight: 600 }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 12rem }
"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure of the page."""

    file: str
    """Name of its PNG files, without theme and ending."""
    above: str
    """HTML of headings and of what it shows."""
    alt: str
    pngs: Mapping[str, bytes]
    """By theme: light and dark."""


def page(groups: Sequence[Group], pictures: Sequence[Picture]) -> str:
    """Return the whole report as HTML."""
    title = "MetaTT: " + ", ".join(group.name for group in groups)
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{MARK}
<title>{escape(title if len(title) < 100 else title[:99] + "…")}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{count(sum(len(group.runs) for group in groups), "run")} in {count(len(groups), "group")}</h1>
<p>Runs that differ only in their seed form a group. Numbers are means over its runs ± the standard error of the mean;
“last” is the last evaluation that a run has reached, “best” the best of each run among those with the ranks of its
last one. Tokens per second are the median of a run, memory is its peak. Numbers beyond 1e30 count as not finite.</p>
{_table(*_summary(groups))}
{"".join(map(_figure, pictures))}
<h2>Runs</h2>
{_table(*_runs(groups))}
<p>Written by metatt-scale {escape(__version__)}.</p>
</body>
</html>
"""
    return readable(text)


def _figure(picture: Picture) -> str:
    light, dark = (base64.b64encode(picture.pngs[theme]).decode("ascii") for theme in ("light", "dark"))
    return f"""{picture.above}
<picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">
<img alt="{escape(picture.alt)}" src="data:image/png;base64,{light}">
</picture>
"""


def _summary(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of groups."""
    keys = score_keys(groups)
    head = ["group", "runs", "parameters", "final ranks"]
    head += [f"{label(key)}, {which}" for key in keys for which in ("last", "best")]
    head += ["tokens/s", "memory (GiB)"]
    rows = []
    for group in groups:
        row = [group.name, _finished(group.runs), _parameters(group.runs), group.final_ranks()]
        for key in keys:
            values = [found for run in group.runs if (found := run.values(key))]
            best = [found for run in group.runs if (found := _best(run, key)) is not None]
            row += [_mean([found[-1] for found in values], ".4f"), _mean(best, ".4f")]
        row.append(
            _mean([float(np.median(found)) for run in group.runs if (found := run.values("tokens_per_second"))])
        )
        row.append(_mean([max(found) for run in group.runs if (found := run.values("memory_gib"))], ".2f"))
        rows.append(row)
    return head, rows


def _best(run: Run, key: str) -> float | None:
    """Return the best number of a run's evaluations, by the rule of a study."""
    evaluations = [line for line in run.lines if any(name.startswith(PREFIX) for name in line)]
    return (min if is_loss(key) else max)(values_of(of_last_ranks(evaluations), key), default=None)


def _runs(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of runs."""
    head = ["run", "group", "seed", "last step", "final ranks", "skipped steps", "state"]
    rows = []
    for group in groups:
        for run in group.runs:
            state = "finished" if run.finished else "unfinished"
            state += f", {count(run.passed_over, 'line')} unreadable" if run.passed_over else ""
            ranks, skipped = ranks_of(run.last), run.last.get("skipped", _NOTHING)
            row = [run.name, group.name, run.recipe.seed, run.last["step"], span([ranks] if ranks else []), skipped]
            rows.append([*map(str, row), state])
    return head, rows


def count(number: int, noun: str) -> str:
    """Return `1 run`, `2 runs`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _finished(runs: Sequence[Run]) -> str:
    """Return how many runs a group has; those cut short have earlier last scores than the others."""
    unfinished = sum(not run.finished for run in runs)
    return str(len(runs)) + (f" ({unfinished} unfinished)" if unfinished else "")


def _parameters(runs: Sequence[Run]) -> str:
    """Return trained values, from fewest to most where the runs of a group ended with different ranks."""
    found = [run.parameters for run in runs if run.parameters is not None]
    return "–".join(f"{number:,}" for number in sorted({min(found), max(found)})) if found else _NOTHING


def _mean(values: Sequence[float], form: str = ",.0f") -> str:
    """Return a mean with its standard error, where there is more than one value."""
    if not values:
        return _NOTHING
    mean, error = mean_and_error(np.array(values))
    return f"{mean:{form}}" + (f" ± {error:{form}}" if len(values) > 1 else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"

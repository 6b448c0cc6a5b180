"""Scores as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from metatt_scale.evaluation.llm_adapters import PREFIX
from metatt_scale.evaluation.scores import TaskScore, paired_difference


def score_table(scores_by_label: Mapping[str, Mapping[str, TaskScore]]) -> Table:
    """Return a table in percent: task, questions, metric, one column per label, difference of the last and first.

    Each task has a line for `acc` and one for `acc_norm`; "*" marks the one it is usually reported by. Tasks that
    not every label has are left out. The difference stands with its paired standard error, the average's combines
    those of the tasks (independent questions). Scores of generated answers form a part of their own.

    Raises:
        ValueError: no labels, or no task that all labels have.
    """
    labels = list(scores_by_label)
    common = [
        task
        for task in (scores_by_label[labels[0]] if labels else ())
        if all(task in scores for scores in scores_by_label.values())
    ]
    if not common:
        raise ValueError(f"no task was scored under all of the labels {labels}; run `evaluate` for each of them")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for label in labels:
        table.add_column(label, justify="right")
    if len(labels) > 1:
        table.add_column("difference", justify="right", no_wrap=True)
    columns = [scores_by_label[label] for label in labels]
    harness = [task for task in common if not task.startswith(PREFIX)]
    generated = [task for task in common if task.startswith(PREFIX)]
    _add_part(table.add_row, table.add_section, harness, columns)
    if generated:
        table.add_row(Text("generated answers", style="italic"))
        _add_part(table.add_row, table.add_section, generated, columns)
    marked = any(column[task].metric == "acc_norm" for column in columns for task in harness)
    table.caption = "percent ± standard error" + ("; * the metric a task is usually reported by" if marked else "")
    return table


def _add_part(
    add_row: Callable[..., None],
    add_section: Callable[[], None],
    tasks: list[str],
    columns: list[Mapping[str, TaskScore]],
) -> None:
    shown = ("acc", "unparsable") if tasks and tasks[0].startswith(PREFIX) else ("acc", "acc_norm")
    for task in tasks:
        first = columns[0][task]
        for metric in (m for m in shown if all(m in column[task].samples for column in columns)):
            star = " *" if metric == first.metric and len(first.samples) > 1 and metric in ("acc", "acc_norm") else ""
            head = (task.removeprefix(PREFIX), str(first.n)) if metric == shown[0] else ("", "")
            add_row(*head, metric + star, *_cells([task], columns, metric))
    if len(tasks) > 1:
        add_section()
        for metric in shown:
            if all(metric in column[task].samples for column in columns for task in tasks):
                head = "average" if metric == shown[0] else ""
                # Text and not markup: the command line's console takes brackets as they are, for paths hold them.
                cells = (head, "", metric, *_cells(tasks, columns, metric))
                add_row(*(Text(cell, style="bold") for cell in cells))
    if tasks:
        add_section()


def _cells(tasks: list[str], columns: list[Mapping[str, TaskScore]], metric: str) -> list[str]:
    """Return the means over `tasks` per column; then the difference, or the error where there is one column."""

    def average(pairs: list[tuple[float, float]]) -> tuple[float, float]:
        mean = sum(value for value, _ in pairs) / len(pairs)
        return 100 * mean, 100 * math.sqrt(sum(error**2 for _, error in pairs)) / len(pairs)

    singles = [average([(c[task].mean(metric), c[task].stderr(metric)) for task in tasks]) for c in columns]
    if len(columns) == 1:
        return [_with_error("{:.1f}", *singles[0])]
    pairs = [paired_difference(columns[0][task], columns[-1][task], metric) for task in tasks]
    return [*(f"{mean:.1f}" for mean, _ in singles), _with_error("{:+.1f}", *average(pairs))]


def _with_error(form: str, mean: float, error: float) -> str:
    """Return a mean and its standard error, which a single question does not have."""
    return form.format(mean) + (f" ± {error:.1f}" if math.isfinite(error) else "")

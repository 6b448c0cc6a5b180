"""From a command line to a table on the terminal and its numbers in a file."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from metatt_scale.benchmark.settings import Settings, read_settings, read_targets
from metatt_scale.recipe import Recipe, only_language_models

if TYPE_CHECKING:
    from metatt_scale.benchmark.report import Report

_WIDTH = 200


def run(recipe: Recipe, options: Namespace, console: Console) -> int:
    """Measure one table, print it, and write everything behind it as JSON.

    Raises:
        ValueError: an argument out of range, a package that is not installed, or what the recipe's backbone, targets
            and records refuse.
        OSError: the JSON file cannot be written.
    """
    settings = read_settings(options)
    only_language_models(recipe, "benchmark")
    if options.targets is not None:
        adapter = recipe.adapter.model_copy(update={"target_modules": read_targets(options.targets)})
        recipe = recipe.model_copy(update={"adapter": adapter})
    file = _json_file(options)
    measure = _table(options.table)
    from metatt_scale.benchmark.report import as_table, write_report

    with console.status("benchmark") as status:
        report = measure(recipe, settings, lambda text: status.update(text))
    if console.quiet:  # another rank than the first
        return 0
    write_report(file, report)
    if not console.is_terminal:
        console.width = _WIDTH  # a table in a file or a pipe need not break its lines
    console.print(as_table(report))
    for note in report.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    console.print(f"raw numbers: {file}", highlight=False, soft_wrap=True)
    return 0


def _json_file(options: Namespace) -> Path:
    """Return where the numbers go; what is wrong with it should show before anything is measured."""
    if options.json is None:
        return Path(f"benchmark_{options.table}_{time.strftime('%Y%m%d-%H%M%S')}.json")
    file = Path(options.json).expanduser()
    if file.is_dir():
        raise ValueError(f"--json is {options.json}, which is a folder; give the name of a file")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _table(name: str) -> Callable[[Recipe, Settings, Callable[[str], None]], Report]:
    """Return what measures a table; each imports its libraries only when it is asked for."""
    match name:
        case "steps":
            from metatt_scale.benchmark.steps import measure
        case "end_to_end":
            from metatt_scale.benchmark.end_to_end import measure
        case "sweep":
            from metatt_scale.benchmark.sweep import measure
        case "wire":
            from metatt_scale.benchmark.wire import measure
        case "generation":
            from metatt_scale.benchmark.generation import measure
        case _:
            from metatt_scale.benchmark.arithmetic import measure
    return measure

"""From a command line to a table on the terminal and its numbers in a file."""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from metatt_scale.benchmark.settings import Settings, read_settings
from metatt_scale.paths import user_path
from metatt_scale.recipe import Recipe, only_chains, only_language_models

if TYPE_CHECKING:
    import torch

    from metatt_scale.benchmark.report import Report

_WIDTH = 200
_RATIOS = (
    "ratios: the median of the rounds' own quotients, and their range from least to greatest; it need not be the "
    "quotient of the medians."
)
_RUN_LAYERS = ("steps", "end_to_end", "generation")
"""Tables that run the backbone's layers; the others only take sizes from it."""


def run(recipe: Recipe, options: Namespace, console: Console) -> int:
    """Measure one table, print it, and then write everything behind it as JSON.

    Raises:
        ValueError: an argument out of range, a package that is not installed, no place for the JSON file, or what the
            recipe's backbone, targets and records refuse.
        OSError: the JSON file cannot be written after all; the table is printed by then.
    """
    settings = read_settings(options)
    only_language_models(recipe, "benchmark")
    only_chains(recipe, "benchmark")
    if recipe.tasks and options.table == "end_to_end":
        raise ValueError(
            "the recipe has `tasks`, which the other loops of --table end_to_end know nothing of; take a recipe "
            "without them, or another table"
        )
    if recipe.backbone.compile and options.table in _RUN_LAYERS:
        raise ValueError(
            f"backbone.compile is true, but --table {options.table} compiles no arm, so its numbers would be another "
            "run's; add backbone.compile=false"
        )
    file = _json_file(options)
    if not console.quiet:
        _check_place(file, options.json)
    measure = _table(options.table)
    from metatt_scale.benchmark.report import as_table, write_report
    from metatt_scale.hardware import pick_device

    device = pick_device(options.device or recipe.device, console, recipe.backbone.dtype)
    with console.status("benchmark") as status:
        report = measure(recipe, settings, device, lambda text: status.update(text))
    if console.quiet:  # another rank than the first
        return 0
    if not console.is_terminal:
        console.width = _WIDTH  # a table in a file or a pipe need not break its lines
    console.print(as_table(report))
    for note in (*report.notes, _RATIOS):
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    write_report(file, report)  # last: a full disk must not cost the table
    console.print(f"raw numbers: {file}", highlight=False, soft_wrap=True)
    return 0


def _json_file(options: Namespace) -> Path:
    """Return where the numbers go."""
    if options.json is None:
        return Path(f"benchmark_{options.table}_{time.strftime('%Y%m%d-%H%M%S')}.json")
    if not options.json.strip():
        raise ValueError(f"--json is {options.json!r}; give the name of a file, for example {options.table}.json")
    return user_path(options.json, "--json")


def _check_place(file: Path, given: str | None) -> None:
    """Refuse a place that takes no file, before anything is measured; nothing is left behind, no folder is made."""
    said = "--json is not given" if given is None else f"--json is {given}"
    try:
        if file.is_dir():
            raise ValueError(f"{said}, which is a folder; give the name of a file")
        if file.exists() and not file.is_file():
            raise ValueError(f"{said}, which is no ordinary file and would be replaced; give the name of another")
        there = next(path for path in file.absolute().parents if path.exists())
        if not there.is_dir():
            raise ValueError(f"{said}, but {there} is a file and not a folder; give a file below a folder")
        # Really: what the bits of a mode say does not hold for root, for read-only mounts, and for names too long.
        # The name is as long as that of the file which will be renamed (files.write_text).
        tempfile.NamedTemporaryFile(dir=there, prefix=f".{file.name}.", suffix="-" * 24).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"{said}, and no such file can be made in {file.absolute().parent} ({reason}); give --json a file in a "
            "folder that you may write to"
        ) from None


def _table(name: str) -> Callable[[Recipe, Settings, torch.device, Callable[[str], None]], Report]:
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

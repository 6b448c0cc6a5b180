"""A finished benchmark: what a person reads, and everything behind it as JSON."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from metatt_scale import __version__
from metatt_scale.files import write_json
from metatt_scale.recipe import Recipe
from metatt_scale.versions import package_version

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Report:
    """One table with its numbers."""

    table: str
    """Name of the table, as `--table` has it."""
    title: str
    """What was measured on what."""
    machine: dict[str, Any]
    """Versions and device."""
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    """One text per column and row."""
    rows: tuple[dict[str, Any], ...]
    """The numbers behind each row: every time in seconds, every size in bytes, in the order they were taken."""
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What one must know to read the table."""


def describe_machine(device: torch.device, packages: Iterable[str] = _PACKAGES) -> dict[str, Any]:
    """Return versions of the packages (None where absent), and the device with its threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "metatt_scale": __version__,
        **{package: version_of(package) for package in packages},
        "device": name,
        "threads": torch.get_num_threads(),
    }


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    if package == "torch":
        return str(torch.__version__)  # with its build, which the package's own record leaves out
    return package_version(package)


def cpu_name() -> str:
    """Return the model of the CPU, or its architecture where the system does not tell."""
    lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines() if _CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_backbone(recipe: Recipe) -> str:
    """Return the backbone with everything that decides what a step of it costs."""
    backbone = recipe.backbone
    checkpointing = "checkpointing" if backbone.gradient_checkpointing else "no checkpointing"
    known = f"{backbone.path}, {backbone.dtype}, quantization {backbone.quantization}, {checkpointing}"
    kernel, operator = backbone.attention, recipe.adapter.operator
    known += "" if kernel == "auto" else f", attention {kernel}"
    return known if operator == type(recipe.adapter)().operator else f"{known}, operator {operator}"


def describe_targets(recipe: Recipe) -> str:
    """Return the adapted modules in words."""
    targets = recipe.adapter.target_modules
    return targets if isinstance(targets, str) else ", ".join(targets)


def ratio_cells(ratio: Mapping[str, float]) -> tuple[str, str]:
    """Return a median and its range, of a `Ratio` as it stands in the rows, as two cells."""
    return f"{ratio['median']:.3f}", f"{ratio['smallest']:.3f}-{ratio['largest']:.3f}"


def as_table(report: Report) -> Table:
    """Return what is printed: the rows under a title with versions and device."""
    machine = dict(report.machine)
    device, threads = machine.pop("device"), machine.pop("threads")
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in machine.items())
    table = Table(
        title=f"{report.title}\n{versions}\n{device}, {threads} thread{'s' * (threads > 1)}", title_justify="left"
    )
    for k, column in enumerate(report.columns):
        table.add_column(column, justify="right" if k else "left")
    for row in report.cells:
        table.add_row(*row)
    return table


def write_report(file: Path, report: Report) -> None:
    """Write a report's numbers as one JSON object."""
    value = asdict(report)
    del value["cells"], value["columns"]
    write_json(file, value)

"""The arguments of `doctor`, the order of its lines, and how they are printed."""

from __future__ import annotations

import io
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from metatt_scale.doctor import devices, machine, packages, processes
from metatt_scale.doctor.ask import ask
from metatt_scale.doctor.line import VERDICTS, Line, Verdict, lines_of, printable

PROBLEM = 2
"""Exit code where a line is a problem: something that the user can mend, as everywhere."""
_NARROWEST = 60  # columns; a table in fewer would break most words
_COLOURS: Mapping[Verdict, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}
Report = Sequence[tuple[str, Sequence[Line]]]
"""Titles, each with its lines."""


def add_doctor(commands: Any) -> None:
    """Add `doctor` to the commands of the command line."""
    parser = commands.add_parser("doctor", help="what this machine has, for a bug report; exit code 2 on a problem")
    parser.add_argument("--json", action="store_true", help="print the lines as JSON")
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Look at this machine and print what was found; return 0, or 2 where a line is a problem."""
    local = os.environ.get("LOCAL_RANK", "0")
    if local.isdecimal() and int(local) > 0:
        return 0  # each process of a node would find the same; the first one tells
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # paths may hold letters that the terminal has not
    with Console(stderr=True).status("looking at this machine"):
        report = examine()
    if options.json:
        print(as_json(report))
    else:
        show(report, Console(markup=False, emoji=False, highlight=False))
    return PROBLEM if worst(report) == "problem" else 0


def examine() -> Report:
    """Return all lines; nothing that is found, and no error on the way, raises."""
    environment = dict(os.environ)
    busy = _or_none(machine.measure_busy)
    answers = ask(_questions())
    build, hardware = answers["torch"].facts, answers["hardware"]
    known = build or {}

    def with_build(name: str, check: Any, *arguments: Any) -> list[Line]:
        """Run a check that needs PyTorch's build, or say why there is nothing to check."""
        if build is None:
            return [Line(name=name, found="not checked, because torch cannot be imported", verdict="note")]
        return lines_of(name, lambda: check(build, *arguments))

    versions = [
        *lines_of("metatt_scale", packages.check_toolkit),
        *lines_of("Python", packages.check_python),
        *lines_of("system", packages.check_system),
        *lines_of("packages", lambda: packages.check_packages(answers)),
    ]
    nodes = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    computing = [
        *lines_of("driver", lambda: devices.check_driver(answers["driver"], nodes)),
        *with_build("PyTorch's build", devices.check_build, hardware),
        *with_build("GPUs", devices.check_gpus, hardware, answers["driver"]),
        *lines_of("CPU", lambda: devices.check_cpu(Path("/proc/cpuinfo").read_text(errors="replace"), known)),
        *lines_of("device", lambda: devices.check_device(hardware)),
        *lines_of("attention", lambda: devices.check_attention(answers["attention"])),
        *lines_of("4-bit kernels", lambda: devices.check_four_bits(answers["four bits"])),
        *lines_of("DeepSpeed's ops", lambda: devices.check_deepspeed(answers["deepspeed"])),
    ]
    meeting = [
        *lines_of("launcher", lambda: processes.check_launch(answers["launch"], environment)),
        *with_build("NCCL", processes.check_nccl, hardware),
        *with_build("gloo", processes.check_gloo, answers["gloo"]),
    ]
    room = [
        *lines_of("machine", lambda: machine.check_machine(answers, busy, environment)),
        *lines_of("folders", lambda: machine.check_folders(answers["folders"])),
    ]
    variables = lines_of("variables", lambda: processes.check_variables(environment))
    report = (
        ("Versions", versions),
        ("Devices", computing),
        ("Processes", meeting),
        ("Machine", room),
        ("Environment", variables),
    )
    return [(title, [_clean(line, environment) for line in lines]) for title, lines in report]


def _questions() -> list[str]:
    """Return what is asked, light questions first; a package that is not there is not imported."""
    first = ["folders", "driver", "torch", "hardware", "launch", "gloo", "attention"]
    imports = [packages.question_of(package) for package in packages.PACKAGES if packages.is_tried(package)]
    return list(dict.fromkeys([*first, *imports, "four bits", "deepspeed"]))


def _or_none(measure: Any) -> Any:
    try:
        return measure()
    except Exception:  # a number less in one line
        return None


def _clean(line: Line, environment: Mapping[str, str]) -> Line:
    texts = (printable(text, environment) for text in (line.name, line.found, line.remedy))
    name, found, remedy = texts
    return Line(name=name, found=found, verdict=line.verdict, remedy=remedy)


def worst(report: Report) -> Verdict:
    """Return the gravest verdict among all lines."""
    return VERDICTS[max(VERDICTS.index(line.verdict) for _, lines in report for line in lines)]


def as_json(report: Report) -> str:
    """Return the report as JSON: the gravest verdict, and every line with its section."""
    lines = [{"section": title, **vars(line)} for title, lines in report for line in lines]
    return json.dumps({"verdict": worst(report), "lines": lines}, indent=2)


def show(report: Report, console: Console) -> None:
    """Print the report as Markdown, which reads the same in a terminal, a pipe and an issue."""
    for title, lines in report:
        if console.width < _NARROWEST:
            _show_list(title, lines, console)
            continue
        table = Table(box=box.MARKDOWN)
        table.add_column("verdict", no_wrap=True)
        table.add_column(title, overflow="fold")
        table.add_column("found", overflow="fold")
        for line in lines:
            remedy = f"\nremedy: {line.remedy}" if line.remedy else ""
            name, found = (Text(text.replace("|", r"\|")) for text in (line.name, line.found + remedy))
            table.add_row(Text(line.verdict, style=_COLOURS[line.verdict]), name, found)
        console.print(table)
    console.print(_summary(line for _, lines in report for line in lines), soft_wrap=True)


def _show_list(title: str, lines: Iterable[Line], console: Console) -> None:
    console.print(f"{title}:\n")
    for line in lines:
        remedy = f"; remedy: {line.remedy}" if line.remedy else ""
        text = Text.assemble("- ", (line.verdict, _COLOURS[line.verdict]), f" {line.name}: {line.found}{remedy}")
        console.print(text, soft_wrap=True)
    console.print()


def _summary(lines: Iterable[Line]) -> str:
    lines = list(lines)
    parts = []
    for verdict in reversed(VERDICTS[VERDICTS.index("warning") :]):
        names = [line.name for line in lines if line.verdict == verdict]
        count = f"{len(names)} {verdict}{'s' * (len(names) != 1)}"
        parts.append(f"{count} ({', '.join(names)})" if names else f"no {verdict}s")
    return ", ".join(parts)

"""The arguments of `report` and the folder it writes. Libraries are imported once the arguments are checked."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from metatt_scale.files import new_folder
from metatt_scale.paths import check_no_file_in_the_way, path_argument, user_path
from metatt_scale.report import MARK

if TYPE_CHECKING:
    from metatt_scale.report.page import Picture

_PAGE, _FOLDER = "report.html", "report"
_OURS = re.compile(r"report\.html|(scores|ranks|speed|spectra-\d+|gradients-\d+)-(light|dark)\.png")


def add_report(commands: Any) -> None:
    """Add `report` to the commands of the command line."""
    parser = commands.add_parser("report", help="runs as one page of curves, spectra and gradients")
    parser.add_argument(
        "runs",
        nargs="+",
        type=path_argument,
        metavar="RUN",
        help="run directory; those that differ in seed are averaged",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FOLDER", help="where it goes; RUN/report, for several runs ./report"
    )
    parser.add_argument("--label", nargs="+", metavar="NAME", help="names of the groups, in the order of the runs")
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Write the report: report.html, and its figures as PNG files beside it.

    Raises:
        ValueError: no runs, labels that do not fit, a folder that holds something else, or no matplotlib.
    """
    beside = Path(options.runs[0]) / _FOLDER if len(options.runs) == 1 else _FOLDER
    folder = user_path(options.out or beside, "--out").resolve()
    _check_folder(folder)
    from metatt_scale.report.groups import make_groups
    from metatt_scale.report.runs import read_runs

    groups = make_groups(read_runs(options.runs), options.label)
    _check_matplotlib()
    from metatt_scale.report.page import count, page
    from metatt_scale.report.pictures import pictures
    from metatt_scale.report.scores import readable

    console = Console(markup=False)
    with console.status("drawing"):
        drawn = pictures(groups)
    _write(folder, page(groups, drawn), drawn)
    place = readable(str(folder / _PAGE))
    console.print(f"report of {count(len(groups), 'group')}: {place}", highlight=False, soft_wrap=True)
    return 0


def _write(folder: Path, text: str, drawn: list[Picture]) -> None:
    with new_folder(folder, replace=True) as new:
        (new / _PAGE).write_text(text, encoding="utf-8")
        for picture in drawn:
            for theme, png in picture.pngs.items():
                (new / f"{picture.file}-{theme}.png").write_bytes(png)


def _check_folder(folder: Path) -> None:
    """Refuse to replace anything but an earlier report."""
    check_no_file_in_the_way(folder, "--out")
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not inside:
        return
    others = [name for name in inside if not _OURS.fullmatch(name)]
    if not others and not (
        _PAGE in inside and MARK in (folder / _PAGE).read_text(encoding="utf-8", errors="replace")
    ):
        others = [inside[0]]
    if others:
        raise ValueError(f"{folder}: holds {others[0]}, which is no part of a report; give another folder with --out")


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "report draws with matplotlib, which is not installed; run `pip install metatt-scale[report]`"
        ) from None

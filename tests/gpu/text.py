"""The Markdown of a GPU check: machine, figures, parts, and what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def as_markdown(report: Mapping[str, Any]) -> str:
    """Return all that a person reads; what passing tests printed is in the JSON only."""
    lines = [f"# gpu-check: {report['machine'].get('device')}", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    tables = [part["table"] for part in report["parts"] if "table" in part]
    if tables:
        lines += ["", "## Figures", ""]
        for table in tables:
            lines += [f"{table['title']}", "", *_table(table["columns"], table["cells"]), ""]
        lines += [f"- {note}" for note in tables[0]["notes"]]
    lines += ["", "## Parts", "", *_table(("part", "outcome", "tests", "s", "shows"), map(_row, report["parts"]))]
    for part in report["parts"]:
        lines += _failures(part)
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _row(part: Mapping[str, Any]) -> tuple[str, ...]:
    counts = Counter(test["outcome"] for test in part.get("tests", ()))
    tests = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    outcome = f"{part['outcome']}: {part['reason']}" if part["reason"] else part["outcome"]
    return part["part"], outcome, tests or "-", f"{part['seconds']:.0f}", part["shows"]


def _failures(part: Mapping[str, Any]) -> list[str]:
    lines = []
    for test in part.get("tests", ()):
        if test["outcome"] == "skipped":
            lines += ["", f"{test['test']} was skipped: {test['reason']}"]
        elif test["outcome"] == "failed":
            lines += ["", f"### {test['test']}", "", "```", f"{test['said']}{test['reason']}", "```"]
    # Where a process died, its last lines tell more than the tests that had ended by then.
    if part["outcome"] == "failed" and part["reason"] != "tests failed":
        lines += ["", f"### {part['part']}: {part['reason']}", "", "```", part["output"], "```"]
    return lines

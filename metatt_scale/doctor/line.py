"""One line of the report, and how text from outside becomes fit to print."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Verdict = Literal["ok", "note", "warning", "problem"]
"""`note`: good to know, with nothing to do; `warning`: commands run, but worse than they could; `problem`: some
command fails, or computes something else than asked."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""From harmless to grave."""
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
)
"""Variables whose values are never shown."""
_SECRET_NAME = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHORTEST_SECRET = 6  # a shorter value would be found inside ordinary words


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing that was looked at."""

    name: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""
    """What the user can do; empty where there is nothing to do."""


def lines_of(name: str, check: Callable[[], Line | Iterable[Line]]) -> list[Line]:
    """Run one check and return its lines; an error becomes a line, so that the others are still printed."""
    try:
        lines = check()
        return [lines] if isinstance(lines, Line) else list(lines)
    except Exception as error:
        found = f"this check failed: {one_line(error)}"
        return [Line(name=name, found=found, verdict="warning", remedy="report it, with this whole text")]


def one_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message that is not empty."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def split(message: str) -> tuple[str, str]:
    """Return what a message to the user says, and the remedy at its end, behind the last semicolon."""
    why, found, remedy = message.rpartition("; ")
    return (why, remedy) if found else (message, "")


def size_of(size: float) -> str:
    """Return a number of bytes with a unit in which it is at least 1."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def is_secret(name: str) -> bool:
    """Return whether the value of a variable with this name is kept back."""
    return _SECRET_NAME.search(name) is not None


def printable(text: str, environment: Mapping[str, str]) -> str:
    """Return text without control characters and without the value of any variable that is secret by its name."""
    for name, value in environment.items():
        if len(value) >= _SHORTEST_SECRET and is_secret(name):
            text = text.replace(value, f"({name})")
    text = _IN_URL.sub("***", text)
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")

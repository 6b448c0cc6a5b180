"""JSON files are untrusted input: read with bounds, then checked against a schema, before anything uses them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metatt_scale.strict_json import is_unicode, loads

MAX_BYTES = 16 << 20
"""Of a file, or of one line of a file of lines: the largest that this toolkit writes has a few hundred KiB."""
MAX_DEPTH = 32
"""Of lists and objects inside one another."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Size = Annotated[int, Field(ge=1, lt=2**31)]
"""Of a mode, a bond or a module."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Form(BaseModel):
    """The keys that are needed and their types; other keys may stand beside them."""

    model_config = ConfigDict(strict=True, extra="allow")


class ClosedForm(BaseModel):
    """The keys that may stand there and their types."""

    model_config = ConfigDict(strict=True, extra="forbid")


class JsonFileError(ValueError):
    """A JSON file that cannot be used: the message names file, key, value received, rule and remedy."""


def read_json(path: Path, form: type[BaseModel], remedy: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object that a JSON file holds, once it has been found to have a form.

    Args:
        path: of the file.
        form: that it must have.
        remedy: what to do about a file that has not, for the message.
        max_bytes: a longer file is refused before it is parsed.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        JsonFileError: it holds something else.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    try:
        return parse_object(content, form, max_bytes)
    except ValueError as error:
        raise JsonFileError(f"{path}: {problem_of(error)}; {remedy}") from None


def parse_object(
    content: bytes,
    form: type[BaseModel],
    max_bytes: int = MAX_BYTES,
    parse_constant: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Return the JSON object that some UTF-8 holds.

    Args:
        content: the bytes.
        form: that the object must have.
        max_bytes: more are refused before they are parsed.
        parse_constant: called with NaN, Infinity and -Infinity; they are refused when absent.

    Raises:
        ValueError: they hold something else; `problem_of` says what.
    """
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    found = loads(content.decode("utf-8"), parse_constant)
    if not isinstance(found, dict):
        raise ValueError(f"it is {show(found)}; it must be a JSON object")
    form.model_validate(found)
    if problem := unusable(found):
        raise ValueError(problem)
    return found


def problem_of(error: ValueError) -> str:
    """Return the first thing that is wrong: the key, what it is, and what it must be."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no whole JSON: {error.msg}, character {error.pos + 1}"
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"`{key}` is missing"
    rule = first["msg"].removeprefix("Value error, ").replace("Input should", "it must")
    return f"`{key}` is {show(first['input'])}; {rule}" if key else rule


def unusable(value: dict[str, Any], max_depth: int = MAX_DEPTH) -> str | None:
    """Return what in a JSON object its readers could not carry, with the key; None where there is nothing.

    That is a number that is not finite or has more than 63 bits, half of a surrogate pair, or too much depth.
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while waiting:
        keys, here = waiting.pop()
        if len(keys) >= max_depth:
            return f"{_key(*keys[:4])} is nested too deeply; at most {max_depth} lists or objects may be"
        for key, child in here.items() if isinstance(here, dict) else enumerate(here):
            if isinstance(key, str) and not is_unicode(key):
                return f"{_key(*keys, ascii(key))} is a key with half of a surrogate pair, which is no character"
            if isinstance(child, dict | list):
                waiting.append(((*keys, str(key)), child))
            elif problem := _unusable_scalar(child):
                return f"{_key(*keys, str(key))} {problem}"
    return None


def _key(*keys: str) -> str:
    return f"`{'.'.join(keys)}`"


def _unusable_scalar(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {show(value)}; it must be a finite number"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return f"is {show(value)}; whole numbers must be below 2**63"
    if isinstance(value, str) and not is_unicode(value):
        return f"is {value[:80]!a}; it holds half of a surrogate pair, which is no character"
    return None


def show(value: Any) -> str:
    """Return a value as it would stand in the file, shortened; text in quotes."""
    if isinstance(value, int) and abs(value) >= 1 << 256:  # Python writes no number of more than 4300 digits
        return f"a whole number of about {round(value.bit_length() * math.log10(2))} digits"
    shown = json.dumps(value, ensure_ascii=False, default=repr)
    return shown if len(shown) < 80 else shown[:77] + "..."

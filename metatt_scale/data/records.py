"""From the JSON values of a data source to checked records."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from metatt_scale.data.sources import OnBad, OpenSource
from metatt_scale.recipe import DataSource
from metatt_scale.strict_json import is_unicode

Format = Literal["instruction", "chat", "text", "sentences"]
Record = dict[str, Any]

_LARGEST = float(np.finfo(np.float32).max)


class Fields(NamedTuple):
    """What a record of `format: sentences` must have."""

    texts: tuple[str, ...]
    """Names of the one or two fields that hold text."""
    label: str
    """Name of the field that holds the label."""
    classes: int
    """Number of classes; a label is a whole number below it. 1: a label is any finite number."""


def read_records(
    opened: OpenSource,
    format: Format,
    on_bad: OnBad,
    source: DataSource,
    fields: Fields | None = None,
) -> list[tuple[Record, str]]:
    """Return what the source takes of the usable records, with their places ("file:line", or "file, record N").

    `fields` are those of the sentences format; records that `source.where` leaves out do not count for its `limit`.

    Raises:
        ValueError: a whole file cannot be read (damaged gzip, broken JSON array) or changed meanwhile, whatever
            `on_bad` does.
    """
    with opened.read(on_bad) as values:
        if where := source.where:
            values = ((value, place) for value, place in values if _has(value, where))
        records = _checked(values, format, on_bad, fields)
        if source.draw == "first" or source.limit is None:
            return list(islice(records, source.limit))
        usable = list(records)
    drawn = random.Random(0).sample(range(len(usable)), min(source.limit, len(usable)))
    return [usable[index] for index in sorted(drawn)]


def _has(value: object, wanted: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(key in value and _is_same(value[key], of) for key, of in wanted.items())


def _is_same(value: object, wanted: object) -> bool:
    """Return whether two JSON values are the same: to Python true is also 1."""
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def record_problem(value: object, format: Format, fields: Fields | None = None) -> str | None:
    """Say what keeps a JSON value from being a record of this format; None when nothing does."""
    if not isinstance(value, dict):
        return f"is {_kind(value)}, not a JSON object"
    record = cast(Record, value)
    match format:
        case "instruction":
            return (
                _text_problem(record, "instruction")
                or (_text_problem(record, "input") if record.get("input") is not None else None)
                or _text_problem(record, "output", filled=True)
            )
        case "chat":
            return _messages_problem(record)
        case "text":
            return _text_problem(record, "text", filled=True)
        case "sentences":
            assert fields is not None
            problems = (_text_problem(record, name, filled=True) for name in fields.texts)
            return next(filter(None, problems), None) or _label_problem(record, fields)


def _checked(
    values: Iterable[tuple[Any, str]], format: Format, on_bad: OnBad, fields: Fields | None
) -> Iterator[tuple[Record, str]]:
    for value, place in values:
        problem = record_problem(value, format, fields)
        if problem is None:
            yield value, place
        else:
            on_bad(f"{place}: record {problem}")


def _absent(record: Record, field: str) -> str | None:
    if field in record:
        return None
    return f"has no field {field!r} (its fields: {', '.join(map(repr, record)) or 'none'})"


def _label_problem(record: Record, fields: Fields) -> str | None:
    if problem := _absent(record, fields.label):
        return problem
    label = record[fields.label]
    shown = f"{label!r} ({_kind(label)})" if isinstance(label, str | float) else _kind(label)
    if fields.classes == 1:
        if isinstance(label, bool) or not isinstance(label, int | float):
            return f"has {shown} in field {fields.label!r}, which must be a number (`labels` is 1)"
        if not -_LARGEST <= label <= _LARGEST:  # JSON as Python reads it also has NaN and Infinity
            return f"has {str(label)[:40]} in field {fields.label!r}, which must be finite in 32 bits"
        return None
    if type(label) is not int:
        return f"has {shown} in field {fields.label!r}, which must be a whole number"
    if not 0 <= label < fields.classes:
        unlabelled = "; -1 marks records without a label, as in GLUE's test splits: name a split that has them"
        return (
            f"has the class {label} in field {fields.label!r}, but classes run from 0 to {fields.classes - 1} "
            f"(`labels` is {fields.classes}){unlabelled if label == -1 else ''}"
        )
    return None


def _text_problem(record: Record, field: str, *, filled: bool = False) -> str | None:
    if problem := _absent(record, field):
        return problem
    text = record[field]
    if not isinstance(text, str):
        return f"has {_kind(text)} in field {field!r}, which must be a string"
    if filled and not text.strip():
        return f"has an empty {field!r}: there is nothing to learn from"
    if not is_unicode(text):
        return f"has an unpaired surrogate in field {field!r}, which is not valid Unicode"
    return None


def _messages_problem(record: Record) -> str | None:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return f"needs 'messages', a list of turns, but has {_kind(messages)}"
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"has {_kind(message)} as message {turn}, which must be an object with 'role' and 'content'"
        problem = _text_problem(message, "role", filled=True)
        # An empty system or user turn is odd but harmless; an empty answer teaches the end of text alone.
        problem = problem or _text_problem(message, "content", filled=message["role"] == "assistant")
        if problem:
            return f"is wrong at message {turn}, which {problem}"
    if messages[0]["role"] == "assistant":
        return "opens with an assistant turn; a system or user turn must come first"
    if all(message["role"] != "assistant" for message in messages):
        return "has no assistant turn: there is nothing to learn from"
    return None


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null" if value is None else type(value).__name__)

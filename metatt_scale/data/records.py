"""From a data source to checked records: JSON files, folders of them, or a data set of the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

from metatt_scale.files import sha256
from metatt_scale.paths import user_path
from metatt_scale.recipe import DataSource

Format = Literal["instruction", "chat", "text", "sentences"]
Record = dict[str, Any]
OnBad = Callable[[str], None]
"""Told of each record that cannot be used (the message opens with its place); may raise to stop the reading."""

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_LARGEST = float(np.finfo(np.float32).max)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Fields(NamedTuple):
    """What a record of `format: sentences` must have."""

    texts: tuple[str, ...]
    """Names of the one or two fields that hold text."""
    label: str
    """Name of the field that holds the label."""
    classes: int
    """Number of classes; a label is a whole number below it. 1: a label is any finite number."""


class OpenSource(NamedTuple):
    """A source that was found: what decides its content, and how to read it."""

    identity: tuple[str, ...]
    """Kinds and hashes of the contents, for the key of the token cache."""
    read: Callable[[OnBad], Iterator[tuple[Any, str]]]
    """Yields (JSON value, place); a line that is not JSON is reported instead."""


def open_source(source: DataSource) -> OpenSource:
    """Find a source and hash its content.

    Raises:
        ValueError: nothing is there, it is of no known kind, or the hub cannot deliver it.
    """
    path = user_path(source.path, "data source")
    if path.exists():
        if source.subset is not None:
            raise ValueError(
                f"data source {source.path!r} is on this machine, but has `subset: {source.subset}`, which only data "
                "sets of the hub have; leave it out, or give the path of the files meant"
            )
        files = _files(path)
        identity = tuple(part for file in files for part in (_suffix(file), sha256(file)))
        return OpenSource(identity, lambda on_bad: _read_files(files, on_bad))
    if _suffix(path) or not _HUB_ID.fullmatch(source.path):
        raise ValueError(
            f"data source {source.path!r} does not exist (looked at {path.absolute()}); "
            f"give a {_kinds()} file, a folder of them, or a hub id OWNER/NAME"
        )
    rows = _hub_rows(source)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    place = f"{source.title} [{source.split}], record "
    return OpenSource(("hub", digest.hexdigest()), lambda _: ((row, f"{place}{n}") for n, row in enumerate(rows, 1)))


def read_records(
    opened: OpenSource,
    format: Format,
    on_bad: OnBad,
    source: DataSource,
    fields: Fields | None = None,
) -> Iterator[tuple[Record, str]]:
    """Yield what the source takes of the usable records, with their places ("file:line", or "file, record N").

    `fields` are those of the sentences format; records that `source.where` leaves out do not count for its `limit`.

    Raises:
        ValueError: a whole file cannot be read (damaged gzip, broken JSON array), whatever `on_bad` does.
    """
    values = opened.read(on_bad)
    if where := source.where:
        values = ((value, place) for value, place in values if _has(value, where))
    records = _checked(values, format, on_bad, fields)
    if source.draw == "first" or source.limit is None:
        return islice(records, source.limit)
    usable = list(records)
    drawn = random.Random(0).sample(range(len(usable)), min(source.limit, len(usable)))
    return (usable[index] for index in sorted(drawn))


def _has(value: object, wanted: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(value.get(key) == of for key, of in wanted.items())


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
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; tokenizers refuse it
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


def _kinds() -> str:
    return ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]


def _suffix(path: Path) -> str:
    """Return the known suffix of a file name, or the empty string. Longest first: .json.gz before .gz."""
    return next((suffix for suffix in reversed(SUFFIXES) if path.name.lower().endswith(suffix)), "")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file))
        if not files:
            raise ValueError(f"data folder {path} holds no {_kinds()} file; name the folder that does")
        return files
    if not _suffix(path):
        raise ValueError(f"data file {path} is of no known kind; give a {_kinds()} file")
    return [path]


def _read_files(files: Iterable[Path], on_bad: OnBad) -> Iterator[tuple[Any, str]]:
    for path in files:
        try:
            with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as stream:
                if _suffix(path).startswith(".jsonl"):
                    yield from _read_lines(path, cast(BinaryIO, stream), on_bad)
                else:
                    yield from _read_document(path, stream.read())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}); fetch it again or pack it again") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_lines(path: Path, stream: BinaryIO, on_bad: OnBad) -> Iterator[tuple[Any, str]]:
    # Split on newline bytes alone: str.splitlines would also split at U+2028, which JSON strings may hold.
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            on_bad(f"{place}: line is not UTF-8 ({error.reason} at byte {error.start + 1})")
        except (ValueError, RecursionError) as error:
            on_bad(f"{place}: line is not JSON ({error})")
        else:
            yield value, place


def _read_document(path: Path, content: bytes) -> Iterator[tuple[Any, str]]:
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: file is not UTF-8 ({error.reason}); convert it") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: file is not JSON ({error}); correct it, "
            "or name it .jsonl if it holds one record per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: file is not readable JSON ({error}); correct it") from error
    if isinstance(value, list):
        for number, element in enumerate(value, 1):
            yield element, f"{path}, record {number}"
    else:
        yield value, f"{path}, record 1"


def _hub_rows(source: DataSource) -> list[Record]:
    try:
        import datasets  # slow to import, and only hub ids need it

        rows = datasets.load_dataset(source.path, name=source.subset, split=source.split)
        enough = None if source.where or source.draw == "random" else source.limit
        return [dict(cast(Record, row)) for row in islice(rows, enough)]
    except Exception as error:  # whatever the hub, the network or a data file does wrong
        several = re.search(r"Config name is missing.*?available configs: \[(.*?)\]", str(error), re.DOTALL)
        if several and source.subset is None:
            names = several[1].replace("'", "")
            raise ValueError(
                f"data source {source.path!r} has several subsets; name one beside its path, for example "
                f"`subset: {names.split(',')[0]}` (it has {names})"
            ) from error
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"data source {source.title!r} is no file or folder here, and the hub did not deliver its split "
            f"{source.split!r} ({type(error).__name__}: {reason}); check the spelling, `subset`, `split` and the "
            "network"
        ) from error

"""From a data source to JSON values: files, folders of them, or a data set of the hub."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from metatt_scale.files import sha256
from metatt_scale.paths import user_path
from metatt_scale.recipe import DataSource
from metatt_scale.record_files import KINDS, identity_of, record_files, suffix_of
from metatt_scale.strict_json import EqualKeysError, loads, loads_elements

OnBad = Callable[[str], None]
"""Told of each record that cannot be used (the message opens with its place); may raise to stop the reading."""
Values = Iterator[tuple[Any, str]]
"""(JSON value, place); a place is "file:line", or "file, record N"."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BLOCK = 1 << 20


class OpenSource(NamedTuple):
    """A source that was found: what decides its content, and how to read it."""

    identity: tuple[str, ...]
    """Kinds and hashes of the contents, for the key of the token cache."""
    read: Callable[[OnBad], contextlib.AbstractContextManager[Values]]
    """Used as `with read(on_bad) as values`. A line that is not JSON is reported instead of a value. Where the bytes
    that were read are not those of `identity`, leaving the block (or the file that is done) raises ValueError."""


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
        hashes = {file: sha256(file) for file in record_files(path)}
        return OpenSource(identity_of(hashes), lambda on_bad: _reading(hashes, on_bad))
    if suffix_of(path) or not _HUB_ID.fullmatch(source.path):
        raise ValueError(
            f"data source {source.path!r} does not exist (looked at {path.absolute()}); "
            f"give a {KINDS} file, a folder of them, or a hub id OWNER/NAME"
        )
    rows = _hub_rows(source)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    place = f"{source.title} [{source.split}], record "
    identity = ("hub", digest.hexdigest())
    return OpenSource(
        identity, lambda _: contextlib.nullcontext((row, f"{place}{n}") for n, row in enumerate(rows, 1))
    )


def changed_while_read(path: Path) -> ValueError:
    """Return the error for a file whose bytes are not those that were hashed."""
    return ValueError(f"{path} changed while it was read; start again when nothing writes to it")


class _HashedFile(io.RawIOBase):
    """A file that hashes the bytes that are read from it."""

    def __init__(self, path: Path, known: str) -> None:
        """Open it; `known` is the hash that its bytes have to have."""
        self._path, self._known = path, known
        self._file = open(path, "rb", buffering=0)
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def check(self) -> None:
        """Read what is left, and refuse bytes that are not the known ones."""
        rest = bytearray(_BLOCK)
        while self.readinto(rest):
            pass
        if self._digest.hexdigest() != self._known:
            raise changed_while_read(self._path)


@contextlib.contextmanager
def _reading(hashes: dict[Path, str], on_bad: OnBad) -> Iterator[Values]:
    at_work: list[_HashedFile] = []

    def values() -> Values:
        for path, known in hashes.items():
            with _telling(path), _HashedFile(path, known) as file, io.BufferedReader(file, _BLOCK) as stream:
                at_work[:] = [file]
                yield from _read_file(path, stream, on_bad)
                file.check()
                at_work.clear()

    found = values()
    yield found
    for file in at_work:  # whoever reads had enough before the end of this one
        file.check()


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Turn what the operating system and gzip raise into a message that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}); fetch it again or pack it again") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_file(path: Path, stream: BinaryIO, on_bad: OnBad) -> Values:
    if path.name.lower().endswith(".gz"):
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if suffix_of(path).startswith(".jsonl"):
        return _read_lines(path, stream, on_bad)
    return _read_document(path, stream, on_bad)


def _read_lines(path: Path, stream: BinaryIO, on_bad: OnBad) -> Values:
    # Split on newline bytes alone: str.splitlines would also split at U+2028, which JSON strings may hold.
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            on_bad(f"{place}: line is not UTF-8 ({error.reason} at byte {error.start + 1})")
        except EqualKeysError as error:
            on_bad(f"{place}: {error}")
        except ValueError as error:
            on_bad(f"{place}: line is not JSON ({error})")
        else:
            yield value, place


def _read_document(path: Path, stream: BinaryIO, on_bad: OnBad) -> Values:
    content = stream.read()
    try:
        elements = loads_elements(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: file is not UTF-8 ({error.reason}); convert it") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: file is not JSON ({error}); correct it, "
            "or name it .jsonl if it holds one record per line"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: file is not readable JSON ({error}); correct it") from error
    for number, element in enumerate(elements, 1):
        place = f"{path}, record {number}"
        if isinstance(element, EqualKeysError):
            on_bad(f"{place}: {element}")
        else:
            yield element, place


def _hub_rows(source: DataSource) -> list[dict[str, Any]]:
    try:
        import datasets  # slow to import, and only hub ids need it

        rows = datasets.load_dataset(source.path, name=source.subset, split=source.split)
        enough = None if source.where or source.draw == "random" else source.limit
        return [dict(cast("dict[str, Any]", row)) for row in islice(rows, enough)]
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

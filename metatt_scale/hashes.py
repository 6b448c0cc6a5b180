"""Hashes of large files, worked out once: a cache knows each file by path, size, times and inode."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from metatt_scale.files import cache_folder, sha256, write_json

logger = logging.getLogger(__name__)
_SMALL_BYTES = 16 << 20
"""A smaller file is hashed in less time than a look into the cache may take on a network file system."""
_SETTLED_SECONDS = 2.0
"""Times are coarse: a file that was written so short a time ago may be written again without a change of them."""
_in_this_process: dict[Stamp, str] = {}


class Stamp(NamedTuple):
    """What a file was when it was hashed: as long as all this is the same, so is its content."""

    path: str
    """Absolute, without links."""
    size: int
    """In bytes."""
    mtime_ns: int
    ctime_ns: int
    """Set by the system: also differs where a copy keeps `mtime_ns`."""
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> Stamp:
        """Return the stamp of a file as it is now."""
        real = os.path.realpath(path)
        now = os.stat(real)
        return cls(real, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)


def cached_sha256(path: str | Path) -> str:
    """Return the SHA-256 of all of a file's bytes, in hexadecimal; a large file is read only once.

    Processes that ask together read it once: the first one does, the others wait at a lock file. Where the cache
    folder cannot be written, each process reads the file once.

    Raises:
        OSError: the file cannot be read.
    """
    stamp = Stamp.of(path)
    if stamp.size < _SMALL_BYTES:
        return sha256(path)
    if stamp in _in_this_process:
        return _in_this_process[stamp]
    with _alone(_entry(stamp)) as entry:
        digest = _recorded(entry, stamp)
        if digest is None:
            started = time.time_ns()
            digest = sha256(path)
            newest = max(stamp.mtime_ns, stamp.ctime_ns)
            if newest + _SETTLED_SECONDS * 1e9 > started or Stamp.of(path) != stamp:
                return digest
            _record(entry, stamp, digest)
    _in_this_process[stamp] = digest
    return digest


def bytes_to_hash(path: str | Path) -> int:
    """Return how many bytes `cached_sha256` would read of a file now."""
    stamp = Stamp.of(path)
    known = stamp in _in_this_process or _recorded(_entry(stamp), stamp) is not None
    return 0 if known else stamp.size


def _entry(stamp: Stamp) -> Path | None:
    """Return the file that holds the hash of the file at this path; None where there is no cache folder."""
    try:
        folder = cache_folder() / "hashes"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError):
        return None
    return folder / f"{hashlib.sha256(os.fsencode(stamp.path)).hexdigest()}.json"


@contextlib.contextmanager
def _alone(entry: Path | None) -> Iterator[Path | None]:
    """Hold an entry of the cache, where there is one."""
    with contextlib.ExitStack() as held:
        try:
            if entry is not None:
                held.enter_context(FileLock(entry.with_suffix(".lock")))
        except (OSError, NotImplementedError):  # a read-only folder, or a file system without locks
            entry = None
        yield entry


def _recorded(entry: Path | None, stamp: Stamp) -> str | None:
    """Return the hash that the cache has of a file; None where it has none of the file as it is."""
    if entry is None:
        return None
    try:
        found = json.loads(entry.read_text(encoding="utf-8"))
        known = found["sha256"]
        return known if isinstance(known, str) and found["file"] == stamp._asdict() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # absent, or damaged: the file is hashed and the entry made again


def _record(entry: Path | None, stamp: Stamp, digest: str) -> None:
    try:
        if entry is None:
            raise OSError("the cache folder cannot be written")
        write_json(entry, {"file": stamp._asdict(), "sha256": digest})
    except (OSError, ValueError) as error:
        logger.warning(
            "the hash of %s cannot be kept (%s), so every start reads the file: set METATT_CACHE to a folder that "
            "you may write to",
            *(stamp.path, error),
        )

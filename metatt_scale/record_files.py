"""Which files hold the records of a recipe, and one hash for what is in them. Nothing heavy is imported here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from metatt_scale.hashes import cached_sha256
from metatt_scale.paths import user_path

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
KINDS = ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]


def suffix_of(path: Path) -> str:
    """Return the known suffix of a file name, or the empty string. Longest first: .json.gz before .gz."""
    return next((suffix for suffix in reversed(SUFFIXES) if path.name.lower().endswith(suffix)), "")


def record_files(path: Path) -> list[Path]:
    """Return the files that a path stands for: itself, or those of a known kind in the folder.

    Raises:
        ValueError: there is none of a known kind.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and suffix_of(file))
        if not files:
            raise ValueError(f"data folder {path} holds no {KINDS} file; name the folder that does")
        return files
    if not suffix_of(path):
        raise ValueError(f"data file {path} is of no known kind; give a {KINDS} file")
    return [path]


def question_file(folder: Path, task: str) -> Path | None:
    """Return the file of a task's questions in the folder; None where there is none."""
    return next((path for path in (folder / f"{task}.jsonl", folder / f"{task}.jsonl.gz") if path.is_file()), None)


def identity_of(hashes: Mapping[Path, str]) -> tuple[str, ...]:
    """Return kinds and hashes of files, which decide what is read from them."""
    return tuple(part for file, digest in hashes.items() for part in (suffix_of(file), digest))


def content_of(identity: tuple[str, ...]) -> str:
    """Return one hash for an identity: of a single file that of its bytes."""
    return identity[1] if len(identity) == 2 else hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def local_content(path: str) -> str | None:
    """Return `content_of` for files on this machine, from a cache where they are large; None where none can be read.

    Raises:
        ValueError: the path cannot be expanded.
    """
    there = user_path(path, "data source")
    try:
        return content_of(identity_of({file: cached_sha256(file) for file in record_files(there)}))
    except (OSError, ValueError):  # a hub id, or nothing there: training says so
        return None

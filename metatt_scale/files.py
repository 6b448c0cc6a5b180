"""Files that are whole or absent: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metatt_scale.paths import user_home, user_path


def cache_folder() -> Path:
    """Return the user's cache folder of this toolkit (`METATT_CACHE`, else XDG, else ~/.cache).

    Raises:
        ValueError: no variable names one, and the user has no home folder.
    """
    if chosen := os.environ.get("METATT_CACHE"):
        return user_path(chosen, "METATT_CACHE")
    if base := os.environ.get("XDG_CACHE_HOME"):
        return user_path(base, "XDG_CACHE_HOME") / "metatt_scale"
    return user_home("set METATT_CACHE to a folder for cached files") / ".cache" / "metatt_scale"


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the path to what the operating system refuses without naming a file, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def fsync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text`; a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with naming(path):
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save_tensors(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Write torch tensors as a safetensors file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None


@contextlib.contextmanager
def new_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a temporary folder beside `path`, then fsync everything in it and rename it to `path`.

    Raises:
        FileExistsError: `path` is there already and `replace` is false, or it is a file or a link.
    """
    path = Path(path)
    if path.is_symlink() or path.is_file():
        raise FileExistsError(f"{path} is not a folder of its own; remove it or choose another folder")
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already; remove it or choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        with naming(path):
            yield temporary
            for inner in sorted(temporary.rglob("*")):
                if inner.is_file():
                    with open(inner, "rb") as file:
                        os.fsync(file.fileno())
                else:
                    fsync_folder(inner)
            fsync_folder(temporary)
            if path.exists():
                retired = temporary.with_name(temporary.name + "-old")
                os.rename(path, retired)
                try:
                    os.rename(temporary, path)
                except BaseException:
                    if not path.exists():
                        os.rename(retired, path)
                    raise
                shutil.rmtree(retired)
            else:
                os.rename(temporary, path)
            fsync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

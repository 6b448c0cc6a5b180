"""Paths as users write them: `~` stands for a home folder, and what no file system takes is refused by name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes that Linux and its file systems take, as one name and as a whole path."""


def usable_path(text: str) -> str:
    """Return `text` unchanged.

    Raises:
        ValueError: no file system takes it as a path.
    """
    if "\0" in text:
        raise ValueError(f"the path {_shown(text)} holds a null byte, which no file name may hold; remove it")
    content = os.fsencode(text)
    if len(content) > _LONGEST_PATH or any(len(name) > _LONGEST_NAME for name in content.split(b"/")):
        raise ValueError(
            f"the path {_shown(text)} is too long; a name takes {_LONGEST_NAME} bytes and a path {_LONGEST_PATH}: "
            "give a shorter one"
        )
    return text


def path_argument(text: str) -> str:
    """Return `text` unchanged: `usable_path` as the `type` of a command-line argument, which the error then names."""
    try:
        return usable_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def user_path(path: str | Path, name: str = "") -> Path:
    """Return a path with a leading `~` or `~USER` replaced by the home folder.

    Args:
        path: as a user wrote it.
        name: the recipe key, argument or variable that it comes from, for the message.

    Raises:
        ValueError: no such user, no home folder, or a path that no file system takes.
    """
    said = f"{name}: " if name else ""
    try:
        return Path(usable_path(str(path))).expanduser()
    except ValueError as error:
        raise ValueError(f"{said}{error}") from None
    except RuntimeError:  # pathlib's, for both cases below
        user = Path(path).parts[0][1:]
        problem = f"there is no user {user!r} on this machine" if user else _NO_HOME
        raise ValueError(f"{said}the path {_shown(str(path))} cannot be expanded: {problem}; write it out") from None


_NO_HOME = "HOME is not set, and this user has no entry in the list of users to take a home folder from"


def user_home(remedy: str) -> Path:
    """Return the user's home folder.

    Raises:
        ValueError: none is known.
    """
    try:
        return Path.home()
    except RuntimeError:
        raise ValueError(f"{_NO_HOME}; {remedy}") from None


def check_no_file_in_the_way(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be made, because it or a folder above it is a file.

    Raises:
        ValueError: so it is.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{name}: {there} is a file, where a folder is needed; remove it, or choose another folder")


def _shown(text: str) -> str:
    return repr(text if len(text) < 100 else text[:97] + "...")

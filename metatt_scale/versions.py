"""Versions of packages and of this toolkit's own code, found without importing any of them."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import metatt_scale

_PATIENCE = 60.0  # seconds for git, whose folder may be on a file server


def package_version(package: str) -> str | None:
    """Return an installed package's version without importing it; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of the working tree this toolkit runs from, with "-dirty" if tracked code differs."""
    root = Path(metatt_scale.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE)
        return done.stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository, whose commit would be a false statement.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        # What studies append to is no code; their own results would make every later one of theirs dirty.
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":!studies/results")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None

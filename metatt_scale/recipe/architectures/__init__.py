"""Shipped architectures: the config JSON of models whose weights are not needed to plan, test or measure."""

from __future__ import annotations

import json
from pathlib import Path

_FOLDER = Path(__file__).parent


def architecture_names() -> list[str]:
    """Return the names of all shipped architectures, sorted (`llama2_7b`, ...)."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def architecture_file(name_or_hub_id: str) -> Path | None:
    """Return the config JSON of a shipped name or of the hub id it stands for, None where there is none."""
    for name in architecture_names():
        path = _FOLDER / f"{name}.json"
        if name_or_hub_id in (name, json.loads(path.read_text(encoding="utf-8"))["_name_or_path"]):
            return path
    return None

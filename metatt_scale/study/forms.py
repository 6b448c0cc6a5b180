"""What a study reads as JSON must have a form, so that nothing that works with it later meets something else."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metatt_scale.recipe.explain import show
from metatt_scale.strict_json import loads

Number = Annotated[float, Field(allow_inf_nan=False)]


class Form(BaseModel):
    """The keys that are needed; more may stand beside them."""

    model_config = ConfigDict(strict=True, extra="allow")


def parse_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object that some UTF-8 holds.

    Raises:
        ValueError: it holds something else; `problem_of` says what.
    """
    found = loads(content.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"it is {show(found)}; it must be a JSON object")
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
    return f"`{key}` is {show(first['input'])}; {first['msg'].replace('Input should', 'it must')}"

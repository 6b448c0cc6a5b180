"""What all sections of a recipe have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from metatt_scale.paths import usable_path

PathText = Annotated[str, AfterValidator(usable_path)]
"""A path, or a name that becomes part of one. `~` stays: whose home is meant depends on the machine."""


class Section(BaseModel):
    """Frozen, without unknown keys, without conversions between types; the docstring of a key is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )

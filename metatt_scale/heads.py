"""Which parameters of a model are those of its head."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def in_head(model: PreTrainedModel, name: str) -> bool:
    """Return whether a parameter of this name belongs to the head, or to the pooler before it."""
    prefix = model.base_model_prefix + "."
    return not name.startswith(prefix) or name.startswith(prefix + "pooler.")

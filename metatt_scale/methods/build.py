"""From `adapter.kind` to an adapter behind a model, new or as it was saved."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from metatt_scale.adapter import Adapter, inject, load_adapter
from metatt_scale.recipe import Recipe


def build_adapter(model: PreTrainedModel, recipe: Recipe) -> Adapter:
    """Freeze the model, and put a new adapter beside it.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    return inject(model, recipe.adapter, recipe.seed, len(recipe.tasks))


def reload_adapter(folder: Path, model: PreTrainedModel, recipe: Recipe) -> Adapter:
    """Put a saved adapter beside a freshly loaded model.

    Raises:
        ValueError: damaged files, or another model than the one it was trained beside.
    """
    return load_adapter(folder, model)

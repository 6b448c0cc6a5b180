"""From `adapter.kind` to an adapter behind a model, new or as it was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from metatt_scale.adapter import (
    Adapter,
    ChainAdapter,
    TargetMap,
    check_fit,
    compute_dtype,
    fill,
    find_targets,
    inject,
    load_adapter,
    put_head,
    read_adapter,
    read_targets,
    train_head,
)
from metatt_scale.backbone import head_tensors
from metatt_scale.methods.going_on import go_on
from metatt_scale.methods.loretta import LorettaAdp, LorettaRep, find_outputs
from metatt_scale.methods.moe_lora import MoeLora
from metatt_scale.methods.mtl_lora import MtlLora
from metatt_scale.methods.whole import Full, HeadOnly, nowhere
from metatt_scale.recipe import INNER_BONDS, AdapterRecipe, Recipe


class Method(NamedTuple):
    """How an adapter that is no chain is made."""

    find: Callable[[PreTrainedModel, AdapterRecipe], TargetMap]
    """Finds the modules it stands behind; weights may be on the meta device."""
    make: Callable[[TargetMap, Recipe, torch.dtype], Adapter]
    """Makes it for these, computing in this type; it is attached afterwards."""


def _named(model: PreTrainedModel, recipe: AdapterRecipe) -> TargetMap:
    return find_targets(model, recipe.target_modules, recipe.layers)


METHODS = {
    "mtl_lora": Method(_named, MtlLora),
    "moe_lora": Method(_named, MoeLora),
    "loretta_adp": Method(find_outputs, LorettaAdp),
    "loretta_rep": Method(_named, LorettaRep),
    "head_only": Method(nowhere, HeadOnly),
    "full": Method(nowhere, Full),
}


def build_adapter(model: PreTrainedModel, recipe: Recipe) -> Adapter:
    """Freeze the model, and put a new adapter beside it. All ranks of a sharded model call this.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    if recipe.adapter.kind in INNER_BONDS:
        adapter: Adapter = inject(model, recipe.adapter, recipe.seed, len(recipe.tasks))
    else:
        adapter = make_alone(find(model, recipe.adapter), recipe, compute_dtype(model))
        adapter.attach(model)
    _train_head(model, recipe, adapter)
    if recipe.adapter.start_from is not None:
        assert isinstance(adapter, ChainAdapter), "the recipe refuses others"
        go_on(model, recipe, adapter)
    return adapter


def reload_adapter(folder: Path, model: PreTrainedModel, recipe: Recipe) -> Adapter:
    """Put a saved adapter beside a freshly loaded model.

    Raises:
        ValueError: damaged files, or another model than the one it was trained beside.
    """
    if recipe.adapter.kind in INNER_BONDS:
        adapter: Adapter = load_adapter(folder, model)
    else:
        target_map = read_targets(folder)
        check_fit(model, target_map, folder)
        put_head(model, folder)
        adapter = make_alone(target_map, recipe, compute_dtype(model))
        adapter.attach(model)
    _train_head(model, recipe, adapter)
    fill(adapter, folder)
    return adapter


def read_alone(folder: Path, recipe: Recipe) -> Adapter:
    """Return a saved adapter without a model: enough for its exact LoRA form.

    Raises:
        ValueError: damaged files.
    """
    if recipe.adapter.kind in INNER_BONDS:
        return read_adapter(folder)
    adapter = make_alone(read_targets(folder), recipe, torch.float32)
    if adapter.targets:  # else it is the model's own weights that train
        fill(adapter, folder)
    return adapter


def find(model: PreTrainedModel, recipe: AdapterRecipe) -> TargetMap:
    """Return the modules that an adapter stands behind.

    Raises:
        ValueError: names that match nothing, or no module that this kind needs.
    """
    method = METHODS.get(recipe.kind)
    return method.find(model, recipe) if method else _named(model, recipe)


def make_alone(target_map: TargetMap, recipe: Recipe, dtype: torch.dtype) -> Adapter:
    """Return a new adapter that is no chain, not attached yet."""
    return METHODS[recipe.adapter.kind].make(target_map, recipe, dtype)


def _train_head(model: PreTrainedModel, recipe: Recipe, adapter: Adapter) -> None:
    if recipe.classifier is not None and recipe.classifier.head == "trained":
        train_head(model, adapter, head_tensors(model))

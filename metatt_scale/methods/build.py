"""From `adapter.kind` to an adapter behind a model, new or as it was saved."""

from __future__ import annotations

import logging
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
    read_description,
    read_targets,
    train_head,
    trained_head,
)
from metatt_scale.adapter.base import HEAD_PREFIX
from metatt_scale.adapter.modes import KINDS
from metatt_scale.adapter.saved import WEIGHTS
from metatt_scale.backbone import Engine, head_tensors, is_other
from metatt_scale.methods import sizes
from metatt_scale.methods.adalora import AdaLora
from metatt_scale.methods.going_on import go_on
from metatt_scale.methods.loretta import LorettaAdp, LorettaRep, find_outputs
from metatt_scale.methods.moe_lora import MoeLora
from metatt_scale.methods.mtl_lora import MtlLora
from metatt_scale.methods.peft_methods import Lora, Vera
from metatt_scale.methods.starts import start_at_weights
from metatt_scale.methods.whole import Full, HeadOnly, nowhere
from metatt_scale.parallel import World
from metatt_scale.recipe import INNER_BONDS, AdapterRecipe, Recipe
from metatt_scale.recipe.adapter import DIAGONAL
from metatt_scale.tensor_files import count_values

logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """How an adapter that is no chain is made."""

    find: Callable[[PreTrainedModel, AdapterRecipe], TargetMap]
    """Finds the modules it stands behind; weights may be on the meta device."""
    size: Callable[[TargetMap, Recipe], int]
    """Counts the values of its result without making them."""
    make: Callable[[TargetMap, Recipe, torch.dtype], Adapter]
    """Makes it for these, computing in this type; it is attached afterwards."""
    start: Callable[[Adapter, PreTrainedModel, World, Engine | None], None] | None = None
    """Sets a new one, attached, to values that follow from the frozen weights; all ranks call it together."""


def _named(model: PreTrainedModel, recipe: AdapterRecipe) -> TargetMap:
    return find_targets(model, recipe.target_modules, recipe.layers)


METHODS = {
    "mtl_lora": Method(_named, sizes.mtl_lora, MtlLora),
    "moe_lora": Method(_named, sizes.moe_lora, MoeLora),
    "loretta_adp": Method(find_outputs, sizes.loretta_adp, LorettaAdp),
    "loretta_rep": Method(_named, sizes.loretta_rep, LorettaRep),
    "head_only": Method(nowhere, sizes.nothing, HeadOnly),
    "full": Method(nowhere, sizes.nothing, Full),
    "lora": Method(_named, sizes.lora, Lora, start_at_weights),
    "vera": Method(_named, sizes.vera, Vera),
    "adalora": Method(_named, sizes.adalora, AdaLora),
}


def build_adapter(
    model: PreTrainedModel,
    recipe: Recipe,
    world: World,
    engine: Engine | None = None,
    *,
    resumes: bool = False,
) -> Adapter:
    """Freeze the model, and put a new adapter beside it. All ranks of a sharded model call this.

    Args:
        model: loaded, whole or sharded.
        recipe: with the adapter's section.
        world: the ranks, and the device that this one computes on.
        engine: what has sharded the model.
        resumes: a checkpoint will fill it, so no start is computed, or read from
            `adapter.start_from`, which may be gone by now.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    if recipe.adapter.kind in INNER_BONDS:
        adapter: Adapter = inject(model, recipe.adapter, recipe.seed, world.device, len(recipe.tasks))
    else:
        adapter = make_alone(find(model, recipe.adapter), recipe, compute_dtype(model))
        adapter.attach(model, world.device)
        start = METHODS[recipe.adapter.kind].start
        if start is not None and not resumes:
            start(adapter, model, world, engine)
    _train_head(model, recipe, adapter, world.device)
    if recipe.adapter.start_from is not None and not resumes:
        assert isinstance(adapter, ChainAdapter), "the recipe refuses others"
        known = go_on(model, recipe, adapter)
        if world.is_first and known is not None and is_other(recipe.backbone, known):
            logger.warning("adapter.start_from: that chain was trained on other weights (%s)", known)
    return adapter


def reload_adapter(folder: Path, model: PreTrainedModel, recipe: Recipe, device: torch.device) -> Adapter:
    """Put a saved adapter beside a freshly loaded model, which computes on `device`.

    Raises:
        ValueError: damaged files, or another model than the one it was trained beside.
    """
    if recipe.adapter.kind in INNER_BONDS:
        adapter: Adapter = load_adapter(folder, model, device)
        _check_modes(adapter, recipe, folder)
    else:
        target_map = _read_targets(folder, recipe)
        check_fit(model, target_map, folder)
        put_head(model, folder)
        adapter = make_alone(target_map, recipe, compute_dtype(model))
        adapter.attach(model, device)
    _train_head(model, recipe, adapter, device)
    fill(adapter, folder)
    return adapter


def read_alone(folder: Path, recipe: Recipe) -> Adapter:
    """Return a saved adapter without a model: enough for its exact LoRA form.

    Raises:
        ValueError: damaged files.
    """
    if recipe.adapter.kind in INNER_BONDS:
        adapter: Adapter = read_adapter(folder)
        _check_modes(adapter, recipe, folder)
    else:
        adapter = make_alone(_read_targets(folder, recipe), recipe, torch.float32)
    adapter.head = trained_head(folder)
    if adapter.n_head != (wanted := read_description(folder).get("head_parameters", 0)):
        raise ValueError(
            f"{folder}: holds {adapter.n_head} values of a trained head, metatt.json speaks of {wanted}; the files "
            "do not belong together, take the adapter from a backup"
        )
    if adapter.targets:  # else it is the model's own weights that train
        fill(adapter, folder)
    return adapter


def _check_modes(adapter: Adapter, recipe: Recipe, folder: Path) -> None:
    """Refuse a chain that is none of the recipe's kind, or knows another number of tasks."""
    assert isinstance(adapter, ChainAdapter)
    spec, kind = adapter.spec, recipe.adapter.kind
    tasks = len(recipe.tasks) if "task" in KINDS[kind] else None
    if sorted(spec.modes) != sorted(KINDS[kind]) or spec.diagonal != (kind in DIAGONAL) or spec.n_tasks != tasks:
        raise ValueError(
            f"{folder}: metatt.json describes a {adapter.summary()}, but its recipe is of kind {kind} with "
            f"{len(recipe.tasks)} tasks; the file is damaged, take it from a backup"
        )


def _read_targets(folder: Path, recipe: Recipe) -> TargetMap:
    """Return the targets of a saved adapter, once its file is known to hold as many values as these make."""
    target_map, method = read_targets(folder), METHODS[recipe.adapter.kind]
    if method.size is sizes.nothing and not target_map.targets:
        return target_map
    wanted, found = method.size(target_map, recipe), count_values(folder / WEIGHTS, HEAD_PREFIX)
    if found != wanted or not target_map.targets:
        raise ValueError(
            f"{folder}: metatt.json and its recipe describe an adapter of {wanted:,} values behind "
            f"{len(target_map.targets)} modules, {WEIGHTS} holds "
            f"{found:,}; the files do not belong together, take the adapter from a backup"
        )
    return target_map


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


def _train_head(model: PreTrainedModel, recipe: Recipe, adapter: Adapter, device: torch.device) -> None:
    if recipe.classifier is not None and recipe.classifier.head == "trained":
        train_head(model, adapter, head_tensors(model), device)

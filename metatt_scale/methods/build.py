"""From `adapter.kind` to an adapter behind a model, new or as it was saved."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from metatt_scale.adapter import Adapter, TargetMap, find_targets, inject, load_adapter, read_description
from metatt_scale.adapter.saved import CONFIG, WEIGHTS, make_fit, saved_targets
from metatt_scale.backbone import Engine
from metatt_scale.methods.adalora import AdaLora
from metatt_scale.methods.peft_methods import Lora, PeftAdapter, Vera
from metatt_scale.methods.starts import first_factors
from metatt_scale.parallel import World
from metatt_scale.recipe import Recipe

PEFT_METHODS: dict[str, type[PeftAdapter]] = {"lora": Lora, "vera": Vera, "adalora": AdaLora}
"""Kinds that PEFT computes."""


def build_adapter(
    model: PreTrainedModel, recipe: Recipe, world: World | None = None, engine: Engine | None = None
) -> Adapter:
    """Freeze the model, and put a new adapter beside it; all ranks call this together.

    Args:
        model: loaded, whole or sharded.
        recipe: with the adapter's section.
        world: the ranks; one process where absent.
        engine: what has sharded the model.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    if recipe.adapter.is_chain:
        return inject(model, recipe.adapter, recipe.seed)
    adapted = next((path for path, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        raise ValueError(f"{adapted} is adapted already; load the backbone anew for a second adapter")
    target_map = find_targets(model, recipe.adapter.target_modules, recipe.adapter.layers)
    world = world or World(device=next(model.parameters()).device)
    adapter = _put(model, recipe, target_map, world.device)
    if isinstance(adapter, Lora) and adapter.has_start:
        adapter.start_at(first_factors(adapter, world, engine, model))
    return adapter


def reload_adapter(folder: Path, model: PreTrainedModel, recipe: Recipe) -> Adapter:
    """Put a saved adapter beside a freshly loaded model.

    Raises:
        ValueError: damaged files, or another model than the one it was trained beside.
    """
    if recipe.adapter.is_chain:
        return load_adapter(folder, model)
    description = read_description(folder)
    try:
        target_map, values = saved_targets(description), load_file(folder / WEIGHTS)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: damaged adapter ({error!r})") from None
    make_fit(model, target_map, folder)
    adapter = _put(model, recipe, target_map, next(model.parameters()).device)
    wanted = {name: tuple(value.shape) for name, value in adapter.result().items()}
    found = {name: tuple(value.shape) for name, value in values.items()}
    if found != wanted:
        raise ValueError(f"{folder}: {CONFIG} describes tensors of shapes {wanted}, {WEIGHTS} holds {found}")
    adapter.set_values(values)
    return adapter


def _put(model: PreTrainedModel, recipe: Recipe, target_map: TargetMap, device: torch.device) -> PeftAdapter:
    for target in target_map.targets:
        _check_rank(recipe, target.path, target.d_in, target.d_out)
    return PEFT_METHODS[recipe.adapter.kind](model, recipe.adapter, target_map, recipe.seed, device)


def _check_rank(recipe: Recipe, path: str, d_in: int, d_out: int) -> None:
    """Refuse a start from singular vectors that a matrix does not have."""
    if recipe.adapter.init in ("pissa", "olora") and recipe.adapter.rank > min(d_in, d_out):  # type: ignore[operator]
        raise ValueError(
            f"adapter.rank is {recipe.adapter.rank}, but {path} is {d_in} -> {d_out}, so adapter.init "
            f"{recipe.adapter.init} finds no more than {min(d_in, d_out)} directions in it; lower the rank"
        )

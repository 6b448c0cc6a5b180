"""PEFT's methods as what they all are: a pair of factors per module, and as files that PEFT loads.

delta W = scaling * B A        A (r x d_in), B (d_out x r)

lora      A, B                 alpha / r
pissa     [A; A0], [B, -B0]    alpha / r    (rank 2r; olora too)
adalora   A * E, B             alpha / (r + 1e-5), as PEFT has it
vera      A * d, B * b         1            (A and B shared)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from metatt_scale.adapter import Adapter, ChainAdapter, merge, read_adapter, read_description
from metatt_scale.adapter.lora_form import LoraPair, lora_config, peft_config, peft_state, state_of
from metatt_scale.adapter.merge import merged_linear
from metatt_scale.adapter.saved import WEIGHTS, saved_targets
from metatt_scale.adapter.targets import Target, TargetMap
from metatt_scale.methods.peft_methods import PeftAdapter
from metatt_scale.recipe import AdapterRecipe, Recipe
from metatt_scale.recipe.adapter import initial_rank


@torch.no_grad()
def low_rank_pair(recipe: AdapterRecipe, target: Target, tensors: Mapping[str, Tensor]) -> LoraPair:
    """Return the factors of one module (the scaling left out), exactly."""
    path = target.path
    if recipe.kind == "vera":
        a_RI, b_OR = tensors["vera_A"][:, : target.d_in], tensors["vera_B"][: target.d_out]
        d_R, b_O = tensors[f"{path}.vera_lambda_d"], tensors[f"{path}.vera_lambda_b"]
        return LoraPair(path, a_RI * d_R[:, None], b_OR * b_O[:, None])
    a_RI, b_OR = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
    if recipe.kind == "adalora":
        return LoraPair(path, a_RI * tensors[f"{path}.lora_E"], b_OR)
    if f"{path}.start_A" in tensors:
        a_RI = torch.cat([a_RI, tensors[f"{path}.start_A"]])
        b_OR = torch.cat([b_OR, -tensors[f"{path}.start_B"]], dim=1)
    return LoraPair(path, a_RI, b_OR)


def scaling_of(recipe: AdapterRecipe) -> float:
    """Return what the product of the factors is multiplied by."""
    if recipe.kind == "vera":
        return 1.0
    rank = initial_rank(recipe)
    return recipe.alpha / (rank + 1e-5 if recipe.kind == "adalora" else rank)


def peft_files(source: Path, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what PEFT's adapter_config.json and adapter_model.safetensors hold; needs no backbone and no PEFT.

    VeRA is written as VeRA, for as LoRA it would be larger by orders of magnitude; all others as LoRA.

    Raises:
        ValueError: damaged files.
    """
    if recipe.adapter.is_chain:
        adapter = read_adapter(source)
        return peft_config(adapter, recipe.backbone.path), peft_state(adapter)
    try:
        target_map, tensors = saved_targets(read_description(source)), load_file(source / WEIGHTS)
        if recipe.adapter.kind == "vera":
            return _vera_files(recipe, target_map, tensors)
        pairs = [low_rank_pair(recipe.adapter, target, tensors) for target in target_map.targets]
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: damaged adapter ({error!r})") from None
    rank = len(pairs[0].lora_A)
    alpha = scaling_of(recipe.adapter) * rank
    return lora_config(target_map.targets, recipe.backbone.path, rank, alpha), state_of(pairs)


def _vera_files(
    recipe: Recipe, target_map: TargetMap, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shared = lora_config(target_map.targets, recipe.backbone.path, initial_rank(recipe.adapter), 1.0)
    config = {key: value for key, value in shared.items() if not key.startswith("lora_") and key != "use_rslora"}
    # The projections travel along; the seed is what they were drawn from.
    config |= {"peft_type": "VERA", "save_projection": True, "projection_prng_key": recipe.seed}
    places = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}
    return config, {places.get(name, f"base_model.model.{name}"): value for name, value in tensors.items()}


@torch.no_grad()
def merged_layers(adapter: Adapter) -> dict[str, nn.Module]:
    """Return the adapted modules by path, as plain linears with the adapter in their weights.

    Raises:
        ValueError: a merged weight holds NaN or infinity; the message names the module.
    """
    if isinstance(adapter, ChainAdapter):
        merge(adapter)
        layers = (linear.merged_layer for linear in adapter.linears)
        return {target.path: layer for target, layer in zip(adapter.targets, layers, strict=True) if layer}
    assert isinstance(adapter, PeftAdapter)
    tensors, scaling, merged = adapter.result(), scaling_of(adapter.recipe), {}
    for (layer, path), target in zip(adapter.layer_and_path(), adapter.targets, strict=True):
        pair = low_rank_pair(adapter.recipe, target, tensors)
        delta_OI = scaling * pair.lora_B @ pair.lora_A
        merged[path] = merged_linear(layer.get_base_layer(), delta_OI, path, adapter.compute_dtype)
    return merged

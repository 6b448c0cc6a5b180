"""Linears whose weights bitsandbytes packs into 4 or 8 bits."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.recipe import BackboneRecipe, RecipeError

_OUTLIER = 6.0
"""Columns of activations beyond this are multiplied in 16 bits by int8 layers on a GPU (LLM.int8(), Dettmers et al.
2022); rounding them to 8 bits as well would ruin models of 6.7 billion parameters and more."""

BLOCK = 64
"""Weights that share a scale in 4-bit storage. The CPU kernel of bitsandbytes 0.50 starts a new block with every row,
the packing does not: at a width of 32 or 96 the unpacked weights are off by a fifth and more."""

_PIECE = 1 << 20
"""Weights that are quantised at once on a CPU: a whole number of blocks and of bytes."""


def linears_to_pack(model: PreTrainedModel, recipe: BackboneRecipe, device: torch.device) -> list[str]:
    """Return the paths of the linears that `backbone.quantization` is about; the model may be on the meta device.

    Raises:
        ValueError: there is none (GPT-2's Conv1D), or one that bitsandbytes computes wrongly with.
    """
    heads = {id(module) for module in (model.get_output_embeddings(),) if module is not None}
    linears = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and id(module) not in heads and any(part.isdigit() for part in path.split("."))
    ]
    if not linears:
        raise ValueError(
            f"backbone.quantization is {recipe.quantization}, but {type(model).__name__} has no torch Linear inside "
            "its layers; use quantization: none"
        )
    for path, linear in linears:
        if recipe.quantization != "int8" and device.type == "cpu" and linear.in_features % BLOCK:
            raise ValueError(
                f"backbone.quantization is {recipe.quantization}, but {path} is {linear.in_features} wide: on a CPU "
                f"bitsandbytes unpacks 4-bit weights wrongly unless the input width is a multiple of {BLOCK}; use "
                "int8 or none"
            )
    return [path for path, _ in linears]


def pack(model: PreTrainedModel, paths: list[str], recipe: BackboneRecipe, device: torch.device) -> None:
    """Replace the linears at these paths by their bitsandbytes form, one at a time."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        packed = quantised_linear(linear, recipe, device)
        for parameter in packed.parameters():  # what transformers initialises around them leaves these as they are
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(model.get_submodule(parent), name, packed)


def check_shardable(recipe: BackboneRecipe) -> None:
    """Refuse quantised weights that no sharding engine can cut and gather.

    Raises:
        RecipeError: int8, or packed bytes under another type than that of the unquantised weights.
    """
    if recipe.quantization == "int8":
        raise RecipeError(
            "backbone.quantization is int8, whose layers keep their weights outside the parameters that FSDP2 and "
            "ZeRO-3 shard; use nf4 or none, or set parallel.backbone: replicate"
        )
    if recipe.quantization != "none" and recipe.quant_storage != recipe.dtype:
        raise RecipeError(
            f"backbone.quant_storage is {recipe.quant_storage} and backbone.dtype is {recipe.dtype}, but FSDP2 and "
            f"ZeRO-3 gather a layer in one float type; set backbone.quant_storage: {recipe.dtype}, or "
            "parallel.backbone: replicate"
        )


def quantised_linear(linear: nn.Linear, recipe: BackboneRecipe, device: torch.device) -> nn.Linear:
    """Return the NF4, FP4 or int8 form of one linear, on the device."""
    bnb: Any = importlib.import_module("bitsandbytes")
    from metatt_scale.backbone.linear4bit import FrozenLinear4bit

    shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.detach()
    with torch.device("meta"):
        if recipe.quantization == "int8":
            packed: nn.Linear = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False, threshold=_OUTLIER)
        else:
            packed = FrozenLinear4bit(
                *shape,
                bias=has_bias,
                compute_dtype=weight.dtype,
                quant_type=recipe.quantization,
                compress_statistics=recipe.double_quantization,
                quant_storage=getattr(torch, recipe.quant_storage),
            )
    if recipe.quantization == "int8":
        packed.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        data, state = _quantise_in_pieces(weight, recipe, device)
        packed.weight = bnb.nn.Params4bit(
            data,
            requires_grad=False,
            quant_state=state,
            quant_type=recipe.quantization,
            compress_statistics=recipe.double_quantization,
            quant_storage=data.dtype,
            module=packed,
            bnb_quantized=True,
        )
        packed.quant_state = state  # engines replace the weight; what it stands for is found here
        # On CPUs with avx512_bf16 the layer repacks its weight in place the first time it runs in eval mode under
        # no_grad, and every later training step computes with damaged weights. Keep the general path.
        packed.support_avx512bf16_for_cpu = False  # type: ignore[attr-defined]
    if has_bias:
        # A copy: the linear may lie in a mapped file.
        packed.bias = nn.Parameter(linear.bias.detach().to(device, copy=True), requires_grad=False)
    return packed


def _quantise_in_pieces(weight: Tensor, recipe: BackboneRecipe, device: torch.device) -> tuple[Tensor, Any]:
    """Return a weight's packed bytes and quant state, bit for bit those of quantising it at once.

    On a CPU this needs several times the memory of what it quantises; pieces keep that small beside one layer.
    Elsewhere one kernel does it without scratch, and the weight is copied once: the host waits for every copy.
    """
    functional: Any = importlib.import_module("bitsandbytes.functional")
    storage = getattr(torch, recipe.quant_storage)
    packed, scales, state = [], [], None
    flat = weight.to(device).reshape(-1)
    for piece in flat.split(_PIECE if device.type == "cpu" else max(1, flat.numel())):
        data, state = functional.quantize_4bit(
            piece, blocksize=BLOCK, quant_type=recipe.quantization, quant_storage=storage
        )
        packed.append(data)
        scales.append(state.absmax)
    assert state is not None
    state.shape, state.absmax = weight.shape, torch.cat(scales)
    if recipe.double_quantization:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return torch.cat(packed), state

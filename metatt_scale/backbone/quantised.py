"""Linears whose weights bitsandbytes packs into 4 or 8 bits."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from metatt_scale.recipe import BackboneRecipe

_OUTLIER = 6.0
"""Columns of activations beyond this are multiplied in 16 bits by int8 layers on a GPU (LLM.int8(), Dettmers et al.
2022); rounding them to 8 bits as well would ruin models of 6.7 billion parameters and more."""

_BLOCK = 64
"""Weights that share a scale in 4-bit storage. The CPU kernel of bitsandbytes 0.50 starts a new block with every row,
the packing does not: at a width of 32 or 96 the unpacked weights are off by a fifth and more."""


def quantise(model: PreTrainedModel, recipe: BackboneRecipe, device: torch.device) -> None:
    """Replace every linear of the layers by its bitsandbytes form, one at a time (the output head stays).

    Raises:
        ValueError: a model whose linears cannot be quantised (GPT-2's Conv1D).
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
        parent, _, name = path.rpartition(".")
        if recipe.quantization != "int8" and device.type == "cpu" and linear.in_features % _BLOCK:
            raise ValueError(
                f"backbone.quantization is {recipe.quantization}, but {path} is {linear.in_features} wide: on a CPU "
                f"bitsandbytes unpacks 4-bit weights wrongly unless the input width is a multiple of {_BLOCK}; use "
                "int8 or none"
            )
        setattr(model.get_submodule(parent), name, quantised_linear(linear, recipe, device))


def quantised_linear(linear: nn.Linear, recipe: BackboneRecipe, device: torch.device) -> nn.Linear:
    """Return the NF4, FP4 or int8 form of one linear, on the device."""
    bnb: Any = importlib.import_module("bitsandbytes")

    shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.detach()
    with torch.device("meta"):
        if recipe.quantization == "int8":
            packed: nn.Linear = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False, threshold=_OUTLIER)
        else:
            packed = bnb.nn.Linear4bit(
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
        packed.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            quant_type=recipe.quantization,
            compress_statistics=recipe.double_quantization,
            quant_storage=getattr(torch, recipe.quant_storage),
            module=packed,
        ).to(device)
        # On CPUs with avx512_bf16 the layer repacks its weight in place the first time it runs in eval mode under
        # no_grad, and every later training step computes with damaged weights. Keep the general path.
        packed.support_avx512bf16_for_cpu = False  # type: ignore[attr-defined]
    if has_bias:
        packed.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    return packed

"""Folding the chain into plain weights, and taking it out again.

The frozen layer is kept untouched beside the merged one, so unmerging gives back the same bits.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from metatt_scale.adapter import operator
from metatt_scale.adapter.chain import ChainAdapter
from metatt_scale.adapter.folding import factors_at
from metatt_scale.adapter.modes import factors


@torch.no_grad()
def merge(adapter: ChainAdapter) -> None:
    """Let every adapted linear compute with W + alpha G1 G2[l] G3[m] G4 in one product.

    A 4- or 8-bit layer is merged as a plain linear on its dequantised weight. Nothing changes if any merged
    weight is not finite.

    Raises:
        ValueError: a merged weight holds NaN or infinity; the message names the module.
    """
    merged = []
    all_factors = factors(adapter.spec, list(adapter.cores), adapter.alpha)
    for linear, target in zip(adapter.linears, adapter.targets, strict=True):
        delta_IO = operator.delta(*factors_at(all_factors, target))
        merged.append(merged_linear(linear.base_layer, delta_IO.mT, target.path, adapter.compute_dtype))
    for linear, plain in zip(adapter.linears, merged, strict=True):
        linear.merged_layer = plain


@torch.no_grad()
def merged_linear(module: nn.Module, delta_OI: Tensor, path: str, dtype: torch.dtype) -> nn.Linear | Conv1D:
    """Return a plain copy of a linear with a delta (output x input) in its weight.

    Raises:
        ValueError: the sum holds NaN or infinity; the message names the module.
    """
    plain = plain_linear(module, dtype)
    delta = delta_OI.mT if isinstance(plain, Conv1D) else delta_OI  # Conv1D stores input x output
    # One rounding, of the sum: the delta alone in bf16 would lose its small entries.
    weight = (plain.weight.to(delta.dtype) + delta.to(plain.weight.device)).to(plain.weight.dtype)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"merging {path} gives weights that are not finite; nothing was merged (check the adapter's "
            "cores, or merge in a wider dtype)"
        )
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def unmerge(adapter: ChainAdapter) -> None:
    """Go back to the frozen layers (bit for bit) with the chain beside them."""
    for linear in adapter.linears:
        linear.merged_layer = None


@torch.no_grad()
def plain_linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear | Conv1D:
    """Return an unquantised copy of a linear: the packed weight dequantised, the bias as it is."""
    if isinstance(module, Conv1D):
        return copy.deepcopy(module)
    assert isinstance(module, nn.Linear)
    weight = dequantised_weight(module).to(dtype)
    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype).clone(), requires_grad=False)
    return plain.train(module.training)


def dequantised_weight(module: nn.Linear) -> Tensor:
    """Return a copy of the weight (output x input) as numbers, whatever bitsandbytes packed it into."""
    weight = module.weight
    # An engine replaces the packed parameter; what its bytes stand for stays with the module.
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)
    scale = getattr(weight, "SCB", None)
    if scale is None:
        scale = getattr(getattr(module, "state", None), "SCB", None)
    if weight.dtype == torch.int8:
        assert scale is not None, "an int8 weight has its row scales beside it"
        return weight.data.float() * (scale.float() / 127.0)[:, None]
    return weight.detach().clone()

"""Folding an adapter into plain weights, and taking it out again.

The frozen layer is kept untouched beside the merged one, so unmerging gives back the same bits.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from metatt_scale.adapter.base import Adapter


@torch.no_grad()
def merge(adapter: Adapter) -> None:
    """Let every adapted linear compute with W + delta (of a chain alpha G1 G2[l] G3[m] G4) in one product.

    A 4- or 8-bit layer is merged as a plain linear on its dequantised weight. Nothing changes if any merged
    weight is not finite.

    Raises:
        ValueError: a merged weight holds NaN or infinity (the message names the module); or the adapter is no
            change of weights, or differs between tasks and none is chosen.
    """
    merged = []
    for linear, target, delta_IO in zip(adapter.linears, adapter.targets, adapter.deltas(), strict=True):
        plain = plain_linear(linear.base_layer, adapter.compute_dtype)
        delta = delta_IO if isinstance(plain, Conv1D) else delta_IO.mT  # Conv1D stores input x output
        # One rounding, of the sum: the delta alone in bf16 would lose its small entries.
        weight = (plain.weight.to(delta.dtype) + delta.to(plain.weight.device)).to(plain.weight.dtype)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"merging {target.path} gives weights that are not finite; nothing was merged (check the adapter's "
                "parameters, or merge in a wider dtype)"
            )
        plain.weight = nn.Parameter(weight, requires_grad=False)
        merged.append(plain)
    for linear, plain in zip(adapter.linears, merged, strict=True):
        linear.merged_layer = plain


def unmerge(adapter: Adapter) -> None:
    """Go back to the frozen layers (bit for bit) with the adapter beside them."""
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

"""A frozen 4-bit linear whose backward pass reads the packed weight from the layer's parameter.

bitsandbytes' own autograd function keeps a view of the packed weight from forward to backward. ZeRO-3 releases a
gathered parameter by giving it another `data`, which does not free a storage that a view refers to: every gathered
4-bit layer would stay in memory until its backward, also under gradient checkpointing.

Shape legend: N rows (any leading axes), I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.autograd._functions import matmul_4bit
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class FrozenLinear4bit(Linear4bit):
    """bitsandbytes' Linear4bit, bit for bit, for weights and biases that are never trained.

    `compute_dtype` is set. Between forward and backward it keeps the parameter alone, whose bytes a sharding engine
    releases and gathers again.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias (..., d_out) for x (..., d_in), in the type of x."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        assert self.compute_dtype is not None
        assert self.bias is None or not self.bias.requires_grad
        # FSDP2 replaces the parameter by one that has no quant state; that of the layer is left.
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y: Tensor = _Multiply.apply(x.to(self.compute_dtype), self.weight, bias, state)  # type: ignore[assignment]
        return y.to(x.dtype)


class _Multiply(Function):
    """y = x W^T + bias. Keeps the parameter W itself: a view of it would keep its gathered bytes.

    Not by `save_for_backward`, which is called when the product is there: checkpointing recomputes a layer up to the
    last tensor that it saved, which would be the packed product at the layer's end, for nothing.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: Tensor, bias_O: Tensor | None, state: Any) -> Tensor:
        ctx.weight, ctx.state = weight, state
        return matmul_4bit(x_NI, weight, state, bias=bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dy_NO,) = grads
        # bitsandbytes would read behind the end of a weight that is not there.
        assert ctx.weight.numel(), "the engine gathers the weight before the layer's backward"
        weight_OI = dequantize_4bit(ctx.weight, ctx.state)
        return dy_NO @ weight_OI.to(dy_NO.dtype), None, None, None

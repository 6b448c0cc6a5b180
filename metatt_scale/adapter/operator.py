"""The adapted linear's arithmetic: y += (x A) C B, with gradients returned to full-precision leaves.

A, C and B enter as compute copies (the backbone's dtype) beside their leaves (the cores' dtype). The copies do
the arithmetic, the leaves only receive the gradients: what is summed over modules and micro-batches is summed
in full precision. `project` is one node per distinct input, so Q, K and V share x A and its backward.

Shape legend: N rows (batch x sequence), I input width, O output width, P, Q bonds (thin).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Project(Function):
    """h = x A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_leaf: Tensor, a_IP: Tensor) -> Tensor:
        ctx.save_for_backward(x, a_IP)
        ctx.leaf_dtype = a_leaf.dtype
        return x @ a_IP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, a_IP = ctx.saved_tensors
        (dh,) = grads
        dx = dh @ a_IP.mT if ctx.needs_input_grad[0] else None
        da_IP = x.flatten(0, -2).mT @ dh.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, None if da_IP is None else da_IP.to(ctx.leaf_dtype), None


class _Accumulate(Function):
    """y += h C B, in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, c_leaf: Tensor, b_leaf: Tensor, c_PQ: Tensor, b_QO: Tensor) -> Tensor:
        ctx.save_for_backward(h, c_PQ, b_QO)
        ctx.leaf_dtypes = c_leaf.dtype, b_leaf.dtype
        ctx.mark_dirty(y)
        return add_low_rank(y, h, c_PQ, b_QO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, c_PQ, b_QO = ctx.saved_tensors
        dy = grads[0]
        dy_NO, h_NP = dy.to(h.dtype).flatten(0, -2), h.flatten(0, -2)
        du_NQ = dy_NO @ b_QO.mT
        dh = (du_NQ @ c_PQ.mT).view_as(h) if ctx.needs_input_grad[1] else None
        dc_PQ = (h_NP.mT @ du_NQ).to(ctx.leaf_dtypes[0]) if ctx.needs_input_grad[2] else None
        db_QO = ((h_NP @ c_PQ).mT @ dy_NO).to(ctx.leaf_dtypes[1]) if ctx.needs_input_grad[3] else None
        return dy, dh, dc_PQ, db_QO, None, None


def project(x: Tensor, a_leaf: Tensor, a_IP: Tensor) -> Tensor:
    """Return h = x A, differentiable in x and in the leaf behind A."""
    h: Tensor = _Project.apply(x, a_leaf, a_IP)  # type: ignore[assignment]
    return h


def accumulate(y: Tensor, h: Tensor, c_leaf: Tensor, b_leaf: Tensor, c_PQ: Tensor, b_QO: Tensor) -> Tensor:
    """Add h C B to y in place and return it, differentiable in y, h and the leaves behind C and B."""
    result: Tensor = _Accumulate.apply(y, h, c_leaf, b_leaf, c_PQ, b_QO)  # type: ignore[assignment]
    return result


def add_low_rank(y: Tensor, h: Tensor, c_PQ: Tensor, b_QO: Tensor) -> Tensor:
    """Add h C B to y in place (no gradient)."""
    u = h @ c_PQ
    if y.dtype == b_QO.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(u.flatten(0, -2), b_QO)
    else:  # an engine or an 8-bit layer that answers in another type
        y.add_((u @ b_QO).to(y.dtype))
    return y


@torch.no_grad()
def delta(a_IP: Tensor, c_PQ: Tensor, b_QO: Tensor) -> Tensor:
    """Return the dense delta W = A C B of one module (input width x output width)."""
    return (a_IP @ c_PQ) @ b_QO

"""The adapted linear's arithmetic: y += (x A) C B, with gradients returned to full-precision leaves.

A, C and B enter as compute copies (the backbone's dtype) beside their leaves (the cores' dtype). The copies do
the arithmetic; the leaves only receive the gradients, and own no memory: what is summed over modules and
micro-batches is summed in full precision. `project` is one node per distinct input, so Q, K and V share x A, and the
thin gradients of all three are summed before its backward touches the wide dimension.

The rest of the chain has two orders. Thin first, (h C) B, for few rows; with C folded into B once per step, h M, when
the rows are many (see folding.py). Both write into the base output with `addmm`.

Shape legend: B examples, S positions, N rows (B x S), I input width, O output width, P, Q bonds (thin), T tasks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Project(Function):
    """h = x A. Saves x by reference."""

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


class _AddFolded(Function):
    """y += h M with M = C B. Saves h, which the modules of one input share."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, m_leaf: Tensor, m_PO: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(h, m_PO)
        ctx.leaf_dtype = m_leaf.dtype
        if not in_place:
            return y + (h @ m_PO).to(y.dtype)
        ctx.mark_dirty(y)
        return add_product(y, h, m_PO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, m_PO = ctx.saved_tensors
        dy = grads[0]
        dy_NO = dy.to(h.dtype).flatten(0, -2)
        dh = (dy_NO @ m_PO.mT).view_as(h) if ctx.needs_input_grad[1] else None
        dm_PO = (h.flatten(0, -2).mT @ dy_NO).to(ctx.leaf_dtype) if ctx.needs_input_grad[2] else None
        return dy, dh, dm_PO, None, None


class _AddThinFirst(Function):
    """y += (h C) B. Saves h; u = h C is cheaper to make again than to keep."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, c_leaf: Tensor, b_leaf: Tensor, c_PQ: Tensor, b_QO: Tensor, in_place: bool
    ) -> Tensor:
        ctx.save_for_backward(h, c_PQ, b_QO)
        ctx.leaf_dtypes = c_leaf.dtype, b_leaf.dtype
        if not in_place:
            return y + (h @ c_PQ @ b_QO).to(y.dtype)
        ctx.mark_dirty(y)
        return add_product(y, h @ c_PQ, b_QO)

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
        return dy, dh, dc_PQ, db_QO, None, None, None


def project(x: Tensor, a_leaf: Tensor, a_IP: Tensor) -> Tensor:
    """Return h = x A, differentiable in x and in the leaf behind A."""
    h: Tensor = _Project.apply(x, a_leaf, a_IP)  # type: ignore[assignment]
    return h


def add_folded(y: Tensor, h: Tensor, m_leaf: Tensor, m_PO: Tensor, *, in_place: bool) -> Tensor:
    """Return y + h M (written into y where `in_place`), differentiable in y, h and the leaf behind M."""
    result: Tensor = _AddFolded.apply(y, h, m_leaf, m_PO, in_place)  # type: ignore[assignment]
    return result


def add_thin_first(
    y: Tensor, h: Tensor, c_leaf: Tensor, b_leaf: Tensor, c_PQ: Tensor, b_QO: Tensor, *, in_place: bool
) -> Tensor:
    """Return y + (h C) B, written into y where `in_place`; differentiable in y, h and the leaves of C and B."""
    result: Tensor = _AddThinFirst.apply(y, h, c_leaf, b_leaf, c_PQ, b_QO, in_place)  # type: ignore[assignment]
    return result


class _MixExamples(Function):
    """u[b] = h[b] C[task[b]] for whole examples: as many multiplications as with one task. Saves h."""

    @staticmethod
    def forward(ctx: Any, h_BSP: Tensor, c_leaf: Tensor, c_TPQ: Tensor, task_B: Tensor) -> Tensor:
        ctx.save_for_backward(h_BSP, c_TPQ, task_B)
        ctx.leaf_dtype = c_leaf.dtype
        return h_BSP @ c_TPQ[task_B]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h_BSP, c_TPQ, task_B = ctx.saved_tensors
        (du_BSQ,) = grads
        dh_BSP = du_BSQ @ c_TPQ[task_B].mT if ctx.needs_input_grad[0] else None
        dc_TPQ = None
        if ctx.needs_input_grad[1]:
            dc_BPQ = (h_BSP.mT @ du_BSQ).to(ctx.leaf_dtype)
            # A product with 0 and 1, for sums by index come in any order on a GPU. (What is not finite in one example
            # spoils all tasks' gradients; such a step is left out as a whole.)
            own_TB = (torch.arange(len(c_TPQ), device=task_B.device)[:, None] == task_B).to(dc_BPQ.dtype)
            dc_TPQ = (own_TB @ dc_BPQ.flatten(1)).view(c_TPQ.shape)
        return dh_BSP, dc_TPQ, None, None


class _MixRows(Function):
    """u[n] = h[n] C[task[n]]. Saves h; products with the C of all tasks, of which each row keeps its own."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, c_leaf: Tensor, c_TPQ: Tensor, task_N: Tensor) -> Tensor:
        ctx.save_for_backward(h, c_TPQ, task_N)
        ctx.leaf_dtype = c_leaf.dtype
        return _own_product(h, c_TPQ, task_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, c_TPQ, task_N = ctx.saved_tensors
        (du,) = grads
        dh = _own_product(du, c_TPQ.mT, task_N) if ctx.needs_input_grad[0] else None
        dc_TPQ = None
        if ctx.needs_input_grad[1]:
            du_NQ, n_tasks = du.flatten(0, -2), len(c_TPQ)
            du_NTQ = du_NQ.new_zeros(len(du_NQ), n_tasks, du_NQ.shape[-1])
            du_NTQ.scatter_(1, task_N[:, None, None].expand(-1, 1, du_NQ.shape[-1]), du_NQ[:, None])
            dc = h.flatten(0, -2).mT @ du_NTQ.flatten(1)  # (P, T Q)
            dc_TPQ = dc.unflatten(1, (n_tasks, -1)).transpose(0, 1).to(ctx.leaf_dtype)
        return dh, dc_TPQ, None, None


def _own_product(h: Tensor, c_TPQ: Tensor, task_N: Tensor) -> Tensor:
    """Return h[n] C[task[n]] for every row.

    One product for all tasks costs T times the thin one and no loop; a gathered C per row would be N P Q values.
    """
    n_tasks, p, q = c_TPQ.shape
    u_NTQ = (h.flatten(0, -2) @ c_TPQ.transpose(0, 1).reshape(p, n_tasks * q)).unflatten(1, (n_tasks, q))
    u_NQ = u_NTQ.gather(1, task_N[:, None, None].expand(-1, 1, q)).squeeze(1)
    return u_NQ.view(*h.shape[:-1], q)


def mix_by_task(h: Tensor, c_leaf: Tensor, c_TPQ: Tensor, tasks: Tensor) -> Tensor:
    """Return u[n] = h[n] C[task[n]], each row through the middle product of its own task, in one batched product.

    Differentiable in h and in the leaf behind C. (paper eq. 6: x G1 G2[l] G3[t] G4[m] G5)

    Args:
        h: (..., P) projected rows.
        c_leaf: receives the gradient of C.
        c_TPQ: middle products of all tasks.
        tasks: int64 index of each row's task (B, S), or of each example's (B, 1), which is T times cheaper.
    """
    u: Tensor
    if h.dim() == 3 and tasks.shape == (len(h), 1):
        u = _MixExamples.apply(h, c_leaf, c_TPQ, tasks[:, 0])  # type: ignore[assignment]
    else:
        u = _MixRows.apply(h, c_leaf, c_TPQ, tasks.expand(h.shape[:-1]).reshape(-1))  # type: ignore[assignment]
    return u


def reference(y: Tensor, x: Tensor, a_IP: Tensor, c_PQ: Tensor, b_QO: Tensor, tasks: Tensor | None = None) -> Tensor:
    """Return y + x A C B by plain differentiable operations: what the others are compared with.

    With tasks, C is (T, P, Q), and each row goes through that of its own.
    """
    dtype = torch.promote_types(x.dtype, y.dtype)
    h = x.to(dtype) @ a_IP.to(dtype)
    if tasks is None:
        u = h @ c_PQ.to(dtype)
    else:
        task_N = tasks.expand(h.shape[:-1]).reshape(-1)
        u = (h.flatten(0, -2)[:, None] @ c_PQ.to(dtype)[task_N]).squeeze(1).view(*h.shape[:-1], -1)
    return y + (u @ b_QO.to(dtype)).to(y.dtype)


def add_product(y: Tensor, u: Tensor, b_QO: Tensor) -> Tensor:
    """Add u B to y in place (no gradient)."""
    if y.dtype == b_QO.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(u.flatten(0, -2), b_QO)
    else:  # an engine or an 8-bit layer that answers in another type
        y.add_((u @ b_QO).to(y.dtype))
    return y


@torch.no_grad()
def delta(a_IP: Tensor, c_PQ: Tensor, b_QO: Tensor) -> Tensor:
    """Return the dense delta W = A C B of one module (input width x output width)."""
    return (a_IP @ c_PQ) @ b_QO

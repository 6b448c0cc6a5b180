"""Causal attention over the examples of a packed row, one after the other, for CPUs.

PyTorch's CPU kernel of `scaled_dot_product_attention` is made for long sequences; in bf16 its backward takes most of
a short example's attention. Here the scores of one example stand in the cache, each product is one `bmm`, heads that
share a key are one matrix, and nothing is padded. The backward makes the probabilities again, so that no more is kept
than queries, keys and values.

    o = softmax(scale q k^T) v,   token i sees tokens j with 0 <= i - j < window

Shape legend: T tokens of the row, S tokens of one example, H heads, K key heads, G = H / K heads of a key, d head
width, R = G S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AttendEach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, mask_SS: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        ctx.save_for_backward(q_HTd, k_KTd, v_KTd, mask_SS)
        ctx.rest = lengths, scale
        out_THd = q_HTd.new_empty(q_HTd.shape[1], q_HTd.shape[0], q_HTd.shape[2])
        heads = k_KTd.shape[0]
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            q_KRd, k_KSd, v_KSd = _rows(q_HTd[:, here], heads), k_KTd[:, here], v_KTd[:, here]
            o_KRd = torch.bmm(_probabilities(q_KRd, k_KSd, mask_SS, scale), v_KSd)
            out_THd[here] = o_KRd.view(q_HTd.shape[0], length, -1).transpose(0, 1)
            start += length
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_HTd, k_KTd, v_KTd, mask_SS = ctx.saved_tensors
        lengths, scale = ctx.rest
        do_HTd = grads[0].transpose(0, 1)
        dq_HTd, dk_KTd, dv_KTd = _like_tokens(q_HTd), _like_tokens(k_KTd), _like_tokens(v_KTd)
        heads = k_KTd.shape[0]
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            q_KRd, k_KSd, v_KSd = _rows(q_HTd[:, here], heads), k_KTd[:, here], v_KTd[:, here]
            do_KRd = _rows(do_HTd[:, here], heads)
            p_KRS = _probabilities(q_KRd, k_KSd, mask_SS, scale)
            dv_KTd[:, here] = torch.bmm(p_KRS.mT, do_KRd)
            dp_KRS = torch.bmm(do_KRd, v_KSd.mT)
            ds_KRS = torch.ops.aten._softmax_backward_data(dp_KRS, p_KRS, -1, p_KRS.dtype).mul_(scale)
            dq_HTd[:, here] = torch.bmm(ds_KRS, k_KSd).view(-1, length, q_HTd.shape[2])
            dk_KTd[:, here] = torch.bmm(ds_KRS.mT, q_KRd)
            start += length
        return dq_HTd, dk_KTd, dv_KTd, None, None, None


def attend_each(
    q_HTd: Tensor, k_KTd: Tensor, v_KTd: Tensor, lengths: Sequence[int], mask_SS: Tensor, scale: float
) -> Tensor:
    """Return causal attention within each example of a packed row, (T, H, d).

    Args:
        q_HTd: queries.
        k_KTd: keys; K divides H, and heads h with the same h // (H / K) share one.
        v_KTd: values.
        lengths: tokens of the examples, in the order of the row.
        mask_SS: from `causal_mask`, for the longest example.
        scale: of the scores.
    """
    return _AttendEach.apply(q_HTd, k_KTd, v_KTd, mask_SS, lengths, scale)  # type: ignore[return-value]


def causal_mask(length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores: 0 where token i sees token j, else minus infinity.

    Args:
        length: S; of a shorter example the leading rows and columns serve.
        window: tokens that each one sees, itself counted; all before it when None.
        dtype: of the scores.
    """
    seen_SS = torch.ones(length, length, dtype=torch.bool).tril_().triu_(1 - (window or length))
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~seen_SS, float("-inf"))


def _rows(x_HSd: Tensor, heads: int) -> Tensor:
    """Return the queries of all heads that share a key as one matrix, (K, R, d)."""
    return x_HSd.reshape(heads, -1, x_HSd.shape[2])


def _like_tokens(x_HTd: Tensor) -> Tensor:
    """Return memory of this shape that is contiguous by token, as the projections before attention want it."""
    return x_HTd.new_empty(x_HTd.shape[1], x_HTd.shape[0], x_HTd.shape[2]).transpose(0, 1)


def _probabilities(q_KRd: Tensor, k_KSd: Tensor, mask_SS: Tensor, scale: float) -> Tensor:
    length = k_KSd.shape[1]
    scores_KRS = torch.bmm(q_KRd, k_KSd.mT).mul_(scale)
    scores_KRS.view(-1, length, length).add_(mask_SS[:length, :length])
    return torch.softmax(scores_KRS, -1)

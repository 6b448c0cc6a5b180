"""Causal attention over the examples of a packed row, one after the other, for CPUs.

PyTorch's CPU kernel of `scaled_dot_product_attention` is made for long sequences; in bf16 its backward takes most of
a short example's attention. Here the scores of one example stand in the cache, each product is one `bmm`, heads that
share a key are one matrix, and nothing is copied to pad it. The backward makes the probabilities again, so that no
more is kept than queries, keys and values.

    o = softmax(scale q k^T) v,   token i sees tokens j with 0 <= i - j < window

The products of an example take in some tokens behind it, so that they are of few sizes (`round_up`). Its own tokens
do not see those behind them, whose outputs are not used and whose gradients are zero.

Shape legend: W tokens of the row, S tokens of one example, rounded up, H heads, K key heads, G = H / K heads of a
key, d head width, R = G S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from metatt_scale.shapes import round_up


class _AttendEach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_HWd: Tensor, k_KWd: Tensor, v_KWd: Tensor, mask_SS: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        ctx.save_for_backward(q_HWd, k_KWd, v_KWd, mask_SS)
        ctx.rest = lengths, scale
        out_WHd = q_HWd.new_empty(q_HWd.shape[1], q_HWd.shape[0], q_HWd.shape[2])
        heads = k_KWd.shape[0]
        for start, end, size in _places(lengths):
            q_HSd, k_KSd, v_KSd = (_part(x, start, size) for x in (q_HWd, k_KWd, v_KWd))
            o_KRd = torch.bmm(_probabilities(_rows(q_HSd, heads), k_KSd, mask_SS, scale), v_KSd)
            out_WHd[start:end] = o_KRd.view(q_HSd.shape)[:, : end - start].transpose(0, 1)
        out_WHd[sum(lengths) :].zero_()
        return out_WHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_HWd, k_KWd, v_KWd, mask_SS = ctx.saved_tensors
        lengths, scale = ctx.rest
        do_HWd = grads[0].transpose(0, 1)
        gradients = _like_tokens(q_HWd), _like_tokens(k_KWd), _like_tokens(v_KWd)
        heads = k_KWd.shape[0]
        for start, end, size in _places(lengths):
            q_HSd, k_KSd, v_KSd = (_part(x, start, size) for x in (q_HWd, k_KWd, v_KWd))
            q_KRd = _rows(q_HSd, heads)
            do_KRd = _rows(F.pad(do_HWd[:, start:end], (0, 0, 0, start + size - end)), heads)
            p_KRS = _probabilities(q_KRd, k_KSd, mask_SS, scale)
            dv_KSd = torch.bmm(p_KRS.mT, do_KRd)
            dp_KRS = torch.bmm(do_KRd, v_KSd.mT)
            ds_KRS = torch.ops.aten._softmax_backward_data(dp_KRS, p_KRS, -1, p_KRS.dtype).mul_(scale)
            dq_HSd, dk_KSd = torch.bmm(ds_KRS, k_KSd).view(q_HSd.shape), torch.bmm(ds_KRS.mT, q_KRd)
            for of_row, of_part in zip(gradients, (dq_HSd, dk_KSd, dv_KSd), strict=True):
                of_row[:, start:end] = of_part[:, : end - start]
        for of_row in gradients:
            of_row[:, sum(lengths) :].zero_()
        return *gradients, None, None, None


def attend_each(
    q_HWd: Tensor, k_KWd: Tensor, v_KWd: Tensor, lengths: Sequence[int], mask_SS: Tensor, scale: float
) -> Tensor:
    """Return causal attention within each example of a packed row, (W, H, d), and zeros behind the last one.

    Args:
        q_HWd: queries.
        k_KWd: keys; K divides H, and heads h with the same h // (H / K) share one.
        v_KWd: values.
        lengths: tokens of the examples, in the order of the row.
        mask_SS: from `causal_mask`, for the longest example, rounded up.
        scale: of the scores.
    """
    return _AttendEach.apply(q_HWd, k_KWd, v_KWd, mask_SS, lengths, scale)  # type: ignore[return-value]


def causal_mask(length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores: 0 where token i sees token j, else minus infinity.

    Args:
        length: S; of a shorter example the leading rows and columns serve.
        window: tokens that each one sees, itself counted; all before it when None.
        dtype: of the scores.
    """
    seen_SS = torch.ones(length, length, dtype=torch.bool).tril_().triu_(1 - (window or length))
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~seen_SS, float("-inf"))


def _places(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield of each example its first token in the row, the token behind its last, and its length rounded up."""
    start = 0
    for length in lengths:
        yield start, start + length, round_up(length)
        start += length


def _part(x_HWd: Tensor, start: int, size: int) -> Tensor:
    """Return this many tokens of the row: a view, or a copy with zeros where the row ends before."""
    part = x_HWd[:, start : start + size]
    missing = size - part.shape[1]
    return F.pad(part, (0, 0, 0, missing)) if missing else part


def _rows(x_HSd: Tensor, heads: int) -> Tensor:
    """Return the queries of all heads that share a key as one matrix, (K, R, d)."""
    return x_HSd.reshape(heads, -1, x_HSd.shape[2])


def _like_tokens(x_HWd: Tensor) -> Tensor:
    """Return memory of this shape that is contiguous by token, as the projections before attention want it."""
    return x_HWd.new_empty(x_HWd.shape[1], x_HWd.shape[0], x_HWd.shape[2]).transpose(0, 1)


def _probabilities(q_KRd: Tensor, k_KSd: Tensor, mask_SS: Tensor, scale: float) -> Tensor:
    length = k_KSd.shape[1]
    scores_KRS = torch.bmm(q_KRd, k_KSd.mT).mul_(scale)
    scores_KRS.view(-1, length, length).add_(mask_SS[:length, :length])
    return torch.softmax(scores_KRS, -1)

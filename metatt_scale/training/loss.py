"""The loss of one micro-batch: a sum over target tokens, whose denominator is the global batch's.

Shape legend: B rows of the batch, S tokens of a row, N = B S, D hidden width, V vocabulary, T target tokens,
P columns before a target of some row, C target tokens of a chunk, K tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from metatt_scale.backbone.attention import packed_arguments
from metatt_scale.data import IGNORE, Batch
from metatt_scale.device import to_device
from metatt_scale.shapes import round_up

CHUNK_BYTES = 1 << 27
"""fp32 logits that exist at once where the output head gives the loss; a narrower copy comes beside them."""


def task_weights(counts_K: np.ndarray, device: torch.device) -> Tensor:
    """Return n / n_k in fp32, (K,), where task k has n_k of the n examples or target tokens of a global batch.

    Losses times these, summed and divided by n, are the sum of the means of the tasks that are in the batch.
    """
    return to_device(torch.from_numpy(counts_K.sum() / np.maximum(counts_K, 1)).float(), device)


def token_loss_sum(
    model: PreTrainedModel, batch: Batch, device: torch.device, weights_K: Tensor | None = None
) -> Tensor:
    """Return the sum of the cross entropy over all target tokens (scalar of at least fp32, nats).

    With `weights_K` each token counts as much as its task's.

    Only positions before a target pass the output head; where it gives the loss (`fuse_head`) no logits are kept.
    Padded batches are padded on the right, so under causal attention no token sees padding and no mask is needed: the
    kernels take their fast causal path. All indices are computed on the host: nothing waits for the device.
    """
    wanted = _wanted(batch)
    arguments: dict[str, Any] = {"input_ids": to_device(batch.input_ids_BS, device), "use_cache": False}
    if batch.lengths is not None:
        arguments |= packed_arguments(model, batch.lengths, batch.input_ids_BS.shape[1], device)
    targets_T, weights_T = to_device(wanted.targets_T, device), None
    if weights_K is not None:
        assert batch.tasks_BS is not None
        tasks_T = batch.tasks_BS.expand(batch.labels_BS.shape).flatten()[wanted.rows_T]
        weights_T = weights_K[to_device(tasks_T, device)]
    head = fused_head(model)
    if head is not None:
        with head.giving_the_loss(to_device(wanted.rows_T, device), targets_T, weights_T):
            return model(**arguments).logits
    columns_P = to_device(wanted.columns_P, device)
    # Positions are named one by one: from a slice of the last ones the output projection would get a strided input,
    # for which it copies its weight once per example.
    logits_BPV = model(**arguments, logits_to_keep=columns_P).logits
    assert logits_BPV.shape[1] == len(columns_P), "the model returned logits for other positions than asked for"
    logits_TV = logits_BPV.flatten(0, 1)[to_device(wanted.rows_in_columns_T, device)]
    wide_TV = logits_TV.to(_at_least_fp32(logits_TV))
    if weights_T is None:
        return F.cross_entropy(wide_TV, targets_T, reduction="sum")
    return (F.cross_entropy(wide_TV, targets_T, reduction="none") * weights_T).sum()


class _Wanted(NamedTuple):
    """Where the targets of a batch are predicted from; on the host."""

    targets_T: Tensor
    rows_T: Tensor
    """Of the (B S) rows of hidden states."""
    columns_P: Tensor
    """Positions that come before a target in some row; one at least."""
    rows_in_columns_T: Tensor
    """Of the (B P) rows that are left when only those columns are kept."""


def _wanted(batch: Batch) -> _Wanted:
    """Position s predicts token s + 1; nothing precedes the first."""
    next_BS = batch.labels_BS[:, 1:]
    is_target_BS = next_BS != IGNORE
    examples_T, positions_T = is_target_BS.nonzero(as_tuple=True)
    columns_P = is_target_BS.any(0).nonzero().squeeze(1)
    if not len(columns_P):
        columns_P = torch.zeros(1, dtype=torch.int64)
    return _Wanted(
        targets_T=next_BS[is_target_BS],
        rows_T=examples_T * batch.labels_BS.shape[1] + positions_T,
        columns_P=columns_P,
        rows_in_columns_T=examples_T * len(columns_P) + torch.searchsorted(columns_P, positions_T),
    )


# ---- an output head that gives the loss


class LossHead:
    """The forward of a frozen output head that returns logits, or inside `giving_the_loss` the sum of the loss.

    It stands in the place of the module's own `forward`, so the hooks of a sharding engine run around it: they gather
    the weight before, and give it back after, which nothing here minds.
    """

    def __init__(self, head: nn.Linear) -> None:
        self._head = head
        self._logits = head.forward
        self._wanted: tuple[Tensor, Tensor, Tensor | None] | None = None

    def __call__(self, hidden_BSD: Tensor) -> Tensor:
        """Return logits (B, S, V) or, when that is asked for, the scalar loss."""
        if self._wanted is None:
            return self._logits(hidden_BSD)
        return loss_of_hidden(hidden_BSD.flatten(0, 1), self._head.weight, self._head.bias, *self._wanted)

    @contextlib.contextmanager
    def giving_the_loss(self, rows_T: Tensor, targets_T: Tensor, weights_T: Tensor | None = None) -> Iterator[None]:
        """Let the forward inside a `with` block return the loss of these rows of hidden states (B S, D)."""
        self._wanted = (rows_T, targets_T, weights_T)
        try:
            yield
        finally:
            self._wanted = None


def fused_head(model: nn.Module) -> LossHead | None:
    """Return the head of a model whose head gives the loss."""
    find = getattr(model, "get_output_embeddings", None)  # which wrappers, DDP for one, do not have
    head = find() if find else None
    forward = None if head is None else vars(head).get("forward")
    return forward if isinstance(forward, LossHead) else None


def fuse_head(model: PreTrainedModel) -> None:
    """Let the output head give the loss.

    Only for a head that `training.start` has seen to be a plain linear, whose logits the model returns as they are.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear) and fused_head(model) is None
    head.forward = LossHead(head)  # type: ignore[method-assign]


def loss_of_hidden(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows_T: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
) -> Tensor:
    """Return sum_t w[t] (log sum_v exp z[t, v] - z[t, targets[t]]) with z = hidden[rows] W^T + bias, a scalar.

    At most CHUNK_BYTES of fp32 logits exist at once (beside them a copy in the type of the weights, where that is
    another), and none are kept: the gradient of the hidden states is computed with them, chunk by chunk, as the
    weights are frozen and it needs nothing but a factor from the backward pass. Logits and their gradient have the
    type of the weights, what is between them is computed in at least fp32.
    """
    return _LossOfHidden.apply(hidden_ND, weight_VD, bias_V, rows_T, targets_T, weights_T)


class _LossOfHidden(torch.autograd.Function):
    """torch.nn.functional.linear_cross_entropy (2.13) would do, but sums the loss in the type of the hidden states: a
    sum over many tokens is off by percents in bf16. On a CPU it also takes 2,100 ms where this takes 37.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows_T: Tensor,
        targets_T: Tensor,
        weights_T: Tensor | None,
    ) -> Tensor:
        wants_gradient, n = ctx.needs_input_grad[0], len(rows_T)
        # Rounded up by repeating row 0, whose loss and gradient are not counted again.
        rest = round_up(n) - n
        rows_R, targets_R = F.pad(rows_T, (0, rest)), F.pad(targets_T, (0, rest))
        weights_R = None if weights_T is None else F.pad(weights_T, (0, rest))
        gradient_RD = hidden_ND.new_empty(n + rest if wants_gradient else 0, hidden_ND.shape[1])
        chunk = chunk_rows(weight_VD.shape[0])
        loss = torch.zeros((), dtype=_at_least_fp32(hidden_ND), device=hidden_ND.device)
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            logits_CV = F.linear(hidden_ND[rows_R[part]], weight_VD, bias_V).to(loss.dtype)
            loss_C, softmax_CV = _loss_and_softmax(logits_CV, targets_R[part])
            loss_C = loss_C[: n - start]
            loss += loss_C.sum() if weights_T is None else loss_C @ weights_T[part].to(loss_C.dtype)
            if wants_gradient:
                softmax_CV.scatter_add_(1, targets_R[part, None], -torch.ones_like(softmax_CV[:, :1]))
                if weights_R is not None:
                    softmax_CV.mul_(weights_R[part, None])
                torch.mm(softmax_CV.to(weight_VD.dtype), weight_VD, out=gradient_RD[part])
            del logits_CV, softmax_CV  # or they would live on while the next chunk's are made
        ctx.save_for_backward(gradient_RD, rows_T)
        ctx.shape = hidden_ND.shape
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient_RD, rows_T = ctx.saved_tensors
        gradient_TD = gradient_RD[: len(rows_T)]
        gradient_ND = gradient_TD.new_zeros(ctx.shape)
        gradient_ND.index_copy_(0, rows_T, (gradient_TD * factor).to(gradient_TD.dtype))
        return gradient_ND, None, None, None, None, None


def chunk_rows(vocabulary: int) -> int:
    """Return how many rows of fp32 logits CHUNK_BYTES hold: C = max(1, CHUNK_BYTES / (4 V))."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _loss_and_softmax(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of every row, (C,), and the softmax in the memory of the logits."""
    of_targets_C1 = logits_CV.gather(1, targets_C[:, None])
    largest_C1 = logits_CV.amax(1, keepdim=True)
    softmax_CV = logits_CV.sub_(largest_C1).exp_()
    sums_C1 = softmax_CV.sum(1, keepdim=True)
    loss_C = (sums_C1.log() + largest_C1 - of_targets_C1).squeeze(1)
    return loss_C, softmax_CV.div_(sums_C1)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

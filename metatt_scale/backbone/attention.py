"""Which attention a model computes with, and attention over examples that are packed into one row.

A packed micro-batch is one row of W tokens: its examples one after the other, T tokens, and what fills the row up.
Everything in a model but attention works on that row as it is. Attention must not reach from one example into
another: flash-attn takes the boundaries as they are, and what fills the row up for further examples; for SDPA the
queries, keys and values are spread over one row per example, in every layer, and its output is gathered again, zero
where the row was filled up. No mask of W x W is ever made.

Shape legend: W tokens of the row, T of examples, B examples, S tokens of the longest example, rounded up, N = B S,
H heads, d head width.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    masking_utils,
    modeling_flash_attention_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from metatt_scale.backbone.cpu_attention import attend_each, causal_mask
from metatt_scale.device import to_device
from metatt_scale.shapes import round_up

PACKED_SDPA = "metatt_packed_sdpa"
"""The name under which transformers finds `packed_sdpa`."""


def pick_attention(wanted: str, device: torch.device, dtype: str) -> str:
    """Return the attention implementation: `auto` is flash-attn where it is installed and the device has it.

    Raises:
        ValueError: flash-attn asked for where it cannot run.
    """
    possible = (
        device.type == "cuda"
        and dtype != "float32"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("flash_attn") is not None
    )
    if wanted == "auto":
        return "flash_attention_2" if possible else "sdpa"
    if wanted == "flash_attention_2" and not possible:
        raise ValueError(
            "backbone.attention is flash_attention_2, which needs the package flash-attn, a CUDA device of compute "
            "capability 8.0 or more and a 16-bit dtype; use `auto` or `sdpa`"
        )
    return wanted


def allow_packing(model: PreTrainedModel) -> str | None:
    """Let a model take packed rows; return why it cannot, or None. What else it computes stays the same.

    That its code passes on what packed rows need is for the caller to try (training/start.py).
    """
    name, attention = type(model).__name__, str(model.config._attn_implementation)
    if attention.startswith("flash_attention") or attention == PACKED_SDPA:
        return None
    if attention != "sdpa":
        return f"backbone.attention is {attention}, which takes one example a row"
    if not model._supports_flash_attn:
        # Kernels of flash-attn take no mask: models for which they serve state the reach of every layer in arguments.
        return f"{name} states its attention in masks only"
    if not model._can_set_attn_implementation():
        return f"{name} does not take its attention from transformers' AttentionInterface"
    model.set_attn_implementation(PACKED_SDPA)
    return None


def forbid_packing(model: PreTrainedModel) -> None:
    """Undo `allow_packing`."""
    if model.config._attn_implementation == PACKED_SDPA:
        model.set_attn_implementation("sdpa")


def packed_arguments(
    model: PreTrainedModel, lengths: Sequence[int], width: int, device: torch.device
) -> dict[str, Any]:
    """Return what a model's forward needs beside `input_ids` for one row of examples with these lengths.

    `position_ids` start at 0 in every example, and stay there in what fills the row up: no position is beyond those
    of the examples, which the model is known to take. flash-attn gets transformers' own arguments for packed rows.
    All of it is computed on the host, so that no layer asks the device for a length.

    Args:
        model: that `allow_packing` has let take packed rows.
        lengths: of the examples.
        width: W, tokens of the row; what is behind the last example fills the row up.
        device: where the model computes.
    """
    rest = width - sum(lengths)
    positions_W = torch.cat([*(torch.arange(length) for length in lengths), torch.zeros(rest, dtype=torch.int64)])
    position_ids = to_device(positions_W[None], device)
    if model.config._attn_implementation != PACKED_SDPA:
        # With the rest of the row: for tokens of no segment flash-attn returns memory that nothing has written.
        longest = max(lengths)
        whole, part = divmod(rest, longest)
        segments = [*lengths, *[longest] * whole, *([part] if part else [])]
        ends = to_device(torch.tensor([0, *segments]).cumsum(0).int(), device)
        ends_and_lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        return {"position_ids": position_ids, **ends_and_lengths, "max_length_q": longest, "max_length_k": longest}
    # Seeing positions that start anew, transformers would make a mask of W x W. A mask of four axes it passes on as
    # it is, and `packed_sdpa` does not look at it.
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    packing = Packing(lengths, width, device)
    return {"position_ids": position_ids, "attention_mask": unused, "packing": packing}


@contextlib.contextmanager
def boundaries_known() -> Iterator[None]:
    """Spare transformers its search for packed examples inside a `with` block, backward passes included.

    It compares positions on the device and reads the answer, once per forward and with flash-attn once per layer, and
    each time the host waits. `packed_arguments` says what is packed; in all other batches each example has a row.
    """
    searches = (
        (masking_utils, "find_packed_sequence_indices"),
        (modeling_flash_attention_utils, "_is_packed_sequence"),
    )
    before = [getattr(module, name) for module, name in searches]
    for module, name in searches:
        setattr(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for (module, name), function in zip(searches, before, strict=True):
            setattr(module, name, function)


def padding_mask(model: PreTrainedModel, attention_mask_BS: Tensor, device: torch.device) -> Tensor:
    """Return an encoder's mask of padded rows, in a form that transformers does not read on the device.

    SDPA takes a mask of four axes as it is; from one of two axes transformers would first read whether it masks.
    """
    if model.config._attn_implementation == "sdpa":
        return to_device(attention_mask_BS[:, None, None, :].bool(), device)
    return to_device(attention_mask_BS, device)


class Packing:
    """Where the tokens of a packed row stand when every example has a row of its own; for all layers of a batch."""

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        """Compute the indices on the host and send them to `device`."""
        self.lengths, self.width = tuple(lengths), width
        self.examples, longest = len(lengths), max(lengths)
        self._equal = all(length == longest for length in lengths)
        self.longest = longest if self._equal else round_up(longest)
        self._windows: dict[int, Tensor] = {}
        self._added: dict[tuple[int | None, torch.dtype], Tensor] = {}
        if not self._equal:
            lengths_B1 = torch.tensor(lengths)[:, None]
            starts_B1 = lengths_B1.cumsum(0) - lengths_B1
            steps_S = torch.arange(self.longest)
            # Padding repeats an example's last token, which is finite; no token sees what follows it.
            rows_BS = starts_B1 + torch.minimum(steps_S, lengths_B1 - 1)
            places_T = (steps_S < lengths_B1).flatten().nonzero().squeeze(1)
            self._rows_N = to_device(rows_BS.flatten(), device)
            self._places_T = to_device(places_T, device)

    def spread(self, x_1HWd: Tensor) -> Tensor:
        """Return (B, H, S, d), every example in a row of its own; a view where all are of one length."""
        x_WHd = x_1HWd.transpose(1, 2).flatten(0, 1)
        if self._equal:
            x_NHd = x_WHd[: self.examples * self.longest]
        else:
            x_NHd = _Spread.apply(x_WHd, self._rows_N, self._places_T)
        return x_NHd.unflatten(0, (self.examples, self.longest)).transpose(1, 2)

    def gather(self, x_BSHd: Tensor) -> Tensor:
        """Return (1, W, H, d), padding left out, and zeros where the row is filled up."""
        x_NHd = x_BSHd.flatten(0, 1)
        if self._equal:
            rest = self.width - len(x_NHd)
            return (nn.functional.pad(x_NHd, (0, 0, 0, 0, 0, rest)) if rest else x_NHd)[None]
        return _Gather.apply(x_NHd, self._places_T, self.width)[None]

    def window(self, reach: int | None, device: torch.device) -> Tensor | None:
        """Return the (1, 1, S, S) mask of causal attention to the last `reach` tokens; None where all are seen."""
        if reach is None or reach >= self.longest:
            return None
        if reach not in self._windows:
            steps_S = torch.arange(self.longest, device=device)
            distance_SS = steps_S[:, None] - steps_S
            self._windows[reach] = ((distance_SS >= 0) & (distance_SS < reach))[None, None]
        return self._windows[reach]

    def added_mask(self, reach: int | None, dtype: torch.dtype) -> Tensor:
        """Return the (S, S) mask for `attend_each`, made once per batch."""
        if (reach, dtype) not in self._added:
            self._added[reach, dtype] = causal_mask(round_up(self.longest), reach, dtype)
        return self._added[reach, dtype]


_SHORT = 512
"""Examples up to this length attend one by one on a CPU: measured 2 to 2.6 times as fast as SDPA in bf16 at lengths
128 to 512, and slower than it in fp32 (docs/performance.md)."""


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute what transformers' `sdpa` does; of a packed row every example on its own.

    Args:
        module: the layer's attention.
        query: (B, H, S, d), or (1, H, W, d) of a packed row.
        key: the same, perhaps of fewer heads.
        value: the same as `key`.
        attention_mask: of rows that are not packed.
        dropout: part of the probabilities that is dropped.
        scaling: of the scores, 1 / sqrt(d) when None.
        packing: the examples of a packed row.
        sliding_window: how many tokens each one sees, itself counted; all before it when None.
        is_causal: of rows that are not packed; examples of a packed row always are.
        options: what else transformers passes on.

    Returns:
        (B, S, H, d), or (1, W, H, d); and no weights.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    return _attend_packed(module, query, key, value, packing, dropout, scaling, sliding_window, options), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    options: dict[str, Any],
) -> Tensor:
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and packing.longest <= _SHORT and not dropout:
        scale = scaling or query.shape[-1] ** -0.5
        mask = packing.added_mask(sliding_window, query.dtype)
        return attend_each(query[0], key[0], value[0], packing.lengths, mask, scale)[None]
    query, key, value = packing.spread(query), packing.spread(key), packing.spread(value)
    mask = packing.window(sliding_window, query.device)
    out_BSHd, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=True, **options)
    return packing.gather(out_BSHd)


_attend_packed: Callable[..., Tensor] = cast(Any, torch.compiler.disable)(_attend)
"""Lengths differ from batch to batch: a compiled layer would be compiled for each."""


class _Spread(torch.autograd.Function):
    """Rows of a packed row's tokens, padding filled with repetitions.

    The backward only picks, where that of `index_select` would add with atomics: what the repetitions get is exactly
    zero, as no token's output depends on them. So does what fills the row up, which is not picked.
    """

    @staticmethod
    def forward(ctx: Any, x_WHd: Tensor, rows_N: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        ctx.width = x_WHd.shape[0]
        return x_WHd.index_select(0, rows_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHd: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (places_T,) = ctx.saved_tensors
        return _picked(gradient_NHd, places_T, ctx.width), None, None


class _Gather(torch.autograd.Function):
    """The tokens of a packed row out of the padded rows of its examples; padding gets a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x_NHd: Tensor, places_T: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(places_T)
        ctx.rows = x_NHd.shape[0]
        return _picked(x_NHd, places_T, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_WHd: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (places_T,) = ctx.saved_tensors
        gradient_NHd = gradient_WHd.new_zeros(ctx.rows, *gradient_WHd.shape[1:])
        return gradient_NHd.index_copy_(0, places_T, gradient_WHd[: len(places_T)]), None, None


def _picked(x_NHd: Tensor, places_T: Tensor, width: int) -> Tensor:
    """Return (W, H, d): the rows at these places, then zeros."""
    x_WHd = x_NHd.new_empty(width, *x_NHd.shape[1:])
    torch.index_select(x_NHd, 0, places_T, out=x_WHd[: len(places_T)])
    x_WHd[len(places_T) :].zero_()
    return x_WHd


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)

"""What is tried on the model before the first step: may examples be packed, may the output head give the loss.

Shape legend: S tokens of the two trial examples together, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.backbone.attention import allow_packing, boundaries_known, forbid_packing, packed_arguments
from metatt_scale.shapes import round_up
from metatt_scale.training.loss import fuse_head, fused_head

_FIRST, _SECOND = 8, 5
"""Lengths of the trial examples: different ones, so that shorter rows are filled up."""
_MOST_LEAK = 0.3
"""How far the second example may be from what it is alone, as a part of how far it is when it sees the first.
Rounding is at most 0.12 of that (in int8, whose rows share their outliers), a wrong mask or position about 1."""
_REFUSED = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)


def make_ready(model: PreTrainedModel, packing: bool | str, device: torch.device, console: Console) -> bool:
    """Let the head give the loss where it can, and return whether examples are packed. All ranks call this together.

    Args:
        model: with or without the chain in it, whole or sharded.
        packing: `training.packing`.
        device: where it computes.
        console: told why examples are padded though `packing` is auto.

    Raises:
        ValueError: `packing` is true and the model cannot take packed examples.
    """
    try_head(model, device)
    if packing is False:
        return False
    reason = allow_packing(model) or _why_packing_fails(model, device)
    if reason is None:
        return True
    forbid_packing(model)
    if packing is True:
        raise ValueError(
            f"training.packing is true, but {reason}; set training.packing: auto (examples are padded then), or "
            "backbone.attention: auto"
        )
    console.print(f"examples are padded, not packed: {reason}", highlight=False, soft_wrap=True)
    return False


def try_head(model: PreTrainedModel, device: torch.device) -> None:
    """Let the output head give the loss, if it is a plain linear whose output the model returns untouched.

    Scaled and capped logits (Gemma 2, Granite, Cohere) do not pass: the model is given arbitrary numbers for its
    head's output and must return them to the bit.
    """
    head = model.get_output_embeddings()
    # Packed linears, and heads with a chain behind them, have a forward of their own.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or fused_head(model):
        return
    if head.weight.requires_grad:
        return
    ids_BS = _trial_ids(model)[None, :2].to(device)
    numbers_BSV = 50 * torch.randn(1, 2, head.out_features, generator=torch.Generator().manual_seed(0))
    numbers_BSV = numbers_BSV.to(device, head.weight.dtype)
    with _trial(model), _seeing_hidden_states(model, numbers_BSV) as seen:
        logits = model(input_ids=ids_BS, use_cache=False).logits
    untouched = logits.shape == numbers_BSV.shape and torch.equal(logits.to(numbers_BSV.dtype), numbers_BSV)
    if len(seen) == 1 and untouched:
        fuse_head(model)


def _why_packing_fails(model: PreTrainedModel, device: torch.device) -> str | None:
    """Compare an example behind another in a packed row with itself alone, and with itself in one long example.

    The row is filled up, as rows are: what fills it up must stay finite, or its zero gradients would not.
    """
    name, ids_S = type(model).__name__, _trial_ids(model)
    apart_BS = torch.stack([ids_S, ids_S.roll(-_FIRST)]).to(device)  # one long example; the second example first
    row_S = nn.functional.pad(ids_S, (0, round_up(len(ids_S)) - len(ids_S)))
    try:
        packed = packed_arguments(model, (_FIRST, _SECOND), len(row_S), device)
        with _trial(model), _seeing_hidden_states(model) as seen:
            model(input_ids=apart_BS, use_cache=False)
            model(input_ids=row_S[None].to(device), use_cache=False, **packed)
        (apart_BSD, packed_BSD) = (hidden.double() for hidden in seen)
    except _REFUSED as error:
        return f"{name} does not take packed examples ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    alone, leaking = apart_BSD[1, :_SECOND], apart_BSD[0, _FIRST:]
    got = packed_BSD[0, _FIRST : _FIRST + _SECOND]
    if not bool(packed_BSD.isfinite().all()):
        return f"{name} gives numbers that are not finite for the tokens that fill a packed row up"
    if not bool((got - alone).norm() <= _MOST_LEAK * (leaking - alone).norm()):
        return f"{name} lets packed examples see each other, or counts their positions on"
    return None


def _trial_ids(model: PreTrainedModel) -> Tensor:
    """Return different tokens for two examples, (_FIRST + _SECOND,)."""
    rows = model.config.get_text_config().vocab_size
    return torch.arange(_FIRST + _SECOND) * max(1, rows // 16) % rows


@contextlib.contextmanager
def _trial(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside a `with` block."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad(), boundaries_known():  # as in training
            yield
    finally:
        model.train(before)


@contextlib.contextmanager
def _seeing_hidden_states(model: PreTrainedModel, instead: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Collect what the output head is given; it returns `instead`, or (to spare V values a token) its input."""
    head: Any = model.get_output_embeddings()
    seen: list[Tensor] = []
    before = vars(head).get("forward")

    def forward(hidden_BSD: Tensor) -> Tensor:
        seen.append(hidden_BSD)
        return hidden_BSD if instead is None else instead

    head.forward = forward
    try:
        yield seen
    finally:
        del head.forward
        if before is not None:
            head.forward = before

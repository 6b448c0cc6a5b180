"""What a model has embeddings for: so many positions, so many tokens. More of either is an index out of range."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return for how many positions a model has embeddings; None where it computes them (rotary)."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"wpe$|position", path):
            # RoBERTa's first position is the one behind that of padding.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return model.config.get_text_config().max_position_embeddings - before
    return None


def check_positions(model: PreTrainedModel, length: int, what: str, remedy: str) -> None:
    """Refuse a sequence that is longer than the positions that a model has learned.

    Args:
        model: any model.
        length: tokens of the sequence.
        what: what has this length, as the subject of the message.
        remedy: what to do; `{positions}` in it stands for their number.

    Raises:
        ValueError: it is longer.
    """
    positions = learned_positions(model)
    if positions is not None and length > positions:
        raise ValueError(
            f"{what}, but {type(model).__name__} has learned {positions} positions; "
            f"{remedy.format(positions=positions)}"
        )


def check_tokens(model: PreTrainedModel, largest: int) -> None:
    """Refuse a token that a model has no embedding for.

    Args:
        model: any model.
        largest: the largest token id there is.

    Raises:
        ValueError: it is one too large.
    """
    embeddings = model.get_input_embeddings()
    # Not the rows of its weight, which may be sharded.
    rows = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else model.config.vocab_size
    if largest >= rows:
        raise ValueError(
            f"the tokenizer gives token {largest}, but {type(model).__name__} has embeddings for {rows} tokens only; "
            "the tokenizer beside backbone.path belongs to another model"
        )

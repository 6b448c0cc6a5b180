"""Sentences and pairs of them to tokens, each record with a class or a number instead of tokens to predict.

Shape letters: T tokens of all examples, E examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from metatt_scale.data.records import Record
from metatt_scale.data.tokens import CHUNK, Progress, TokenTable, check_fast
from metatt_scale.recipe import DataRecipe

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast


def tokenize_sentences(
    records: Sequence[tuple[Record, str]],
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    classes: int,
    progress: Progress | None = None,
) -> tuple[TokenTable, dict[str, int]]:
    """Tokenise the fields `recipe.text_fields` with the tokenizer's special tokens around and between them.

    With 1 for `classes` labels are numbers.

    What is beyond `cutoff_length` is cut off the end of the longer sentence, so that every special token stays.

    Returns the table and its counts: `examples`, `truncated`, `dropped` (always 0), `tokens` and `targets`, which are
    the examples.

    Raises:
        ValueError: the tokenizer is a slow one, or all numbers are -1.
    """
    check_fast(tokenizer)
    labels = [record[recipe.label_field] for record, _ in records]
    if classes == 1:
        _check_numbers(labels, recipe.label_field)
    tokens, segments, truncated = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], 0
    for start in range(0, len(records), CHUNK):
        encoded = _encode([record for record, _ in records[start : start + CHUNK]], recipe, tokenizer)
        tokens += [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        segments += [np.asarray(ids, np.uint8) for ids in encoded["token_type_ids"]]
        truncated += sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
        if progress is not None:
            progress(min(start + CHUNK, len(records)), len(records))
    flat = np.concatenate(tokens)
    table = TokenTable(
        tokens=flat,
        flags=np.zeros(len(flat), np.uint8),
        offsets=np.cumsum([len(ids) for ids in tokens], dtype=np.int64),
        segments=np.concatenate(segments),
        classes=np.array(labels, np.int32) if classes > 1 else None,
        values=np.array(labels, np.float32) if classes == 1 else None,
    )
    counts = {"examples": len(table), "truncated": truncated, "dropped": 0}
    return table, {**counts, "tokens": len(flat), "targets": len(table)}


def _check_numbers(labels: Sequence[float], field: str) -> None:
    # One -1 may be meant; nothing but -1 teaches nothing.
    if labels and all(label == -1 for label in labels):
        raise ValueError(
            f"all {len(labels)} records have -1 in field {field!r}, which marks records without a label, as in "
            "GLUE's test splits; name a split that has them"
        )


def _encode(records: Sequence[Record], recipe: DataRecipe, tokenizer: PreTrainedTokenizerFast) -> BatchEncoding:
    texts = [[record[field] for record in records] for field in recipe.text_fields]
    return tokenizer(
        text=texts[0],
        text_pair=texts[1] if len(texts) == 2 else None,
        truncation="longest_first",
        max_length=recipe.cutoff_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=True,
        verbose=False,
    )

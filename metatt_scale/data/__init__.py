"""Records to tokens to batches: resumable, and the same global order for any number of ranks."""

from metatt_scale.data.batches import (
    IGNORE,
    Batch,
    BatchOrder,
    Mixture,
    collate,
    micro_batches,
    pack,
    split,
    target_count,
)
from metatt_scale.data.cache import tokenize_source
from metatt_scale.data.prepare import PreparedData, ValidationData, prepare
from metatt_scale.data.templates import llm_adapters_prompt, plain_prompt
from metatt_scale.data.tokens import TokenTable, concatenate

__all__ = [
    "IGNORE",
    "Batch",
    "BatchOrder",
    "Mixture",
    "PreparedData",
    "TokenTable",
    "ValidationData",
    "collate",
    "concatenate",
    "llm_adapters_prompt",
    "micro_batches",
    "pack",
    "plain_prompt",
    "prepare",
    "split",
    "target_count",
    "tokenize_source",
]

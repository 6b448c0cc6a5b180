"""The frozen model: where it comes from, how it is stored, how it computes."""

from metatt_scale.backbone.attention import pick_attention
from metatt_scale.backbone.head import HeadStart, head_tensors, in_head, last_linear
from metatt_scale.backbone.identify import check_unchanged, identity, identity_by_ends, is_other
from metatt_scale.backbone.loading import (
    enable_checkpointing,
    load_backbone,
    load_skeleton,
)
from metatt_scale.backbone.quantised import quantised_linear
from metatt_scale.backbone.room import check_positions, check_tokens, learned_positions
from metatt_scale.backbone.source import Source, resolve
from metatt_scale.backbone.tokenizer import byte_tokenizer, load_tokenizer
from metatt_scale.backbone.units import Engine, compile_layers, find_units

__all__ = [
    "Engine",
    "HeadStart",
    "Source",
    "byte_tokenizer",
    "check_positions",
    "check_tokens",
    "check_unchanged",
    "compile_layers",
    "enable_checkpointing",
    "find_units",
    "head_tensors",
    "identity",
    "identity_by_ends",
    "in_head",
    "is_other",
    "last_linear",
    "learned_positions",
    "load_backbone",
    "load_skeleton",
    "load_tokenizer",
    "pick_attention",
    "quantised_linear",
    "resolve",
]

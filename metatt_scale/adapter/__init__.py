"""Adapters beside a frozen model: what they have in common, the chain, targets, merging, the LoRA form, files."""

from metatt_scale.adapter.base import Adapter, LoraPair
from metatt_scale.adapter.chain import AdaptedLinear, ChainAdapter
from metatt_scale.adapter.grow import grown_cores
from metatt_scale.adapter.head import HeadLinear, train_head
from metatt_scale.adapter.inject import chain_spec, compute_dtype, head_dim_of, inject
from metatt_scale.adapter.linear import LinearAdapter
from metatt_scale.adapter.lora_form import peft_config, peft_state
from metatt_scale.adapter.merge import merge, plain_linear, unmerge
from metatt_scale.adapter.modes import ChainSpec, full_cores
from metatt_scale.adapter.saved import (
    adapter_folder,
    check_fit,
    fill,
    load_adapter,
    put_head,
    read_adapter,
    read_description,
    read_head,
    read_targets,
    save_adapter,
    set_head,
    trained_head,
)
from metatt_scale.adapter.size import norm_in_use
from metatt_scale.adapter.targets import Target, TargetMap, find_targets

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "ChainAdapter",
    "ChainSpec",
    "HeadLinear",
    "LinearAdapter",
    "LoraPair",
    "Target",
    "TargetMap",
    "adapter_folder",
    "chain_spec",
    "check_fit",
    "compute_dtype",
    "fill",
    "find_targets",
    "full_cores",
    "grown_cores",
    "head_dim_of",
    "inject",
    "load_adapter",
    "merge",
    "norm_in_use",
    "peft_config",
    "peft_state",
    "plain_linear",
    "put_head",
    "read_adapter",
    "read_description",
    "read_head",
    "read_targets",
    "save_adapter",
    "set_head",
    "train_head",
    "trained_head",
    "unmerge",
]

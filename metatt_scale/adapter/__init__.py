"""The chain beside a frozen model: modes, targets, the owner of the cores, injection, merging, the LoRA form."""

from metatt_scale.adapter.base import Adapter
from metatt_scale.adapter.chain import AdaptedLinear, ChainAdapter
from metatt_scale.adapter.inject import attach, chain_spec, head_dim_of, inject
from metatt_scale.adapter.lora_form import lora_pairs, peft_config, peft_state
from metatt_scale.adapter.merge import merge, plain_linear, unmerge
from metatt_scale.adapter.modes import ChainSpec, full_cores
from metatt_scale.adapter.saved import load_adapter, read_adapter, read_description, read_head, save_adapter
from metatt_scale.adapter.size import norm_in_use
from metatt_scale.adapter.targets import Target, TargetMap, find_targets

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "ChainAdapter",
    "ChainSpec",
    "Target",
    "TargetMap",
    "attach",
    "chain_spec",
    "find_targets",
    "full_cores",
    "head_dim_of",
    "inject",
    "load_adapter",
    "lora_pairs",
    "merge",
    "norm_in_use",
    "peft_config",
    "peft_state",
    "plain_linear",
    "read_adapter",
    "read_description",
    "read_head",
    "save_adapter",
    "unmerge",
]

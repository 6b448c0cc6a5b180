"""The chain as exact LoRA factors, one pair per module.

    lora_A = (A C)^T  (r x d_in)        lora_B = B^T  (d_out x r)        scaling alpha

With A = G1, C = G2[l] G3[m], B = G4 each slice of the chain has rank at most r, the bond left of B: the LoRA
form is the same matrix, not an approximation, and everything that serves LoRA serves the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metatt_scale.adapter.chain import ChainAdapter
from metatt_scale.adapter.folding import factors_at
from metatt_scale.adapter.modes import factors


class LoraPair(NamedTuple):
    """LoRA factors of one module; the delta of the weight is scaling * lora_B @ lora_A."""

    path: str
    lora_A: Tensor
    lora_B: Tensor


@torch.no_grad()
def lora_pairs(adapter: ChainAdapter) -> list[LoraPair]:
    """Return the exact LoRA factors of every adapted module, in the cores' dtype, alpha left out.

    Raises:
        ValueError: the chain has a core for tasks, and none is chosen.
    """
    pairs = []
    unscaled = factors(adapter.spec, [core.detach() for core in adapter.cores], task=adapter.one_task())
    for target in adapter.targets:
        a_IP, c_PQ, b_QO = factors_at(unscaled, target)
        lora_A = (a_IP @ c_PQ).mT.contiguous()
        pairs.append(LoraPair(target.path, lora_A, b_QO.mT.clone(memory_format=torch.contiguous_format)))
    return pairs


def peft_config(adapter: ChainAdapter, base_model: str, head: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return PEFT's adapter_config.json for these factors (lora_alpha = alpha r, since PEFT divides by r).

    Args:
        adapter: the chain.
        base_model: where PEFT's users find the backbone.
        head: tensors of a classifier's head by name, whose modules PEFT replaces by those of the folder.
    """
    # PEFT has no task type for masked language models, and its wrapper for causal ones fails on them.
    causal = not adapter.targets[0].path.startswith(("bert.", "roberta."))
    rank = adapter.spec.lora_rank
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM" if causal else None,
        "modules_to_save": sorted({_head_module(name) for name in head}) if head else None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": adapter.alpha * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(target.path for target in adapter.targets),
        "fan_in_fan_out": any(target.transposed for target in adapter.targets),
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
    }


def _head_module(name: str) -> str:
    """Return the path of the module of the head that a parameter belongs to: the pooler, or what stands on top."""
    before, pooler, _ = name.rpartition("pooler.")
    return before + "pooler" if pooler else name.partition(".")[0]


def peft_state(adapter: ChainAdapter, head: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors of PEFT's adapter_model.safetensors, those of a classifier's head among them."""
    state = {f"base_model.model.{name}": value for name, value in (head or {}).items()}
    for path, lora_A, lora_B in lora_pairs(adapter):
        state[f"base_model.model.{path}.lora_A.weight"] = lora_A
        state[f"base_model.model.{path}.lora_B.weight"] = lora_B
    return state

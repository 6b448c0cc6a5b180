"""The chain as exact LoRA factors, one pair per module.

    lora_A = (A C)^T  (r x d_in)        lora_B = B^T  (d_out x r)        scaling alpha

With A = G1, C = G2[l] G3[m], B = G4 each slice of the chain has rank at most r, the bond left of B: the LoRA
form is the same matrix, not an approximation, and everything that serves LoRA serves the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metatt_scale.adapter.chain import ChainAdapter
from metatt_scale.adapter.folding import factors_at
from metatt_scale.adapter.modes import factors
from metatt_scale.adapter.targets import Target


class LoraPair(NamedTuple):
    """LoRA factors of one module; the delta of the weight is scaling * lora_B @ lora_A."""

    path: str
    lora_A: Tensor
    lora_B: Tensor


@torch.no_grad()
def lora_pairs(adapter: ChainAdapter) -> list[LoraPair]:
    """Return the exact LoRA factors of every adapted module, in the cores' dtype, alpha left out."""
    pairs = []
    unscaled = factors(adapter.spec, [core.detach() for core in adapter.cores])
    for target in adapter.targets:
        a_IP, c_PQ, b_QO = factors_at(unscaled, target)
        lora_A = (a_IP @ c_PQ).mT.contiguous()
        pairs.append(LoraPair(target.path, lora_A, b_QO.mT.clone(memory_format=torch.contiguous_format)))
    return pairs


def peft_config(adapter: ChainAdapter, base_model: str) -> dict[str, Any]:
    """Return PEFT's adapter_config.json for these factors (lora_alpha = alpha r, since PEFT divides by r)."""
    rank = adapter.spec.lora_rank
    return lora_config(adapter.targets, base_model, rank, adapter.alpha * rank)


def lora_config(targets: Sequence[Target], base_model: str, rank: int, lora_alpha: float) -> dict[str, Any]:
    """Return PEFT's adapter_config.json for LoRA behind these modules."""
    # PEFT has no task type for masked language models, and its wrapper for causal ones fails on them.
    causal = not targets[0].path.startswith(("bert.", "roberta."))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(target.path for target in targets),
        "fan_in_fan_out": any(target.transposed for target in targets),
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
    }


def peft_state(adapter: ChainAdapter) -> dict[str, Tensor]:
    """Return the tensors of PEFT's adapter_model.safetensors."""
    return state_of(lora_pairs(adapter))


def state_of(pairs: Sequence[LoraPair]) -> dict[str, Tensor]:
    """Return pairs of factors by the names that PEFT's adapter_model.safetensors gives them."""
    state = {}
    for path, lora_A, lora_B in pairs:
        state[f"base_model.model.{path}.lora_A.weight"] = lora_A
        state[f"base_model.model.{path}.lora_B.weight"] = lora_B
    return state

"""An adapter's exact LoRA factors (`Adapter.lora_pairs`) in the files of PEFT.

    lora_A = (A C)^T  (r x d_in)        lora_B = B^T  (d_out x r)        scaling alpha

Of a chain, with A = G1, C = G2[l] G3[m], B = G4, each slice has rank at most r, the bond left of B: the LoRA form is
the same matrix, not an approximation, and everything that serves LoRA serves the adapter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metatt_scale.adapter.base import Adapter


def peft_config(adapter: Adapter, base_model: str) -> dict[str, Any]:
    """Return PEFT's adapter_config.json for these factors (lora_alpha = alpha r, since PEFT divides by r)."""
    # PEFT has no task type for masked language models, and its wrapper for causal ones fails on them.
    causal = not adapter.targets[0].path.startswith(("bert.", "roberta."))
    rank = adapter.lora_pairs()[0].lora_A.shape[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
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


def peft_state(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of PEFT's adapter_model.safetensors."""
    state = {}
    for path, lora_A, lora_B in adapter.lora_pairs():
        state[f"base_model.model.{path}.lora_A.weight"] = lora_A
        state[f"base_model.model.{path}.lora_B.weight"] = lora_B
    return state

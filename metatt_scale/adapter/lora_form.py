"""An adapter's exact LoRA factors (`Adapter.lora_pairs`) in the files of PEFT.

    lora_A = (A C)^T  (r x d_in)        lora_B = B^T  (d_out x r)        scaling alpha

Of a chain, with A = G1, C = G2[l] G3[m], B = G4, each slice has rank at most r, the bond left of B: the LoRA form is
the same matrix, not an approximation, and everything that serves LoRA serves the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metatt_scale.adapter.base import Adapter


def peft_config(adapter: Adapter, base_model: str, head: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Return PEFT's adapter_config.json for these factors (lora_alpha = alpha r, since PEFT divides by r).

    Args:
        adapter: one that has a LoRA form, or one of its own in PEFT.
        base_model: where PEFT's users find the backbone.
        head: tensors of a classifier's head by name, where the adapter has one; PEFT takes their modules from the
            folder.
    """
    # PEFT has no task type for masked language models, and its wrapper for causal ones fails on them.
    causal = not adapter.targets[0].path.startswith(("bert.", "roberta."))
    own = adapter.own_peft_form()
    return {
        **(own[0] if own is not None else _lora_settings(adapter)),
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM" if causal else None,
        "modules_to_save": sorted({_head_module(name) for name in head}) if head else None,
        "base_model_name_or_path": base_model,
        "target_modules": sorted(target.path for target in adapter.targets),
        "fan_in_fan_out": any(target.transposed for target in adapter.targets),
        "bias": "none",
        "inference_mode": True,
    }


def _lora_settings(adapter: Adapter) -> dict[str, Any]:
    rank = adapter.lora_pairs()[0].lora_A.shape[0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": adapter.alpha * rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
    }


def _head_module(name: str) -> str:
    """Return the path of the module of the head that a parameter belongs to: the pooler, or what stands on top."""
    before, pooler, _ = name.rpartition("pooler.")
    return before + "pooler" if pooler else name.partition(".")[0]


def peft_state(adapter: Adapter, head: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the tensors of PEFT's adapter_model.safetensors, those of a classifier's head among them."""
    state = {f"base_model.model.{name}": value for name, value in (head or {}).items()}
    own = adapter.own_peft_form()
    if own is not None:
        return state | own[1]
    for path, lora_A, lora_B in adapter.lora_pairs():
        state[f"base_model.model.{path}.lora_A.weight"] = lora_A
        state[f"base_model.model.{path}.lora_B.weight"] = lora_B
    return state

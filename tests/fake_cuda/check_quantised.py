"""Chains on a quantised backbone through the real `train` on the fake device, and again from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.nn
import pytest
from bitsandbytes.nn import modules
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from metatt_scale.recipe import validate
from tests.fake_cuda.fixtures import RARELY, STEPS, check_queue, resume_on_gpu, run_on_gpu
from tests.toy import LLAMA, toy, write_toy

BITSANDBYTES_OWN = modules.Params4bit
KINDS = {
    "nf4": {"quantization": "nf4"},
    "nf4, scales unpacked": {"quantization": "nf4", "double_quantization": False},
    "nf4, checkpointing": {"quantization": "nf4", "gradient_checkpointing": True},
    "fp4": {"quantization": "fp4"},
}


def parameter_4bit(data: Tensor, requires_grad: bool = False, **attributes: Any) -> nn.Parameter:
    """Return a packed weight; of a fake tensor, bitsandbytes' class makes a subclass that dispatches nowhere."""
    if not isinstance(data, FakeTensor):
        return BITSANDBYTES_OWN(data, requires_grad=requires_grad, **attributes)
    weight = nn.Parameter(data, requires_grad=False)
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


@pytest.mark.parametrize("name", KINDS)
def test_a_quantised_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(bitsandbytes.nn, "Params4bit", parameter_4bit)
    write_toy(tmp_path, config={**LLAMA, "hidden_size": 64, "intermediate_size": 128})
    backbone = {"dtype": "bfloat16", **KINDS[name]}
    recipe = validate(toy(tmp_path, backbone=backbone, training=STEPS, logging=RARELY), "toy")
    check_queue(run_on_gpu(recipe))
    check_queue(resume_on_gpu(recipe))

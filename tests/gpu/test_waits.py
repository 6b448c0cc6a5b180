"""The host queues a step without waiting for the device, and reads its numbers once, later.

A GPU alone has a queue that can run dry: on a CPU every operation is done when its call returns.
"""

import importlib.util

import pytest
import torch

from tests.gpu.small import recipe_for, trainer_for
from tests.gpu.waits import count_waits, no_waits
from tests.toy import one_step, toy_classifier

BFLOAT16 = {"dtype": "bfloat16", "attention": "sdpa"}
STEPS = {
    "packed": {"backbone": BFLOAT16},
    "padded": {"backbone": BFLOAT16, "training": {"packing": False}},
    "float16": {"backbone": {**BFLOAT16, "dtype": "float16"}},
    "recomputed": {"backbone": {**BFLOAT16, "gradient_checkpointing": True}},
    "tasks": {"backbone": BFLOAT16, "adapter": {"kind": "metatt_4p1d"}},
    "5d": {"backbone": BFLOAT16, "adapter": {"kind": "metatt_5d"}},
    "lora": {"backbone": BFLOAT16, "adapter": {"kind": "lora"}},
    "nf4": {"backbone": {**BFLOAT16, "quantization": "nf4"}},
    "flash, packed": {"backbone": {**BFLOAT16, "attention": "flash_attention_2"}},
    "flash, padded": {
        "backbone": {**BFLOAT16, "attention": "flash_attention_2"},
        "training": {"packing": False},
    },
}
NEEDS = {"nf4": "bitsandbytes", "flash, packed": "flash_attn", "flash, padded": "flash_attn"}


def step_without_waits(recipe, device):
    trainer = trainer_for(recipe, device)
    for _ in range(2):  # libraries set themselves up, folds and masks are made for the first time
        one_step(trainer)
    with no_waits(device):
        trainer._launch()
        trainer._launch()
    for _ in range(2):
        assert trainer._settle()[1]["loss"] is not None


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing(name, device, tmp_path):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    step_without_waits(recipe_for(tmp_path, device, **STEPS[name]), device)


def test_a_step_of_an_encoder_waits_for_nothing(device, tmp_path):
    step_without_waits(toy_classifier(tmp_path), device)


def test_waits_are_seen(device):
    """Without this the other tests would pass on a PyTorch that reports nothing."""
    if device.type != "cuda":
        pytest.skip("a CPU has no queue to wait for")
    value = torch.ones(3, device=device)
    assert count_waits(lambda: (value.sum().item(), value.cpu()), device) == 2
    assert count_waits(lambda: value.to("cpu", non_blocking=True), device) == 0
    for wait in (value.sum().item, value.tolist, value.nonzero, lambda: torch.ones(3).to(device)):
        with pytest.raises(RuntimeError, match="synchroniz"), no_waits(device):
            wait()

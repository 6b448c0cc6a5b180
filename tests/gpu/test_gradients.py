"""Loss and gradients of a step on the device, against the same step on the CPU.

A GPU alone has the kernels: matrix products, attention (memory-efficient, flash), gathers of packed rows, the fused
loss. What the step should compute is proved on the CPU against an explicit dense delta (tests/model).
"""

import importlib.util

import pytest
import torch

from tests.gpu.small import distances, first_gradient, recipe_for
from tests.tiny import FLOAT32
from tests.toy import CPU, toy_classifier

CHAINS = ["metatt_4d", "metatt_5d", "metatt_4p1d", "lorta", "lotr"]
PACKED = pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])


def compare(recipe, device):
    far = distances(first_gradient(recipe, device), first_gradient(recipe, CPU))
    assert max(far.values()) < FLOAT32


@PACKED
@pytest.mark.parametrize("kind", CHAINS)
def test_chains(kind, packing, device, tmp_path):
    compare(recipe_for(tmp_path, device, adapter={"kind": kind}, training={"packing": packing}), device)


@PACKED
def test_recomputed_layers(packing, device, tmp_path):
    """A layer that is recomputed folds and projects its input again."""
    recipe = recipe_for(tmp_path, device, backbone={"gradient_checkpointing": True}, training={"packing": packing})
    compare(recipe, device)


def test_eager_attention(device, tmp_path):
    """Its softmax and mask are kernels of their own; it takes padded rows only."""
    compare(recipe_for(tmp_path, device, backbone={"attention": "eager"}), device)


def test_lora(device, tmp_path):
    """PEFT's layers, which compute beside the frozen linears."""
    compare(recipe_for(tmp_path, device, adapter={"kind": "lora"}), device)


def test_an_encoder_that_classifies(device, tmp_path):
    """Its attention reads a mask, both ways."""
    compare(toy_classifier(tmp_path), device)


# ---- 16 bits


def errors(recipe, exact, device):
    """Root mean square, over loss and parameters, of the distance to the gradient in float32."""
    far = torch.tensor(list(distances(first_gradient(recipe, device), exact).values()))
    return float(far.square().mean().sqrt())


def in_bfloat16(folder, device, packing, **backbone):
    backbone = {"dtype": "bfloat16", **backbone}
    return recipe_for(folder, device, backbone=backbone, training={"packing": packing})


def in_float32(folder, device, packing):
    return first_gradient(recipe_for(folder, device, training={"packing": packing}), CPU)


@PACKED
def test_bfloat16(packing, device, tmp_path):
    """The distance to float32 is that of bfloat16 itself: at most twice that of the same step on the CPU.

    Both round the same weights and activations to 8 bits, and sum in float32 or better.
    """
    exact = in_float32(tmp_path, device, packing)
    recipe = in_bfloat16(tmp_path, device, packing, attention="sdpa")
    assert errors(recipe, exact, device) < 2 * errors(recipe, exact, CPU) < 1


@PACKED
def test_flash_attention(packing, device, tmp_path):
    """flash-attn is as near to float32 as SDPA is in the same 16 bits, to a factor of two."""
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    exact = in_float32(tmp_path, device, packing)
    flash, sdpa = (in_bfloat16(tmp_path, device, packing, attention=a) for a in ("flash_attention_2", "sdpa"))
    assert errors(flash, exact, device) < 2 * errors(sdpa, exact, device) < 1

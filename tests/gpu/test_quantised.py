"""4-bit weights on the device, against the weights that they stand for.

A GPU alone has these kernels: bitsandbytes packs, unpacks and multiplies by code of its own on every kind of device,
and on a GPU by several, chosen by type and number of rows.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

import metatt_scale.backbone.quantised as quantised_module
from metatt_scale.adapter.merge import dequantised_weight
from metatt_scale.backbone import quantised_linear
from tests.gpu.small import distances, gradient_of, recipe_for, trainer_for
from tests.quantised import recipe_of
from tests.tiny import FLOAT32, relative
from tests.toy import CPU

TYPES = [torch.float32, torch.bfloat16, torch.float16]
DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])


def shape_for(device):
    """Inputs and outputs: on Hopper up to 512 rows of these go through a kernel that unpacks as it multiplies."""
    return (64, 128) if device.type == "cpu" else (512, 1408)


def linear_of(device, dtype, double=True, storage="bfloat16", shape=None):
    """A packed linear, the weight it stands for on the host in float64, and the weight it was made of."""
    shape = shape or shape_for(device)
    torch.manual_seed(0)
    linear = nn.Linear(*shape, bias=False, dtype=dtype).requires_grad_(False)
    recipe = recipe_of("nf4", double_quantization=double, quant_storage=storage)
    packed = quantised_linear(linear, recipe, device)
    return packed, dequantised_weight(packed).to(CPU, torch.float64), linear.weight


@DOUBLE
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 64, 300, 2000])
def test_forward_and_gradient_of_the_input(rows, dtype, double, device):
    """In float32 to its rounding; in 16 bits at most twice as far as a plain linear with the unpacked weight is."""
    packed, weight_OI, _ = linear_of(device, dtype, double)
    generator = torch.Generator().manual_seed(rows)
    x_NI, dy_NO = (torch.randn(rows, size, generator=generator).to(dtype) for size in weight_OI.mT.shape)
    expected = [x_NI.double() @ weight_OI.mT, dy_NO.double() @ weight_OI]

    def run(layer):
        x = x_NI.to(device, copy=True).requires_grad_()
        y = layer(x)
        y.backward(dy_NO.to(device))
        return [y.detach().to(CPU, torch.float64), x.grad.to(CPU, torch.float64)]

    ours = [relative(got, exact) for got, exact in zip(run(packed), expected, strict=True)]
    with torch.no_grad():  # evaluation and generation go another way
        ours.append(relative(packed(x_NI.to(device)).to(CPU, torch.float64), expected[0]))
    weight = weight_OI.to(device, dtype)
    plain = [relative(got, exact) for got, exact in zip(run(lambda x: F.linear(x, weight)), expected, strict=True)]
    print("relative errors:", *(f"{error:.1e}" for error in ours), "| plain:", *(f"{error:.1e}" for error in plain))
    bounds = [FLOAT32] * 3 if dtype == torch.float32 else [2 * plain[0], 2 * plain[1], 2 * plain[0]]
    assert all(error < bound for error, bound in zip(ours, bounds, strict=True))


@DOUBLE
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_bits_are_those_of_bitsandbytes_own_layer(dtype, double, device):
    """Few rows and many take different kernels."""
    from bitsandbytes.nn.modules import Linear4bit

    packed, weight_OI, _ = linear_of(device, dtype, double)
    for rows in (1, 64, 2000):
        x_NI = torch.randn(rows, weight_OI.shape[1]).to(device, dtype).requires_grad_()
        found = []
        for forward in (packed, lambda x: Linear4bit.forward(packed, x)):
            y_NO = forward(x_NI)
            found.append((y_NO, *torch.autograd.grad(y_NO.square().sum(), x_NI)))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs), rows


@DOUBLE
def test_packed_weights_are_those_of_a_cpu(double, device):
    """But for ties: a weight between two levels may be rounded to either."""
    _, weight, original = linear_of(device, torch.float32, double)
    _, on_cpu, same = linear_of(CPU, torch.float32, double, shape=shape_for(device))
    assert torch.equal(original, same)
    error, between = relative(weight, original.double()), relative(weight, on_cpu)
    print(f"relative distance to the weights {error:.1e}, to those that a CPU packs {between:.1e}")
    assert 1e-2 < error < 0.15 and between < 1e-2


@DOUBLE
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_packing_in_pieces_changes_no_bit(storage, double, device, monkeypatch):
    """Against bitsandbytes' own packing of the whole weight; pieces here do not even divide it."""
    from bitsandbytes.nn.modules import Params4bit

    monkeypatch.setattr(quantised_module, "_PIECE", 3 * 1024)
    ours, _, weight = linear_of(device, torch.float32, double, storage)
    settings: Any = {"quant_type": "nf4", "compress_statistics": double, "quant_storage": getattr(torch, storage)}
    whole: Any = Params4bit(weight.data, **settings).to(device)
    assert torch.equal(ours.weight.data.view(torch.uint8), whole.data.view(torch.uint8))
    state, expected = (packed.quant_state.as_dict() for packed in (ours.weight, whole))
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value, name


# ---- whole steps


def trainers(folder, device, dtype, checkpointing):
    """On packed weights; and on a CPU on the weights that these stand for, in float32 and in the same type."""
    from bitsandbytes.nn.modules import Linear4bit

    backbone = {"gradient_checkpointing": checkpointing}
    packed = trainer_for(
        recipe_for(folder, device, backbone={**backbone, "dtype": dtype, "quantization": "nf4"}), device
    )
    unpacked = []
    for plain_dtype in ("float32", dtype):
        plain = trainer_for(recipe_for(folder, device, backbone={**backbone, "dtype": plain_dtype}), CPU)
        for path, module in packed.model.named_modules():
            if isinstance(module, Linear4bit):
                weight = plain.model.get_submodule(path).weight
                weight.data = dequantised_weight(module).to(CPU, weight.dtype)
        unpacked.append(plain)
    return packed, *unpacked


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_step_in_float32(checkpointing, device, tmp_path):
    packed, plain, _ = trainers(tmp_path, device, "float32", checkpointing)
    assert max(distances(gradient_of(packed), gradient_of(plain)).values()) < FLOAT32


def test_a_step_in_bfloat16(device, tmp_path):
    """At most twice as far from float32 as the unpacked weights in bfloat16 are (root mean square)."""
    packed, exact, plain = map(gradient_of, trainers(tmp_path, device, "bfloat16", False))
    ours, theirs = (torch.tensor(list(distances(found, exact).values())) for found in (packed, plain))
    assert float(ours.square().mean()) < 4 * float(theirs.square().mean()) < 1

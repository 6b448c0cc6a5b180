"""The 4-bit linear of ours beside bitsandbytes' own, bit for bit; and what it keeps from forward to backward."""

import itertools
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from metatt_scale.backbone import quantised_linear
from tests.quantised import recipe_of
from tests.toy import CPU

pytestmark = pytest.mark.usefixtures("quiet_bitsandbytes")
SHAPES = [(5, 64), (2, 3, 64), (1, 1, 64), (0, 64), (2, 0, 64)]


def packed(*, quantization="nf4", double=True, bias=False, dtype=torch.float32, storage="float32") -> Any:
    torch.manual_seed(0)
    linear = nn.Linear(64, 128, bias=bias, dtype=dtype).requires_grad_(False)
    recipe = recipe_of(quantization, double_quantization=double, quant_storage=storage)
    return quantised_linear(linear, recipe, CPU)


def answers(forward, x):
    """The output for x, its type and where it stands in memory, and the gradient of x."""
    x = x.clone().requires_grad_()
    y = forward(x)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (gradient,) = torch.autograd.grad(y, x, direction)
    return y.detach(), gradient


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_output_and_gradient_are_those_of_bitsandbytes(shape, dtype):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for quantization, double, bias, storage in itertools.product(
        ("nf4", "fp4"), (True, False), (True, False), ("uint8", "bfloat16")
    ):
        layer = packed(quantization=quantization, double=double, bias=bias, dtype=dtype, storage=storage)
        wanted = answers(lambda x, layer=layer: Linear4bit.forward(layer, x), x)
        assert_same(answers(layer, x), wanted)
        assert not x.numel() or bool(wanted[1].any())
        with torch.no_grad():
            assert torch.equal(layer(x), wanted[0])


def test_an_input_of_another_type_is_computed_in_the_layers_own():
    layer, x = packed(dtype=torch.bfloat16, bias=True), torch.randn(3, 64)
    assert_same(answers(layer, x), answers(lambda x: Linear4bit.forward(layer, x), x))
    assert layer(x.requires_grad_()).dtype == torch.float32


def test_a_weight_that_lost_its_quant_state():
    """FSDP2 puts plain parameters in the place of bitsandbytes'."""
    layer, x = packed(), torch.randn(3, 64)
    wanted = answers(layer, x)
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert_same(answers(layer, x), wanted)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_released_weight_is_freed_and_read_again_in_the_backward(bias, recompute):
    """ZeRO-3 releases a parameter by giving it an empty tensor, and gathers it into a new one."""
    layer, x = packed(bias=bias), torch.randn(3, 64)
    output, gradient = answers(layer, x)
    whole, gathered = layer.weight.data.clone(), StorageWeakRef(layer.weight.untyped_storage())
    x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    layer.weight.data = torch.empty(0)
    assert gathered.expired()
    layer.weight.data = whole
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    assert torch.equal(y, output) and torch.equal(x.grad, gradient)


class Products(TorchDispatchMode):
    """Counts the products with packed weights."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.bitsandbytes.gemm_4bit.default
        return func(*args, **(kwargs or {}))


def test_recomputing_does_not_repeat_the_last_product():
    """A layer is recomputed up to the last tensor it saved, and its last packed product saves none."""
    first, last = packed(), packed()

    def layer(x):
        return last(torch.sigmoid(first(x)[..., :64]))

    x = torch.randn(3, 64, requires_grad=True)
    with Products() as products:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert products.count == 3

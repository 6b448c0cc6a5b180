"""The fused arithmetic beside the plain one: the order of the products, sharing, leaves, autocast, compilation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metatt_scale.adapter import inject, operator
from metatt_scale.adapter.folding import folding_pays
from metatt_scale.adapter.targets import Target
from metatt_scale.backbone import enable_checkpointing
from metatt_scale.recipe import AdapterRecipe
from tests.tiny import FLOAT32, FLOAT64, randomise, tiny_model, tokens
from tests.toy import CPU

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(arithmetic, *, dtype=torch.float64, targets=LINEARS, checkpointing=False, rank=3):
    model = tiny_model("llama", dtype=dtype)
    if checkpointing:
        enable_checkpointing(model)
    recipe = AdapterRecipe(
        rank=rank, target_modules=targets, operator="reference" if arithmetic == "reference" else "fused"
    )
    adapter = inject(model, recipe, 0, CPU)
    if dtype == torch.float64:
        adapter.double()
    randomise(adapter)
    adapter.room, adapter.rows_per_step = (1 << 40, 1 << 20) if arithmetic == "folded" else (0, None)
    assert adapter.folds_into_b == (arithmetic == "folded")
    return model.train(), adapter


def run(model, adapter, times=1):
    """Logits, and the gradients of the cores after some micro-batches."""
    found = [model(tokens(seed=seed)).logits for seed in range(times)]
    for logits in found:
        logits.float().pow(2).sum().backward()
    adapter.pull_back()
    gradients = [core.grad for core in adapter.cores]
    adapter.zero_grad()
    return [*(logits.detach() for logits in found), *gradients]


def distance(found, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arithmetic", ["thin", "folded"])
def test_fused_is_the_reference(arithmetic, checkpointing):
    found = run(*adapted(arithmetic, checkpointing=checkpointing), times=2)
    assert distance(found, run(*adapted("reference", checkpointing=checkpointing), times=2)) < FLOAT64


class Products(TorchDispatchMode):
    """Counts matrix products by their inner and outer sizes."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.shapes.append((left.shape[0], left.shape[1], right.shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arithmetic", ["thin", "folded"])
def test_each_distinct_input_is_projected_once(arithmetic, checkpointing):
    model, adapter = adapted(arithmetic, checkpointing=checkpointing, rank=5)
    n, (d, f), layers = tokens().numel(), (model.config.hidden_size, model.config.intermediate_size), 3
    with Products() as products:
        run(model, adapter)
    again = 2 if checkpointing else 1
    forward = [shape for shape in products.shapes if shape[0] == n and shape[2] == 5 and shape[1] in (d, f)]
    assert len([s for s in forward if s[1] == f]) >= layers * again
    wide = [shape for shape in products.shapes if shape == (d, n, 5)]  # x^T dh: q/k/v, o and gate/up of each layer
    assert len(wide) == 3 * layers
    assert [shape for shape in products.shapes if shape == (f, n, 5)] == [(f, n, 5)] * layers


def test_leaves_own_no_memory_and_gradients_arrive_in_full_precision():
    model, adapter = adapted("folded", dtype=torch.bfloat16)
    model(tokens()).logits.float().sum().backward()
    leaves = [leaf for _, leaf in adapter._fold.pairs]
    assert sum(leaf.untyped_storage().nbytes() for leaf in leaves) <= 4 * len(leaves)
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)
    adapter.pull_back()
    assert {core.grad.dtype for core in adapter.cores} == {torch.float32}


def brute_force(p, q, targets, rows):
    thin = sum(rows * (2 * p * q + q * t.d_out) + rows * (2 * p * q + 2 * q * t.d_out) for t in targets)
    folded = sum(rows * p * t.d_out * 3 + 3 * p * q * t.d_out for t in targets)
    return folded < thin


@pytest.mark.parametrize("bonds", [(16, 16), (64, 64), (8, 64), (64, 8)])
@pytest.mark.parametrize("rows", [16, 300, 1000, 4000, 100_000])
def test_the_order_with_fewer_multiplications_is_taken(bonds, rows):
    p, q = bonds
    targets = [Target(path=str(o), layer=0, projection=0, d_in=576, d_out=o) for o in (576, 192)]
    assert folding_pays(bonds, targets, rows, 1 << 40, 2) == brute_force(p, q, targets, rows)
    assert not folding_pays(bonds, targets, rows, p * 768 * 2 - 1, 2), "no room"


@pytest.mark.parametrize("tasks", [[[0, 0, 3, 1, 1], [2, 2, 2, 3, 0]], [[3], [1]]], ids=["rows", "examples"])
def test_each_row_meets_the_middle_product_of_its_task(tasks):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    c = torch.randn(4, 3, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    tasks = torch.tensor(tasks)
    found = operator.mix_by_task(h, c, c.detach(), tasks)
    of_rows = tasks.expand(2, 5).flatten()
    expected = torch.stack([row @ c[t] for row, t in zip(h.flatten(0, 1), of_rows, strict=True)]).view(2, 5, 6)
    assert torch.allclose(found, expected, rtol=FLOAT64, atol=FLOAT64)
    direction = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad((u * direction).sum(), (h, c), retain_graph=True) for u in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("arithmetic", ["thin", "folded"])
def test_autocast_loses_no_more_than_the_reference(arithmetic):
    exact = run(*adapted("reference", dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(*adapted("reference", dtype=torch.float32))
        found = run(*adapted(arithmetic, dtype=torch.float32))
    assert 0 < distance(found, exact) < 1.5 * distance(plain, exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.parametrize("arithmetic", ["thin", "folded"])
def test_layers_compile_without_a_break(arithmetic):
    model, adapter = adapted(arithmetic, dtype=torch.float32)
    expected = run(model, adapter)
    torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    assert distance(run(model, adapter), expected) < FLOAT32
    with torch.no_grad():
        for core in adapter.cores:
            core.mul_(1.1)  # an optimizer step: new operands, no new compilation
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(model, adapter)

"""The other members of the chain's family: tasks, LoTR, LoRTA, each against its definition; and what they count."""

import copy

import pytest
import torch
from torch.func import functional_call

from metatt_scale.adapter import inject, merge
from metatt_scale.adapter.modes import factors
from metatt_scale.backbone import enable_checkpointing
from metatt_scale.recipe import AdapterRecipe
from tests.tiny import FLOAT64, tiny_model, tokens
from tests.toy import CPU

TARGETS = ("q_proj", "k_proj", "down_proj")


def pair(kind, n_tasks=0, rank=4, **settings):
    """A frozen model, and the same with an adapter of random values in it, in float64."""
    plain = tiny_model("llama", dtype=torch.float64)
    adapted = copy.deepcopy(plain)
    recipe = AdapterRecipe(kind=kind, rank=rank, alpha=1.7, target_modules=TARGETS, **settings)
    adapter = inject(adapted, recipe, 0, CPU, n_tasks).double()
    generator = torch.Generator().manual_seed(1)
    values = [0.5 * torch.randn(core.shape, generator=generator, dtype=core.dtype) for core in adapter.cores]
    adapter.set_cores(values)
    return plain, adapted, adapter


def dense_run(plain, adapter, deltas, ids):
    """Logits with every target's weight W + delta; narrower modules use the leading rows and columns."""
    weights = {}
    for target, delta_IO in zip(adapter.targets, deltas, strict=True):
        weight = plain.get_submodule(target.path).weight
        weights[f"{target.path}.weight"] = weight + adapter.alpha * delta_IO[: target.d_in, : target.d_out].mT
    return functional_call(plain, weights, (ids,), {}).logits


def lotr(adapter, cores):
    """Delta[l, m] = A S[l, m] B (Bershatsky et al. 2024)."""
    a_DR, s_RSR, b_RD = cores[0][0], cores[1], cores[2][..., 0]
    n_projections = len(adapter.target_map.projections)
    return [a_DR @ s_RSR[:, t.layer * n_projections + t.projection] @ b_RD for t in adapter.targets]


def lorta(adapter, cores):
    """Delta[i, l, m, h, j] = sum_k A[i, k] C_L[l, k] C_M[m, k] C_H[h, k] B[j, k] (Hounie et al. 2024)."""
    a_IK, b_JK = cores[0][0], cores[4][..., 0].mT
    layer_KL, projection_KM, head_KH = cores[1:4]
    term = "ik,k,k,kh,jk->ihj"
    return [
        torch.einsum(term, a_IK, layer_KL[:, t.layer], projection_KM[:, t.projection], head_KH, b_JK).flatten(1)
        for t in adapter.targets
    ]


@pytest.mark.parametrize("kind, definition", [("lotr", lotr), ("lorta", lorta)])
@pytest.mark.parametrize("arithmetic", ["thin", "folded", "reference"])
def test_lotr_and_lorta_are_their_definitions(kind, definition, arithmetic):
    plain, adapted, adapter = pair(kind)
    adapter.reference = arithmetic == "reference"
    adapter.room, adapter.rows_per_step = (1 << 40, 1 << 20) if arithmetic == "folded" else (0, None)
    assert adapter.folds_into_b == (arithmetic == "folded")
    ids = tokens()
    logits = adapted(ids).logits
    logits.square().sum().backward()
    adapter.pull_back()
    cores = [core.detach().clone().requires_grad_() for core in adapter.cores]
    expected = dense_run(plain, adapter, definition(adapter, cores), ids)
    expected.square().sum().backward()
    assert (expected - plain(ids).logits).norm() > 0.01 * expected.norm()
    assert (logits - expected).norm() < FLOAT64 * expected.norm()
    for core, reference in zip(adapter.cores, cores, strict=True):
        assert (core.grad - reference.grad).norm() < FLOAT64 * reference.grad.norm()


@pytest.mark.parametrize("kind", ["lotr", "lorta"])
def test_they_start_at_the_frozen_model_and_learn_from_there(kind):
    plain = tiny_model("llama", dtype=torch.float64)
    adapted = copy.deepcopy(plain)
    adapter = inject(adapted, AdapterRecipe(kind=kind, rank=4, target_modules=TARGETS), 0, CPU).double()
    logits = adapted(tokens()).logits
    assert torch.equal(logits, plain(tokens()).logits)
    logits.square().sum().backward()
    adapter.pull_back()
    assert sum(float(core.grad.norm()) > 0 for core in adapter.cores if core.grad is not None) == 1


# ---- tasks

KINDS_WITH_TASKS = {
    "metatt_4p1d": [None, ("input", "task", "layer", "projection", "output"), ("output", "task", "layer", "input")],
    "metatt_5p1d": [None, ("input", "layer", "projection", "task", "head", "output")],
}
TASKS = torch.tensor([2, 0, 1, 2, 2])


def task_cases():
    orders = [(kind, order) for kind, choices in KINDS_WITH_TASKS.items() for order in choices]
    full = {"metatt_4p1d": ("output", "projection", "task", "layer", "input")}
    return [(kind, order if order is None or len(order) > 4 else full[kind]) for kind, order in orders]


def of_task(adapter, cores, task):
    """The deltas of one task, slice by slice along the chain."""
    deltas = []
    for target in adapter.targets:
        place = {"layer": target.layer, "projection": target.projection, "task": task}
        block, free = None, []
        for mode, core_PNQ in zip(adapter.spec.modes, cores, strict=True):
            if mode in place:
                core_PNQ = core_PNQ[:, place[mode], None]
            else:
                free.append(mode)
            block = core_PNQ if block is None else torch.tensordot(block, core_PNQ, 1)
        sizes = [adapter.spec.sizes[adapter.spec.modes.index(mode)] for mode in free]
        wanted = [mode for mode in ("input", "head", "output") if mode in free]
        assert block is not None
        deltas.append(block.reshape(sizes).permute([free.index(mode) for mode in wanted]).flatten(1))
    return deltas


@pytest.mark.parametrize("kind, order", task_cases())
@pytest.mark.parametrize("arithmetic", ["fused", "reference"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_mixed_batch_is_its_examples_one_task_at_a_time(kind, order, arithmetic, checkpointing, per_token):
    plain, adapted, adapter = pair(kind, n_tasks=3, mode_order=order)
    adapter.reference = arithmetic == "reference"
    if checkpointing:
        enable_checkpointing(adapted)
    ids = tokens(batch=5)
    adapter.row_tasks = TASKS[:, None].expand_as(ids) if per_token else TASKS[:, None]
    logits = adapted(ids).logits
    logits.square().sum().backward()
    adapter.pull_back()

    cores = [core.detach().clone().requires_grad_() for core in adapter.cores]
    apart = []
    for task in range(3):
        rows = TASKS == task
        apart.append((rows, dense_run(plain, adapter, of_task(adapter, cores, task), ids[rows])))
    torch.stack([expected.square().sum() for _, expected in apart]).sum().backward()
    for rows, expected in apart:
        assert (logits[rows] - expected).norm() < FLOAT64 * expected.norm()
    assert (apart[0][1] - dense_run(plain, adapter, of_task(adapter, cores, 1), ids[TASKS == 0])).norm() > 0.01
    for core, reference in zip(adapter.cores, cores, strict=True):
        assert (core.grad - reference.grad).norm() < FLOAT64 * reference.grad.norm()


def test_packed_examples_carry_their_tasks_token_by_token():
    _, adapted, adapter = pair("metatt_4p1d", n_tasks=3)
    adapter.row_tasks = torch.tensor([[0] * 6 + [2] * 5])
    mixed = adapted(tokens(batch=1)).logits
    adapter.row_tasks = torch.zeros(1, 1, dtype=torch.int64)
    alone = adapted(tokens(batch=1)).logits
    assert torch.allclose(mixed[:, :6], alone[:, :6], rtol=1e-9) and not torch.allclose(mixed[:, 6:], alone[:, 6:])


@pytest.mark.parametrize("kind", KINDS_WITH_TASKS)
def test_one_task_by_itself(kind):
    """A chosen task computes like a chain without a task core, merges, and has a LoRA form of its own."""
    plain, adapted, adapter = pair(kind, n_tasks=3)
    ids = tokens()
    expected = dense_run(plain, adapter, of_task(adapter, list(adapter.cores), 2), ids)
    adapter.task = 2
    for room, folded in ((0, False), (1 << 40, True)):
        adapter.room, adapter.rows_per_step = room, 1 << 20
        assert adapter.folds_into_b == folded
        assert (adapted(ids).logits - expected).norm() < FLOAT64 * expected.norm()
    deltas = of_task(adapter, [core.detach() for core in adapter.cores], 2)
    for found, delta_IO, target in zip(adapter.lora_pairs(), deltas, adapter.targets, strict=True):
        wanted = delta_IO[: target.d_in, : target.d_out]
        assert ((found.lora_B @ found.lora_A).mT - wanted).norm() < FLOAT64 * wanted.norm()
    merge(adapter)
    assert (adapted(ids).logits - expected).norm() < FLOAT64 * expected.norm()


def test_without_a_task_it_says_so():
    _, adapted, adapter = pair("metatt_4p1d", n_tasks=3)
    for act in (lambda: adapted(tokens()), lambda: merge(adapter), lambda: adapter.lora_pairs()):
        with pytest.raises(ValueError, match=r"several tasks.*--task"):
            act()
    with pytest.raises(ValueError, match="no `tasks`"):
        inject(tiny_model("llama"), AdapterRecipe(kind="metatt_4p1d"), 0, CPU)
    with pytest.raises(ValueError, match="task mode must stand between"):
        pair("metatt_4p1d", n_tasks=3, mode_order=("task", "input", "layer", "projection", "output"))


def test_all_factors_of_a_task_are_those_of_the_chain_for_it():
    _, _, adapter = pair("metatt_4p1d", n_tasks=3)
    cores = [core.detach() for core in adapter.cores]
    every, third = factors(adapter.spec, cores, 2.0), factors(adapter.spec, cores, 2.0, task=2)
    assert torch.equal(every.c_LMPQ[:, :, 2], third.c_LMPQ) and torch.equal(every.b_LMQO, third.b_LMQO)

"""Adapted models against an explicit dense delta, on a tiny random model of every supported class."""

import copy
import math

import pytest
import torch
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from metatt_scale.adapter import inject, merge, unmerge
from metatt_scale.backbone import enable_checkpointing
from metatt_scale.recipe import AdapterRecipe
from tests.tiny import FLOAT64, MODELS, randomise, tiny_model, tokens
from tests.toy import CPU

ORDERS_4D = [
    ("input", "layer", "projection", "output"),
    ("input", "projection", "layer", "output"),
    ("layer", "input", "projection", "output"),
    ("layer", "projection", "input", "output"),
    ("input", "output", "layer", "projection"),
    ("output", "layer", "input", "projection"),
    ("output", "projection", "layer", "input"),
]
ORDERS_5D = [
    ("input", "layer", "projection", "head", "output"),
    ("input", "head", "layer", "projection", "output"),
    ("input", "layer", "projection", "output", "head"),
    ("layer", "input", "head", "output", "projection"),
    ("output", "head", "projection", "layer", "input"),
]


def dense_delta(adapter, target, cores):
    """The delta of one module, entry by entry of the definition: a product of core slices along the chain."""
    modes = adapter.spec.modes
    result = None  # (left bond 1, free modes in chain order..., bond)
    free = []
    for mode, core in zip(modes, cores, strict=True):
        if mode == "layer":
            core = core[:, target.layer : target.layer + 1]
        elif mode == "projection":
            core = core[:, target.projection : target.projection + 1]
        else:
            free.append(mode)
        result = core if result is None else torch.tensordot(result, core, 1)
    assert result is not None
    result = result.reshape([adapter.spec.sizes[modes.index(mode)] for mode in free])
    wanted = ["input", "head", "output"] if "head" in free else ["input", "output"]
    result = result.permute([free.index(mode) for mode in wanted])
    return adapter.alpha * result.flatten(1)[: target.d_in, : target.d_out]


def run_dense(plain, adapter, cores, ids):
    """Logits of the plain model with every target's weight replaced by W + delta."""
    weights = {}
    for target in adapter.targets:
        module = plain.get_submodule(target.path)
        delta = dense_delta(adapter, target, cores)
        weights[f"{target.path}.weight"] = module.weight + (delta if isinstance(module, Conv1D) else delta.mT)
    return functional_call(plain, weights, (ids,), {}).logits


def choose(adapter, arithmetic):
    """Have the adapter compute `thin` (h C first), `folded` (C into B) or by the `reference`."""
    adapter.reference = arithmetic == "reference"
    adapter.room, adapter.rows_per_step = (1 << 40, 1 << 20) if arithmetic == "folded" else (0, None)
    assert adapter.folds_into_b == (arithmetic == "folded")


def compare(name, recipe, *, seed=1, arithmetic="folded"):
    """Return relative errors (logits, core gradients) of the adapted model against the dense one, in float64."""
    plain = tiny_model(name, dtype=torch.float64)
    adapted = copy.deepcopy(plain)
    adapter = inject(adapted, recipe, 0, CPU).double()
    randomise(adapter, seed)
    choose(adapter, arithmetic)
    ids = tokens()
    direction = torch.randn((*ids.shape, 97), dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    logits = adapted(ids).logits
    (logits * direction).sum().backward()
    adapter.pull_back()

    cores = [core.detach().clone().requires_grad_() for core in adapter.cores]
    expected = run_dense(plain, adapter, cores, ids)
    gradients = torch.autograd.grad((expected * direction).sum(), cores)
    frozen = plain(ids).logits
    assert (expected - frozen).norm() > 1e-2 * frozen.norm(), "the adapter must matter for this test to mean anything"
    errors = [((logits - expected).norm() / expected.norm()).item()]
    for core, gradient in zip(adapter.cores, gradients, strict=True):
        assert core.grad is not None and gradient.norm() > 0
        errors.append(((core.grad - gradient).norm() / gradient.norm()).item())
    assert all(p.grad is None and not p.requires_grad for p in adapted.parameters())
    return errors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", [2, 3], ids=["paper_targets", "other_targets"])
@pytest.mark.parametrize("kind", ["metatt_4d", "metatt_5d"])
@pytest.mark.parametrize("arithmetic", ["thin", "folded", "reference"])
def test_forward_and_gradients_equal_the_dense_delta(name, which, kind, arithmetic):
    recipe = AdapterRecipe(kind=kind, rank=5, alpha=1.7, target_modules=tuple(MODELS[name][which]))
    assert max(compare(name, recipe, arithmetic=arithmetic)) < FLOAT64


@pytest.mark.parametrize("kind, order", [("metatt_4d", o) for o in ORDERS_4D] + [("metatt_5d", o) for o in ORDERS_5D])
@pytest.mark.parametrize("arithmetic", ["thin", "folded"])
def test_every_order_of_modes(kind, order, arithmetic):
    ranks = (2, 3, 4) if kind == "metatt_4d" else (2, 3, 4, 5)
    if order.index("output") < order.index("input"):
        ranks = ranks[::-1]  # rising from the input on, or folding would not pay
    recipe = AdapterRecipe(kind=kind, rank=ranks, target_modules=("q_proj", "k_proj", "down_proj"), mode_order=order)
    assert max(compare("llama", recipe, arithmetic=arithmetic)) < FLOAT64


def test_input_between_head_and_output_is_refused():
    order = ("layer", "head", "input", "projection", "output")
    recipe = AdapterRecipe(kind="metatt_5d", mode_order=order)
    with pytest.raises(ValueError, match="may not stand between head and output"):
        inject(tiny_model("llama"), recipe, 0, CPU)
    with pytest.raises(ValueError, match="exactly once"):
        inject(tiny_model("llama"), AdapterRecipe(mode_order=("input", "layer", "output")), 0, CPU)


@pytest.mark.parametrize("name", MODELS)
def test_start_is_the_frozen_model_and_disable_restores_it(name):
    model = tiny_model(name)
    ids = tokens()
    before = model(ids).logits.detach()
    adapter = inject(model, AdapterRecipe(target_modules=tuple(MODELS[name][2])), 0, CPU)
    assert torch.equal(model(ids).logits, before)
    randomise(adapter)
    assert not torch.allclose(model(ids).logits, before)
    with adapter.disabled():
        assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(model(ids).logits, before)


def test_the_cores_have_one_owner_and_the_backbone_never_sees_them():
    model = tiny_model("llama")
    before = dict(model.named_parameters())
    adapter = inject(model, AdapterRecipe(target_modules=("q_proj", "v_proj")), 0, CPU)
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    assert len(adapter.linears) == 6 and all(linear.adapter is adapter for linear in adapter.linears)
    core_ids = {id(core) for core in adapter.cores}
    assert core_ids.isdisjoint(id(p) for p in model.parameters())
    assert [p for p in model.parameters() if p.requires_grad] == []
    assert sum(core.numel() for core in adapter.cores) == adapter.spec.n_parameters


def test_gradients_accumulate_over_micro_batches_and_reach_the_cores_once():
    model = tiny_model("llama", dtype=torch.float64)
    adapter = inject(model, AdapterRecipe(rank=4), 0, CPU).double()
    randomise(adapter)
    ids = tokens(batch=4)
    model(ids).logits.square().sum().backward()
    adapter.pull_back()
    whole = [core.grad.clone() for core in adapter.cores]
    for core in adapter.cores:
        core.grad = None
    for half in ids.split(2):
        model(half).logits.square().sum().backward()
        assert all(core.grad is None for core in adapter.cores)
    adapter.pull_back()
    for core, expected in zip(adapter.cores, whole, strict=True):
        assert (core.grad - expected).norm() < FLOAT64 * expected.norm()


@pytest.mark.parametrize("reentry", [False, True], ids=["plain", "checkpointing"])
def test_optimizer_steps_are_seen_by_the_next_forward(reentry):
    model = tiny_model("llama", dtype=torch.float64)
    if reentry:
        enable_checkpointing(model)
    adapter = inject(model, AdapterRecipe(rank=4), 0, CPU).double()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    ids = tokens()
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        adapter.pull_back()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama", dtype=torch.float64)
        if checkpointing:
            enable_checkpointing(model)
        adapter = inject(model, AdapterRecipe(rank=4, target_modules="all-linear"), 0, CPU).double()
        randomise(adapter)
        ids = tokens()
        model(ids, labels=ids, use_cache=False).loss.backward()
        adapter.pull_back()
        gradients.append([core.grad for core in adapter.cores])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_merge_and_unmerge(name):
    model = tiny_model(name, dtype=torch.float64)
    adapter = inject(model, AdapterRecipe(rank=5, target_modules=tuple(MODELS[name][3])), 0, CPU).double()
    randomise(adapter)
    ids = tokens()
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = model(ids).logits.detach()
    merge(adapter)
    assert (model(ids).logits - adapted).norm() < FLOAT64 * adapted.norm()
    assert all(type(linear.merged_layer) is type(linear.base_layer) for linear in adapter.linears)
    unmerge(adapter)
    assert torch.equal(model(ids).logits, adapted)
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())


def test_merge_refuses_what_is_not_finite():
    model = tiny_model("llama")
    adapter = inject(model, AdapterRecipe(), 0, CPU)
    randomise(adapter)
    with torch.no_grad():
        adapter.cores[1][0, 1, 0] = math.inf
    with pytest.raises(ValueError, match=r"layers\.1\..*not finite; nothing was merged"):
        merge(adapter)
    assert all(linear.merged_layer is None for linear in adapter.linears)


@pytest.mark.parametrize("order", [None, ("layer", "input", "projection", "output"), ORDERS_4D[6]])
def test_lora_form_is_exact(order):
    model = tiny_model("llama")
    recipe = AdapterRecipe(rank=5, alpha=3.0, target_modules=("q_proj", "k_proj", "down_proj"), mode_order=order)
    adapter = inject(model, recipe, 0, CPU).double()
    randomise(adapter)
    for target, pair in zip(adapter.targets, adapter.lora_pairs(), strict=True):
        expected = dense_delta(adapter, target, list(adapter.cores)).mT
        assert pair.path == target.path and pair.lora_A.shape[0] == recipe.rank
        got = adapter.alpha * pair.lora_B @ pair.lora_A
        assert (got - expected).norm() < FLOAT64 * expected.norm()


def test_inference_mode_then_training():
    model = tiny_model("llama")
    adapter = inject(model, AdapterRecipe(), 0, CPU)
    randomise(adapter)
    ids = tokens()
    with torch.inference_mode():
        inferred = model(ids).logits
    trained = model(ids).logits
    assert torch.allclose(inferred, trained, atol=1e-5)
    trained.sum().backward()
    adapter.pull_back()
    assert all(core.grad is not None for core in adapter.cores)

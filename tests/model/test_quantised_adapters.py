"""Adapters on 4- and 8-bit backbones, against dense deltas on what the packed weights stand for."""

import copy
import math

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn

from metatt_scale.adapter import inject, merge, unmerge
from metatt_scale.adapter.merge import dequantised_weight
from metatt_scale.backbone import load_backbone
from metatt_scale.recipe import AdapterRecipe, BackboneRecipe
from tests.model.test_adapter import run_dense
from tests.quantised import adapt, packed_model, quantise, recipe_of, same_bits, snapshot, wide_model
from tests.tiny import FLOAT32, randomise, relative, tokens
from tests.toy import CPU

pytestmark = pytest.mark.usefixtures("quiet_bitsandbytes")


# ---- forward and backward


def forward_and_gradients(model, adapter, ids, direction):
    logits = model(ids).logits
    (logits * direction).sum().backward()
    adapter.pull_back()
    return logits.detach(), [core.grad for core in adapter.cores]


def dense_forward_and_gradients(unpacked, adapter, ids, direction, dtype):
    cores = [core.detach().to(dtype).requires_grad_() for core in adapter.cores]
    logits = run_dense(unpacked, adapter, cores, ids)
    return logits.detach(), torch.autograd.grad((logits * direction).sum(), cores)


@pytest.mark.parametrize("kind", ["metatt_4d", "metatt_5d"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_forward_and_gradients_in_float32(quantization, kind):
    """Against W' + delta in float32, W' what the packed weight stands for: only float32 rounding remains.

    In train mode on a CPU bitsandbytes' int8 layers too multiply by the dequantised weight; in eval mode (and on a
    GPU always) they round activations to 8 bits as well.
    """
    model, unpacked = packed_model(quantization)
    adapter = adapt(model, kind=kind)
    ids, direction = tokens(), torch.randn(2, 11, 97, generator=torch.Generator().manual_seed(3))
    logits, gradients = forward_and_gradients(model, adapter, ids, direction)
    expected, expected_gradients = dense_forward_and_gradients(unpacked, adapter, ids, direction, torch.float32)
    with adapter.disabled():
        assert relative(model(ids).logits, expected) > 1e-2, "the adapter must matter"
    errors = [relative(logits, expected), *map(relative, gradients, expected_gradients)]
    print(quantization, kind, "relative errors of logits and core gradients:", *(f"{e:.1e}" for e in errors))
    assert max(errors) < FLOAT32
    assert relative(expected, wide_model()(ids).logits) > 1e-2, "the packed weights are not the original ones"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_forward_and_gradients_in_bfloat16(quantization):
    """The bound is the rounding a plain bf16 model has of its own.

    Reference: W' + delta in float32. The plain model computes W' + delta, rounded to bf16, in bf16 throughout; its
    distance to the reference is what bf16 costs without any adapter. Beside W' the adapter rounds three thin
    products of its own (x A, . C, . B), each as large as the delta's share of the output, which here is about that
    of W': at most as much again, so twice the plain model's distance (root mean squares over five seeds).
    """
    model, unpacked = packed_model(quantization, dtype=torch.bfloat16)
    adapter, reference = adapt(model), copy.deepcopy(unpacked).float()
    ours, theirs = [], []
    for seed in range(5):
        randomise(adapter, seed)
        ids, direction = tokens(seed=seed), torch.randn(2, 11, 97, generator=torch.Generator().manual_seed(seed))
        for core in adapter.cores:
            core.grad = None
        logits, gradients = forward_and_gradients(model, adapter, ids, direction)
        plain, plain_gradients = dense_forward_and_gradients(unpacked, adapter, ids, direction, torch.bfloat16)
        exact, exact_gradients = dense_forward_and_gradients(reference, adapter, ids, direction, torch.float32)
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        ours.append([relative(logits.float(), exact), *map(relative, gradients, exact_gradients)])
        plain_gradients = [gradient.float() for gradient in plain_gradients]
        theirs.append([relative(plain.float(), exact), *map(relative, plain_gradients, exact_gradients)])
    own, other = (torch.tensor(errors).square().mean(0).sqrt() for errors in (ours, theirs))
    print(quantization, "bf16: ours", *(f"{e:.1e}" for e in own), "| plain", *(f"{e:.1e}" for e in other))
    assert bool((own < 2 * other).all())
    assert float(other.max()) < 0.3, "a reference this far off would bound nothing"


# ---- evaluation between training steps


def losses_around_evaluations(model):
    ids = tokens()
    losses = []
    for _ in range(3):
        model.train()
        losses.append(model(ids, labels=ids).loss.item())
        model.eval()
        with torch.no_grad():
            model(ids)
    return losses


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_evaluation_leaves_training_as_it_was(quantization, dtype):
    model, _ = packed_model(quantization, dtype=dtype)
    adapt(model)
    before = snapshot(model)
    first, *later = losses_around_evaluations(model)
    assert later == [first, first]
    assert same_bits(model, before)


@pytest.mark.skipif(not has_avx512bf16(), reason="only CPUs with avx512_bf16 repack 4-bit weights in eval mode")
def test_without_our_switch_evaluation_would_damage_the_weights():
    """The reason for `support_avx512bf16_for_cpu = False`; once bitsandbytes mends this, the switch can go."""
    model, _ = packed_model("nf4", dtype=torch.bfloat16)
    before = snapshot(model)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            assert module.support_avx512bf16_for_cpu is False
            module.support_avx512bf16_for_cpu = True
    losses = losses_around_evaluations(model)
    print("train loss, after one evaluation, after two:", *losses)
    assert len(set(losses)) > 1 or not same_bits(model, before)
    # With an adapter the next training forward does not even run: the kernel for that layout returns a view.
    adapt(model)
    with pytest.raises(RuntimeError, match="modified inplace"):
        model.train()(tokens())


# ---- training


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_training_lowers_the_loss_and_never_touches_the_packed_weights(quantization, checkpointing, tmp_path):
    wide_model().save_pretrained(tmp_path)
    recipe = BackboneRecipe(
        path=str(tmp_path), dtype="bfloat16", quantization=quantization, gradient_checkpointing=checkpointing
    )
    model = load_backbone(recipe, CPU).train()
    adapter = inject(model, AdapterRecipe(rank=4, target_modules="all-linear"), 0, CPU)
    before = snapshot(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
    ids, losses = tokens(batch=4), []
    for _ in range(12):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        adapter.pull_back()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert same_bits(model, before)
    assert all(core.dtype == torch.float32 for core in adapter.cores)


# ---- merging


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_dequantised_weight_is_what_the_layer_computes_with(quantization):
    for double in (True, False):
        model, unpacked = packed_model(quantization, double_quantization=double)
        fresh = wide_model()
        quantise(fresh, recipe_of(quantization, double_quantization=double))  # an int8 layer before its first run
        for path, module in model.named_modules():
            if isinstance(module, Linear4bit | Linear8bitLt):
                expected = unpacked.get_submodule(path).weight
                for packed in (module, fresh.get_submodule(path)):
                    assert relative(dequantised_weight(packed).float(), expected) < 1e-7


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_merge_and_unmerge(quantization):
    model, _ = packed_model(quantization)
    adapter = adapt(model)
    ids = tokens()
    before = snapshot(model)
    adapted = model(ids).logits.detach()
    merge(adapter)
    assert all(type(linear.merged_layer) is nn.Linear for linear in adapter.linears)
    merged = model(ids).logits
    assert relative(merged, adapted) < FLOAT32 and not torch.equal(merged, adapted)
    unmerge(adapter)
    assert torch.equal(model(ids).logits, adapted)
    assert same_bits(model, before)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_merge_in_bfloat16(quantization):
    """A merged bf16 weight is W' + delta rounded once: its distance to float32 is that of any bf16 model."""
    model, unpacked = packed_model(quantization, dtype=torch.bfloat16)
    adapter = adapt(model)
    ids = tokens()
    cores = [core.detach() for core in adapter.cores]
    exact = run_dense(copy.deepcopy(unpacked).float(), adapter, cores, ids)
    beside = relative(model(ids).logits.float(), exact)
    merge(adapter)
    merged_layers = [linear.merged_layer for linear in adapter.linears]
    assert all(layer is not None and layer.weight.dtype == torch.bfloat16 for layer in merged_layers)
    merged = relative(model(ids).logits.float(), exact)
    plain = relative(run_dense(unpacked, adapter, [c.bfloat16() for c in cores], ids).float(), exact)
    print(quantization, f"bf16 distance to float32: beside {beside:.1e}, merged {merged:.1e}, plain {plain:.1e}")
    assert merged < 2 * plain and beside < 2 * plain


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_merging_what_is_not_finite_changes_nothing(bad):
    model, _ = packed_model("nf4")
    adapter = adapt(model)
    with torch.no_grad():
        adapter.cores[1][0, 2, 0] = bad
    with pytest.raises(ValueError, match=r"layers\.2\..*not finite; nothing was merged"):
        merge(adapter)
    assert all(linear.merged_layer is None for linear in adapter.linears)

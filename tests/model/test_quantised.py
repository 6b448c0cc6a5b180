"""Adapters on 4- and 8-bit backbones, against dense deltas on what the packed weights stand for."""

import copy
import itertools
import logging
import math
import warnings
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt, Params4bit
from torch import nn

import metatt_scale.backbone.quantised as quantised_module
from metatt_scale.adapter import inject, merge, unmerge
from metatt_scale.adapter.merge import dequantised_weight
from metatt_scale.backbone import load_backbone, quantised_linear
from metatt_scale.backbone.quantised import linears_to_pack, pack
from metatt_scale.recipe import AdapterRecipe, BackboneRecipe
from tests.model.test_adapter import run_dense
from tests.tiny import FLOAT32, MODELS, randomise, tiny_model, tokens

CPU = torch.device("cpu")
# Input widths of whole 64-blocks, which 4-bit storage on a CPU needs.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
OPT = {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
PACKED = {"nf4": Linear4bit, "fp4": Linear4bit, "int8": Linear8bitLt}
SETTINGS = [
    (quantization, double, storage)
    for quantization, double, storage in itertools.product(
        ("nf4", "fp4"), (True, False), ("uint8", "bfloat16", "float32")
    )
] + [("int8", True, "bfloat16")]


@pytest.fixture(autouse=True)
def _quiet_libraries():
    """bitsandbytes logs (not warns) what kernels it lacks; its CPU path for int8 warns of the type it computes in."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
        yield


def recipe_of(quantization, **changes):
    return BackboneRecipe(path="unused", quantization=quantization, **{"dtype": "float32", **changes})


def wide_model(name="llama", dtype=torch.float32):
    return tiny_model(name, dtype=dtype, **{"gpt2": {}, "opt": OPT}.get(name, WIDE))


def quantise(model, recipe):
    """Pack a whole model at once, in place."""
    pack(model, linears_to_pack(model, recipe, CPU), recipe, CPU)


def packed_model(quantization, name="llama", dtype=torch.float32, **changes):
    """A tiny model packed by our own code, in train mode, and the same model on the weights it stands for."""
    model = wide_model(name, dtype)
    unpacked = copy.deepcopy(model)
    quantise(model, recipe_of(quantization, **changes))
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            unpacked.get_submodule(path).weight.data = as_numbers(module, dtype)
    return model, unpacked


def as_numbers(module, dtype):
    """The weight a packed layer computes with, read off its answers to the unit vectors (exact: x 1, + 0)."""
    with torch.no_grad():
        rows = module(torch.eye(module.in_features, dtype=dtype)[None])[0]
        if module.bias is not None:
            rows -= module(torch.zeros(1, 1, module.in_features, dtype=dtype))[0]
    return rows.mT.contiguous()


def adapt(model, name="llama", targets=3, **changes):
    recipe = AdapterRecipe(**{"rank": 4, "alpha": 1.7, "target_modules": tuple(MODELS[name][targets]), **changes})
    adapter = inject(model, recipe, seed=0)
    randomise(adapter)
    return adapter


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def snapshot(model):
    """Every tensor of the state as bytes: packed bits read as floats may be NaN, which equals nothing."""
    return {name: value.clone().reshape(-1).view(torch.uint8) for name, value in model.state_dict().items()}


def same_bits(model, before):
    after = snapshot(model)
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


# ---- what is packed


@pytest.mark.parametrize("quantization, double, storage", SETTINGS)
def test_every_linear_of_the_layers_and_nothing_else_is_packed(quantization, double, storage):
    original = wide_model()
    model, unpacked = packed_model(quantization, double_quantization=double, quant_storage=storage)
    in_layers = 0
    for path, module in original.named_modules():
        packed = model.get_submodule(path)
        if isinstance(module, nn.Linear) and ".layers." in path:
            in_layers += 1
            assert type(packed) is PACKED[quantization]
            error = relative(unpacked.get_submodule(path).weight, module.weight)
            # Half the mean step of the code book over the weights' spread: 16 levels, or 255.
            assert 1e-4 < error < (0.012 if quantization == "int8" else 0.15)
            if quantization == "int8":
                assert packed.weight.dtype == torch.int8
            else:
                state = packed.weight.quant_state
                assert (state.quant_type, state.nested) == (quantization, double)
                assert packed.weight.dtype == getattr(torch, storage)
                assert packed.weight.numel() * packed.weight.element_size() == module.weight.numel() // 2
        else:
            assert type(packed) is type(module)
    assert in_layers == 3 * 7
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert not any(p.requires_grad for p in model.parameters())


def test_storage_type_is_no_more_than_a_label():
    by_storage = [packed_model("nf4", quant_storage=s)[1].state_dict() for s in ("uint8", "bfloat16", "float32")]
    for other in by_storage[1:]:
        assert all(torch.equal(v, by_storage[0][k]) for k, v in other.items())


def test_double_quantisation_stores_less_and_errs_little_more():
    errors, sizes = [], []
    original = wide_model().model.layers[0].mlp.gate_proj
    for double in (False, True):
        model, unpacked = packed_model("nf4", double_quantization=double)
        errors.append(relative(unpacked.model.layers[0].mlp.gate_proj.weight, original.weight))
        state = model.model.layers[0].mlp.gate_proj.weight.quant_state
        sizes.append(state.absmax.element_size())
    assert sizes == [4, 1] and errors[0] != errors[1] and errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "phi3", "roberta", "qwen2"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_other_classes_with_bias_and_fused_projections(name, quantization):
    model, unpacked = packed_model(quantization, name)
    ids = tokens()
    assert relative(model(ids).logits, unpacked(ids).logits) < FLOAT32
    adapter = adapt(model, name)
    assert relative(model(ids).logits, run_dense(unpacked, adapter, list(adapter.cores), ids)) < FLOAT32


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no torch Linear inside its layers; use quantization"):
        packed_model("nf4", "gpt2")


@pytest.mark.parametrize("width", [32, 96])
def test_widths_that_bitsandbytes_unpacks_wrongly_are_refused(width):
    model = tiny_model("llama", hidden_size=width)
    with pytest.raises(ValueError, match=rf"q_proj is {width} wide.*multiple of 64; use int8 or none"):
        quantise(model, recipe_of("nf4"))
    quantise(model, recipe_of("int8"))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_packing_in_pieces_changes_no_bit(quantization, storage, double, monkeypatch):
    """Against bitsandbytes' own packing of the whole weight; pieces here do not even divide it."""
    monkeypatch.setattr(quantised_module, "_PIECE", 3 * 1024)
    linear = nn.Linear(128, 320, bias=False).requires_grad_(False)
    ours: Any = quantised_linear(
        linear, recipe_of(quantization, quant_storage=storage, double_quantization=double), CPU
    )
    settings: Any = {"quant_type": quantization, "compress_statistics": double}
    settings |= {"quant_storage": getattr(torch, storage)}
    parameter: Any = Params4bit(linear.weight.data, **settings)
    whole, packed = parameter.to("cpu"), ours.weight
    assert torch.equal(packed.data.view(torch.uint8), whole.data.view(torch.uint8))
    state, expected = (weight.quant_state.as_dict() for weight in (packed, whole))
    assert state.keys() == expected.keys() and ours.quant_state is packed.quant_state
    for name, value in expected.items():
        assert torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value, name


@pytest.mark.parametrize("path", ["folder", "random"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_packing_layer_by_layer_gives_the_same_model(quantization, path, tmp_path):
    wide_model().save_pretrained(tmp_path)

    class Whole:
        def shard(self, unit):
            kinds = {type(module) for module in unit.modules() if isinstance(module, nn.Linear)}
            assert kinds <= {Linear4bit} or unit.__class__ is nn.Linear

        def finish(self, model):
            pass

    recipe = BackboneRecipe(
        path=str(tmp_path) if path == "folder" else f"random:{tmp_path}",
        dtype="float32",
        quantization=quantization,
        quant_storage="float32",
    )
    assert same_bits(load_backbone(recipe, CPU, seed=1, engine=Whole()), snapshot(load_backbone(recipe, CPU, seed=1)))


def test_load_backbone_packs_what_it_loads(tmp_path):
    wide_model().save_pretrained(tmp_path)
    by_hand, _ = packed_model("nf4")
    recipe = BackboneRecipe(path=str(tmp_path), dtype="float32", quantization="nf4", gradient_checkpointing=True)
    loaded = load_backbone(recipe, CPU)
    assert same_bits(loaded, snapshot(by_hand))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


# ---- the adapter on top


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
    # With an adapter the next training forward does not even run: its output has lost its place in the graph.
    adapt(model)
    with pytest.raises(RuntimeError, match="in-place operation"):
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
    adapter = inject(model, AdapterRecipe(rank=4, target_modules="all-linear"), seed=0)
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

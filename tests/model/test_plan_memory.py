"""The plan's bytes beside those that are really there: weights and chain to the byte, activations to 10 %."""

import contextlib
import gc
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from metatt_scale.adapter import inject
from metatt_scale.backbone import load_backbone
from metatt_scale.benchmark.memory import held_bytes, peak_bytes
from metatt_scale.data import IGNORE, Batch, TokenTable, pack
from metatt_scale.plan.gathered import always_gathered_bytes
from metatt_scale.plan.layout import lay_out
from metatt_scale.plan.memory import chain_bytes
from metatt_scale.plan.peak import largest_micro_batch, memory_bytes
from metatt_scale.plan.shape import read_shape
from metatt_scale.plan.simulate import fake_world, load_sharded
from metatt_scale.plan.weights import weight_bytes
from metatt_scale.recipe import validate
from metatt_scale.training.loss import token_loss_sum
from metatt_scale.training.optimizer import make_optimizer
from metatt_scale.training.start import make_ready
from tests.toy import quiet

CPU = torch.device("cpu")
TOLERANCE = 0.10
"""What the issue allows between estimate and measurement."""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
WIDE = {**LLAMA, "hidden_size": 512, "intermediate_size": 1408}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 64}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_recipe(folder, config=LLAMA, *, examples=4, tokens=64, ranks=1, **sections):
    (folder / "config.json").write_text(json.dumps(config))
    return validate(
        {
            "output_dir": "unused",
            "backbone": {"path": f"random:{folder}", "attention": "sdpa", **sections.get("backbone", {})},
            "adapter": {"rank": 8, **sections.get("adapter", {})},
            "data": {"train": [{"path": "unused"}], "cutoff_length": tokens},
            "training": {"batch_size": examples * ranks, "micro_batch_size": examples},
            "parallel": sections.get("parallel", {}),
        },
        "plan test",
    )


# ---- to the byte


def state_tensors(state):
    if state is None:
        return []
    own = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    return own + state_tensors(getattr(state, "state2", None))


@pytest.mark.parametrize(
    "backbone",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"quantization": "nf4"},
        {"quantization": "nf4", "double_quantization": False},
        {"quantization": "fp4", "quant_storage": "uint8"},
        {"quantization": "nf4", "dtype": "float32", "quant_storage": "float32"},
        {"quantization": "int8"},
    ],
    ids=lambda backbone: " ".join(map(str, backbone.values())),
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_to_the_byte(tmp_path, backbone, tied):
    recipe = make_recipe(tmp_path, {**LLAMA, "tie_word_embeddings": tied}, backbone=backbone)
    model = load_backbone(recipe.backbone, CPU, 0)
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        weight = getattr(module, "weight", None)
        tensors += state_tensors(getattr(weight, "quant_state", None))
        tensors += [value for value in (getattr(weight, "SCB", None),) if value is not None]
    assert weight_bytes(read_shape(recipe), recipe.backbone).total == held_bytes(tensors)


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"rank": 24, "target_modules": ALL},
        {"kind": "metatt_5d", "rank": [8, 6, 4, 2]},
        {"layers": [1, 3]},
    ],
    ids=["paper", "all linears", "5d", "some layers"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("folded", [False, True], ids=["thin first", "folded"])
def test_chain_to_the_byte(tmp_path, adapter, dtype, folded):
    if folded and adapter.get("kind") == "metatt_5d":
        adapter = {**adapter, "rank": [2, 4, 6, 8]}  # falling ranks are never folded
    recipe = make_recipe(tmp_path, adapter=adapter, backbone={"dtype": dtype})
    model = load_backbone(recipe.backbone, CPU, 0).train()
    chain = inject(model, recipe.adapter, 0, CPU)
    chain.room, chain.rows_per_step = (1 << 40, 1 << 20) if folded else (0, None)
    optimizer = make_optimizer(chain.cores, recipe.training)
    ids = torch.full((1, 4), 5)
    token_loss_sum(model, Batch(ids, torch.ones_like(ids), ids.clone()), CPU).backward()
    operands = [operand for module in chain._fold.modules for operand in module if operand is not None]
    leaf_gradients = [operand.leaf.grad for operand in operands if operand.leaf.grad is not None]
    expected = chain_bytes(read_shape(recipe), recipe, tail=6, folded=folded)
    assert expected.cores == held_bytes(list(chain.cores))
    assert expected.factors == held_bytes([tensor for operand in operands for tensor in operand])
    leaves = held_bytes(leaf_gradients)
    chain.pull_back()
    optimizer.step()
    gradients = [core.grad for core in chain.cores if core.grad is not None]
    flat = held_bytes(gradients) + 4 * 6
    assert expected.gradients == leaves + held_bytes(gradients) + flat
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert expected.moments == held_bytes(moments)


# ---- to 10 %


@pytest.fixture(autouse=True)
def attention_of_gpus(monkeypatch):
    """The plan is for kernels that hold no scores; that for short examples on a CPU holds one example's."""
    monkeypatch.setattr("metatt_scale.backbone.attention._SHORT", 0)


def whole_batch(model, recipe, work, device):
    """Examples of equal length whose last tokens are targets, packed where training would pack them."""
    ids = torch.randint(2, 400, (work.examples, work.tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : work.tokens - work.answers] = IGNORE
    if not make_ready(model, recipe.training.packing, device, quiet()):
        return Batch(ids, torch.ones_like(ids), labels)
    offsets = np.arange(work.examples + 1) * work.tokens
    flags = (labels != IGNORE).numpy().astype(np.uint8)
    return pack(TokenTable(ids.numpy().astype(np.int32).ravel(), flags.ravel(), offsets), range(work.examples), 0)


def measured_peak(model, recipe, layout, *, before=1, device=CPU):
    """Most bytes that a step held at once above what was there before it, with so many steps before it."""
    chain = inject(model, recipe.adapter, 0, device)
    optimizer = make_optimizer(chain.cores, recipe.training)
    batch = whole_batch(model, recipe, layout.work, device)

    def step():
        token_loss_sum(model, batch, device).backward()
        chain.pull_back()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(before):
        step()
    gc.collect()  # what earlier tests left would be freed while the step is measured, and count as less than nothing
    with without_onednn():
        return peak_bytes(step, device)


@contextlib.contextmanager
def without_onednn():
    """The plan is for kernels without scratch; on CPUs with AMX, those of oneDNN copy a weight for few rows."""
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)


def measured_and_estimate(model, recipe, layout, **options):
    """What a step added to what lay there before it, and what the plan says of that."""
    shape = read_shape(recipe)
    memory = memory_bytes(shape, recipe, layout)
    estimate = memory.phases[memory.phase] + memory.chain.factors + memory.chain.gradients
    estimate -= always_gathered_bytes(shape, recipe, layout)  # since the first step
    measured = measured_peak(model, recipe, layout, **options)
    print(f"measured {measured:,} estimate {estimate:,} {estimate / measured - 1:+.1%} at {memory.phase}")
    return measured, estimate


def check(model, recipe, layout):
    measured, estimate = measured_and_estimate(model, recipe, layout)
    assert estimate == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "backbone", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "nf4"}, {"quantization": "int8"}]
)
def test_activations_of_one_rank(tmp_path, backbone, attention, recompute):
    settings = {**backbone, "attention": attention, "gradient_checkpointing": recompute}
    recipe = make_recipe(tmp_path, backbone=settings)
    check(load_backbone(recipe.backbone, CPU, 0).train(), recipe, lay_out(recipe, 1, 1))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "config, options",
    [
        (LLAMA, {"adapter": {"target_modules": ALL}}),
        (
            LLAMA,
            {"adapter": {"target_modules": ALL}, "backbone": {"attention": "eager"}, "examples": 2, "tokens": 256},
        ),
        ({**LLAMA, "vocab_size": 4000}, {"examples": 8, "tokens": 128, "backbone": {"dtype": "float32"}}),
        (LLAMA, {"adapter": {"layers": [2, 4]}}),
        (QWEN3, {}),
        ({**QWEN3, "model_type": "qwen2", "head_dim": 32}, {}),
        ({**LLAMA, "model_type": "mistral"}, {"tokens": 200, "examples": 1}),
        (WIDE, {"adapter": {"kind": "metatt_5d"}, "backbone": {"quantization": "nf4"}, "examples": 1, "tokens": 16}),
    ],
    ids=["all linears", "long eager", "vocabulary", "upper layers", "qwen3", "qwen2", "mistral", "unpacked weights"],
)
def test_activations_of_other_models(tmp_path, config, options, recompute):
    backbone = {**options.pop("backbone", {}), "gradient_checkpointing": recompute}
    options["backbone"] = backbone
    recipe = make_recipe(tmp_path, config, **options)
    options["backbone"] = {k: v for k, v in backbone.items() if k != "gradient_checkpointing"}
    check(load_backbone(recipe.backbone, CPU, 0).train(), recipe, lay_out(recipe, 1, 1))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "config, options",
    [
        (LLAMA, {}),
        (WIDE, {"examples": 1, "tokens": 16}),
        (WIDE, {"examples": 1, "tokens": 16, "parallel": {"reshard_after_forward": False}}),
        ({**LLAMA, "vocab_size": 20_000}, {"examples": 1, "tokens": 16}),
        (WIDE, {"examples": 1, "tokens": 32, "ranks": 64, "backbone": {"quantization": "nf4"}}),
    ],
    ids=["activations", "gathered layers", "all gathered", "gathered head", "64 ranks, nf4"],
)
def test_gathered_layers_under_fsdp2(tmp_path, config, options, recompute):
    """One process plays a rank: the buffers that FSDP2 gathers into are real, what is in them is not."""
    backbone = {**options.get("backbone", {}), "gradient_checkpointing": recompute}
    recipe = make_recipe(tmp_path, config, **{"ranks": 2, **options, "backbone": backbone})
    ranks = options.get("ranks", 2)
    layout = lay_out(recipe, ranks, ranks)
    with fake_world(0, ranks, ranks) as world:
        check(load_sharded(recipe, world, "fsdp2"), recipe, layout)


def test_the_largest_micro_batch_fits_and_one_more_does_not(tmp_path):
    recipe = make_recipe(tmp_path)
    shape, layout = read_shape(recipe), lay_out(recipe, 1, 1)
    limit = 40 << 20
    most = largest_micro_batch(shape, recipe, layout, limit)

    def peak(examples):
        return memory_bytes(shape, recipe, replace(layout, work=replace(layout.work, examples=examples))).peak

    assert peak(most) <= limit < peak(most + 1)
    assert largest_micro_batch(shape, recipe, layout, 1000) == 0

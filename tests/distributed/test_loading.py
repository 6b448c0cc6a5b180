"""Sharded backbones against one process: the same weights, loss, core gradients and buffers, on fewer bytes.

All ranks compute the same batch, so each of them must find what one process finds. One launch per engine runs all of
its cases.
"""

import contextlib
import json
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file

from metatt_scale.backbone.quantised import quantised_linear
from metatt_scale.parallel import World
from metatt_scale.parallel.parity import Parity
from metatt_scale.parallel.zero3 import zero3_config
from metatt_scale.recipe import BackboneRecipe
from tests.distributed.jobs import finish, torchrun
from tests.tiny import FLOAT32, tiny_model

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
OFFLOAD = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}

CASES = {
    # key: (model folder, random, dtype, quantization, checkpointing)
    "fp32": ("llama", False, "float32", "none", False),
    "fp32-random": ("llama", True, "float32", "none", False),
    "fp32-tied-checkpointing": ("tied", False, "float32", "none", True),
    "fp32-gpt2": ("gpt2", False, "float32", "none", True),
    "bf16": ("llama", False, "bfloat16", "none", False),
    "bf16-checkpointing": ("llama", True, "bfloat16", "none", True),
    "nf4": ("llama", False, "bfloat16", "nf4", False),
    "nf4-fp32-random": ("llama", True, "float32", "nf4", False),
    "nf4-tied-checkpointing": ("tied", False, "bfloat16", "nf4", True),
}
VARIANTS = {
    "fsdp2": {
        "nf4/keep": {"parallel": {"reshard_after_forward": False}},
        "nf4/copies": {"parallel": {"shard_size": 1}},
        "nf4/node": {"parallel": {"shard_size": "node"}},
    },
    "zero3": {"nf4/offload": {"deepspeed": OFFLOAD}},
    "replicate": {},
}
"""Other settings of an engine, each on one of the cases."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama", **WIDE).save_pretrained(folder / "llama")
    tiny_model("llama", tie_word_embeddings=True, **WIDE).save_pretrained(folder / "tied")
    tiny_model("gpt2").save_pretrained(folder / "gpt2")
    return folder


def case_of(engine, key, models, **settings):
    folder, random, dtype, quantization, checkpointing = CASES[key.split("/")[0]]
    path = f"random:{models / folder}" if random else str(models / folder)
    backbone = {"path": path, "dtype": dtype, "quantization": quantization, "quant_storage": dtype}
    backbone |= {"gradient_checkpointing": checkpointing}
    name = "gpt2" if folder == "gpt2" else "llama"
    return {"key": key.replace("/", "+"), "engine": engine, "name": name, "backbone": backbone, **settings}


@pytest.fixture(scope="module")
def outcome(models, tmp_path_factory):
    """(engine, key) -> the tensors that each rank found. Every engine is started once."""
    done = {}

    def start(engine, ranks):
        folder = tmp_path_factory.mktemp(engine)
        cases = [case_of(engine, key, models) for key in CASES]
        cases += [case_of(engine, key, models, **settings) for key, settings in VARIANTS[engine].items()]
        (folder / "cases.json").write_text(json.dumps(cases))
        work = ("-m", "tests.distributed.workers.loading", folder / "cases.json", folder)
        finish(torchrun(*work, ranks=ranks), folder / "log", 600)
        return folder

    def look_up(engine, key):
        ranks = 1 if engine == "replicate" else 2
        if engine not in done:
            done[engine] = None
            done[engine] = start(engine, ranks)
        assert done[engine] is not None, f"{engine} did not run: see the first of its tests"
        stem = f"{done[engine]}/{key.replace('/', '+')}"
        return [load_file(f"{stem}.{rank}.safetensors") for rank in range(ranks)]

    return look_up


def check(got, expected, shared):
    """Loss, logits of an evaluation, gradients within rounding; buffers to the bit; half the parameters each."""
    assert got.keys() == expected.keys()
    assert torch.equal(got["loss"][0], got["loss"][1]), "an evaluation between two steps changed the second"
    differences = []
    for name, value in expected.items():
        if name.startswith("buffer"):
            assert torch.equal(got[name], value) and got[name].dtype == value.dtype, name
        elif name != "parameters held":
            differences.append((got[name] - value).float().norm() / value.float().norm())
    whole, held = expected["parameters held"].item(), got["parameters held"].item()
    assert held == whole if shared else 0.45 * whole < held < 0.55 * whole
    return torch.stack(differences).max().item()  # not a number where one of them is not


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_shards_compute_what_the_whole_does(engine, key, outcome):
    """The same kernels see the same weights, so in bf16 and 4 bits too the results are those of one process.

    FSDP2 gathers a weight and leaves the layer's own kernels to it: every bit is the same. DeepSpeed multiplies fp32
    linears through a function of its own, another order of the same sums: 1e-5 in fp32 as everywhere. Its bf16
    results are rounded to 8 bits after sums of fp32; where an order matters, it can only move that last rounding,
    2^-8 relative, of which a mean over a tensor keeps a fraction.
    """
    (expected,) = outcome("replicate", key)
    bound = 0.0 if engine == "fsdp2" else FLOAT32 if "float32" in CASES[key] else 2**-8
    errors = [check(got, expected, shared=False) for got in outcome(engine, key)]
    print(engine, key, "largest relative difference to one process:", *(f"{error:.1e}" for error in errors))
    assert all(error <= bound for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, key", [("fsdp2", "nf4/keep"), ("fsdp2", "nf4/copies"), ("fsdp2", "nf4/node"), ("zero3", "nf4/offload")]
)
def test_settings_of_the_engines(engine, key, outcome):
    (expected,) = outcome("replicate", "nf4")
    for got in outcome(engine, key):
        assert check(got, expected, shared=key in ("nf4/copies", "nf4/keep")) == 0  # kept after a forward


# ---- parity, without processes


def packed_layer() -> tuple[torch.nn.Module, Any]:
    recipe = BackboneRecipe(path="unused", dtype="float32", quantization="nf4", quant_storage="float32")
    linear = torch.nn.Linear(64, 128).requires_grad_(False)
    packed: Any = quantised_linear(linear, recipe, torch.device("cpu"))
    assert isinstance(packed, Linear4bit)
    return torch.nn.Sequential(torch.nn.LayerNorm(64), packed), packed


@pytest.mark.parametrize("damage", ["none", "bytes", "scales", "not a number", "no gradient"])
def test_a_changed_4_bit_layer_is_refused(damage):
    (layer, linear), parity = packed_layer(), Parity()
    parity.remember(layer)
    if damage == "bytes":
        linear.weight.data.view(torch.uint8)[:100] += 1
    elif damage == "scales":
        linear.weight.quant_state.absmax[3] += 1
    elif damage == "not a number":
        linear.bias.data[0] = torch.nan
    elif damage == "no gradient":  # while the output, which is compared first, is as it was
        whole = linear.forward

        def forward(x):
            x.register_hook(lambda gradient: gradient * torch.nan)
            return whole(x)

        linear.forward = forward
    refusal = pytest.raises(ValueError, match=r"\(ranks 0; .*set backbone\.quantization: none or parallel")
    with contextlib.nullcontext() if damage == "none" else refusal:
        parity.check(World(device=torch.device("cpu")), contextlib.nullcontext)


def test_no_4_bit_layer_nothing_to_compare():
    parity = Parity()
    parity.remember(torch.nn.Linear(3, 3))
    parity.check(World(device=torch.device("cpu")), lambda unit: pytest.fail("nothing to gather"))


# ---- DeepSpeed's configuration


def config_of(given, dtype=torch.bfloat16):
    return zero3_config(given, micro_batch_size=4, accumulation=3, dtype=dtype, world_size=2)


def test_deepspeed_values_come_from_the_recipe():
    plain = config_of(None)
    assert plain["zero_optimization"]["stage"] == 3
    assert (plain["bf16"]["enabled"], plain["fp16"]["enabled"]) == (True, False)
    sizes = [plain[f"train_{name}"] for name in ("micro_batch_size_per_gpu", "batch_size")]
    assert [*sizes, plain["gradient_accumulation_steps"]] == [4, 24, 3]
    given = {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto", "overlap_comm": True},
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "gradient_clipping": 1.0,
    }
    before = json.dumps(given)
    config = config_of(given, torch.float32)
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": True} and "optimizer" not in config
    assert not config["bf16"]["enabled"] and "gradient_clipping" not in config
    assert json.dumps(given) == before


def test_a_linear_that_keeps_gathered_weights_is_refused():
    with pytest.raises(ValueError, match=r"zero_optimization\.memory_efficient_linear"):
        config_of({"zero_optimization": {"stage": 3, "memory_efficient_linear": False}})

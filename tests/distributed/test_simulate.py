"""Collectives that are really issued, by real engines and by PEFT under DDP, beside the formulas of plan."""

import json
import sys
from pathlib import Path

import pytest

from metatt_scale.cli import main
from metatt_scale.plan.simulate import MODEL, simulate
from metatt_scale.recipe import load_recipe
from tests.distributed.jobs import job, torchrun

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
QLORA = RECIPES / "llama2_7b_qlora_single_gpu.yaml"
WIRE = Path(__file__).with_name("wire.py")

pytestmark = pytest.mark.slow


def simulated(ranks, *overrides, per_node=8):
    return simulate(load_recipe(QLORA, overrides), ranks, per_node)


def agrees(found):
    assert found.collectives == found.expected
    assert (found.first_rank_bytes, found.last_rank_bytes) == found.expected_bytes


@pytest.mark.parametrize("ranks", [2, 64, 1024])
def test_one_all_reduce_and_two_gathers_a_layer(ranks):
    found = simulated(ranks)
    agrees(found)
    assert found.collectives["all_reduce"]["count"] == 1
    assert set(found.layer_gathers.values()) == {2}
    assert len(found.layer_gathers) == MODEL["num_hidden_layers"]
    # forward and backward of all layers, of the head and of the last norm; the embedding's forward
    assert found.collectives["all_gather"]["count"] == 2 * (MODEL["num_hidden_layers"] + 2) + 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("backbone.quantization=none",),
        ("backbone.quantization=none", "backbone.dtype=float32"),
        ("backbone.double_quantization=false", "backbone.gradient_checkpointing=false"),
        ("backbone.gradient_checkpointing=false", "adapter.layers=[2,4]"),
        ("backbone.gradient_checkpointing=true", "adapter.layers=[2,4]"),
        ("parallel.reshard_after_forward=false",),
        ("parallel.cpu_offload=true",),
        ("backbone.quantization=int8",),
        ("parallel.shard_size=node",),
        ("parallel.shard_size=4", "adapter.kind=metatt_5d"),
        ("parallel.backbone=replicate", "adapter.rank=4"),
        ("adapter.target_modules=all-linear",),
    ],
    ids=" ".join,
)
def test_every_setting_follows_the_formula(overrides):
    agrees(simulated(16, *overrides))


def test_one_rank_sends_nothing():
    found = simulated(1, "parallel.backbone=fsdp2")
    agrees(found)
    assert found.collectives == {}


def test_the_last_of_many_ranks_owns_less():
    found = simulated(1024)
    assert found.last_rank_bytes < found.first_rank_bytes  # 512 rows of the embedding over 1,024 ranks


def test_the_command(capsys):
    assert main(["plan", str(QLORA), "--simulate", "--nodes", "2", "--gpus-per-node", "4", "--json"]) == 0
    (world,) = json.loads(capsys.readouterr().out)
    assert world["ranks"] == 8
    assert world["collectives"] == world["expected"]
    assert main(["plan", str(QLORA), "--simulate", "--nodes", "1", "--gpus-per-node", "2"]) == 0
    output = capsys.readouterr().out
    assert "equal" in output and "auto: planned as fsdp2" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["parallel.backbone=zero3"], "`parallel` means zero3"),
        ([f"parallel.deepspeed_config={RECIPES.parent / 'ds_configs' / 'zero3.json'}"], "`parallel` means zero3"),
        (["adapter.target_modules=[query]"], "on a small Llama model, and there: adapter.target_modules"),
        (["backbone.quantization=int8", "parallel.backbone=fsdp2"], "set parallel.backbone: replicate"),
        (["--nodes", "2048", "--gpus-per-node", "1"], "2048 x 1 = 2,048 ranks; simulate at most 1,024"),
        (["--hardware", "l40s", "--memory", "9"], "has no use for --memory, --hardware; leave it out"),
    ],
    ids=str,
)
def test_what_cannot_be_simulated(capsys, arguments, message):
    assert main(["plan", str(QLORA), "--simulate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("random:smollm2_135m", "nf4")], ids=["small", "smollm2"])
def test_bytes_on_the_wire_against_lora_under_ddp(tmp_path, arguments):
    with job(torchrun(WIRE, *arguments), tmp_path / "log") as running:
        assert running.wait(300) == 0, running.output()
        output = running.output()
    sys.stdout.write(output)
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    for name, (_, counted, formula) in found.items():
        assert counted == formula, name
    assert found["MetaTT r=16"][0] == 1

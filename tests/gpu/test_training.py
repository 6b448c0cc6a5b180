"""Runs on the device: they go on from a checkpoint with the same bits, and sweeps leave nothing behind elsewhere.

A GPU alone has two places for tensors: optimizer state, sweeps and checkpoints move between them.
"""

import shutil

import pytest
import torch

from metatt_scale.adapter import read_description
from metatt_scale.training import train
from metatt_scale.training.optimizer import moments_of
from tests.gpu.small import recipe_for, trainer_for
from tests.tiny import FLOAT32, relative
from tests.toy import CPU, bits_of, metrics, one_step, quiet, said

STEPS = {"max_steps": 6, "save_every": 2, "eval_every": 3, "resume": "exact"}
SCHEDULE = {"unit": "step", "schedule": [{"after": 3, "rank": 3}]}
RUNS = {
    "after a sweep": {"sweep": {**SCHEDULE, "moments": "transport"}},
    "before a sweep": {"sweep": {**SCHEDULE, "schedule": [{"after": 5, "rank": 3}], "moments": "transport"}},
    "padded": {"training": {"packing": False}},
    "float16": {"backbone": {"dtype": "float16"}},
    "recomputed": {"backbone": {"dtype": "bfloat16", "gradient_checkpointing": True}},
    "tasks": {"adapter": {"kind": "metatt_4p1d"}},
    "lora": {"adapter": {"kind": "lora"}},
    "nf4": {"backbone": {"dtype": "bfloat16", "quantization": "nf4"}},
}


def result(folder):
    return (folder / "adapter" / "metatt.safetensors").read_bytes(), bits_of(folder)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_to_the_same_bits(name, device, tmp_path):
    """As if it had been killed after step 5: the checkpoint of step 4 is the newest.

    `resume: exact` takes deterministic kernels.
    """
    if name == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sections = {**RUNS[name], "training": {**STEPS, **RUNS[name].get("training", {})}}
    recipe, run = recipe_for(tmp_path, device, **sections), tmp_path / "run"
    done = train(recipe, quiet())
    assert all(value.device == device for value in done.adapter.trained().values())
    straight = result(run)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000006")
    train(recipe, console := quiet())
    assert "resuming after step 4" in said(console)
    assert result(run) == straight


def state_of(trainer):
    """AdamW's state by parameter and key."""
    moments = moments_of(trainer.optimizer, trainer.adapter.trained())
    return {f"{name}.{key}": value for name, state in moments.items() for key, value in state.items()}


def assert_in_place(trainer):
    state = state_of(trainer)
    assert state and all(value.device == trainer.world.device for value in state.values())


def test_optimizer_state_is_beside_its_parameter(device, tmp_path):
    """Also where it was installed: fused AdamW reads the step count on the device."""
    trainer = trainer_for(recipe_for(tmp_path, device), device)
    one_step(trainer)
    assert_in_place(trainer)
    before = {name: value.to(CPU, copy=True) for name, value in state_of(trainer).items()}
    moments = moments_of(trainer.optimizer, trainer.adapter.trained())
    on_host = {name: {key: value.cpu() for key, value in state.items()} for name, state in moments.items()}
    trainer.install({name: value.cpu() for name, value in trainer.adapter.tensors().items()}, on_host)
    assert_in_place(trainer)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in state_of(trainer).items())
    assert one_step(trainer)["loss"] is not None


SWEEPS = {
    "transported": {"moments": "transport"},
    "sensitivity": {"importance": "sensitivity", "probe_batches": 2, "moments": "transport"},
    "balanced": {"gauge": "balanced"},
}


def swept(recipe, device):
    """A trainer behind its sweep, the moments before it the same on every device; and what was reported."""
    trainer, generator = trainer_for(recipe, device), torch.Generator().manual_seed(0)
    values = {name: value.cpu() for name, value in trainer.adapter.tensors().items()}
    moments = {
        name: {
            "step": torch.tensor(3.0),
            "exp_avg": torch.randn(value.shape, generator=generator),
            "exp_avg_sq": torch.rand(value.shape, generator=generator),
        }
        for name, value in values.items()
    }
    trainer.install(values, moments)
    trainer.progress.step = 3
    trainer._sweep_if_due(report := {})
    return trainer, report["sweep"]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_that_of_a_cpu(name, device, tmp_path):
    """The chain is cut on the CPU in float64; gradients that weigh its bonds come from the device."""
    recipe = recipe_for(tmp_path, device, sweep={**SCHEDULE, **SWEEPS[name]})
    (trainer, report), (expected, expected_report) = swept(recipe, device), swept(recipe, CPU)
    assert report["ranks_after"] == expected_report["ranks_after"] == [3, 3, 3]
    far = [relative(a.cpu(), b) for a, b in zip(trainer.adapter.deltas(), expected.adapter.deltas(), strict=True)]
    state, expected_state = state_of(trainer), state_of(expected)
    assert state.keys() == expected_state.keys()
    far += [relative(state[key].cpu(), value) for key, value in expected_state.items()]
    print(f"relative distances of deltas and moments: {max(far):.1e}")
    assert max(far) < FLOAT32
    if state:
        assert_in_place(trainer)
    assert one_step(trainer)["loss"] is not None


def test_local_steps(device, tmp_path):
    """Merged pairs are trained on the device and cut on the CPU, bond by bond."""
    local = {"local_steps": 2, "local_learning_rate": 1e-3}
    recipe = recipe_for(tmp_path, device, sweep={**SCHEDULE, **local}, training={**STEPS, "eval_every": 1})
    done, lines = train(recipe, quiet()), metrics(tmp_path / "run")
    assert read_description(tmp_path / "run" / "adapter")["ranks"] == [3, 3, 3]
    losses = [line["eval_loss"] for line in lines]
    print("eval_loss:", *(f"{loss:.4f}" for loss in losses))
    assert losses[-1] < losses[0] and all(core.device == device for core in done.adapter.cores)


def test_the_best_values_and_a_second_run_on_top(device, tmp_path):
    """`keep: best` and `start_from` hold values beside those that train."""
    first = recipe_for(tmp_path, device, training={**STEPS, "keep": "best"})
    done = train(first, quiet())
    assert all(core.device == device for core in done.adapter.cores)
    again = recipe_for(
        tmp_path,
        device,
        output_dir=str(tmp_path / "again"),
        adapter={"start_from": str(tmp_path / "run")},
        training=STEPS,
    )
    assert all(core.device == device for core in train(again, quiet()).adapter.cores)

"""A run that is stopped, killed or damaged and then goes on ends with the bits of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from metatt_scale.training import TrainingStopped, checkpoint, loop, objective, train
from metatt_scale.training.checks import only_run
from tests.toy import bits_of, metrics, quiet, said, toy, toy_recipe, write_toy

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STEPS = {"max_steps": 12, "save_every": 2, "eval_every": 3}


def final_state(folder, recipe):
    """Everything a finished run leaves that must not depend on where it was stopped."""
    (last,) = [path for path in checkpoint.list_checkpoints(folder / "checkpoints") if path.name == "step-000012"]
    from safetensors.torch import load_file

    return {
        "tensors": load_file(last / "state.safetensors"),
        "adapter": (folder / "adapter" / "metatt.safetensors").read_bytes(),
        "metrics": bits_of(folder),
    }


def same(one, other):
    assert one["tensors"].keys() == other["tensors"].keys()
    assert all(torch.equal(value, other["tensors"][name]) for name, value in one["tensors"].items())
    assert one["metrics"] == other["metrics"] and one["adapter"] == other["adapter"]


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing of ours catches it."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Twelve steps without a stop; the best cores are kept, so that they are compared as well."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = toy_recipe(folder, training={**STEPS, "keep": "best"})
    train(recipe, quiet())
    return folder, final_state(folder / "run", recipe)


def with_dropout(folder):
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 64}
    write_toy(folder, config={**config, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1})
    return {"adapter": {"target_modules": ["c_attn"]}}


@pytest.mark.parametrize("stop_at", [1, 3, 6, 11])
def test_a_signal_then_resume_gives_the_same_bits(straight, tmp_path, monkeypatch, stop_at):
    folder, expected = straight
    recipe = toy_recipe(folder, output_dir=str(tmp_path / "run"), training={**STEPS, "keep": "best"})
    real = loop.Trainer._launch

    def step(self):
        if self.progress.step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_launch", step)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(TrainingStopped, match=f"SIGTERM after step {stop_at}") as caught:
            train(recipe, quiet())
        assert caught.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{stop_at:06d}"
    assert not (tmp_path / "run" / "adapter").exists()
    train(recipe, console := quiet())
    assert f"resuming after step {stop_at}" in said(console)
    same(final_state(tmp_path / "run", recipe), expected)


@pytest.mark.parametrize("stop_at", [2, 6, 7])
@pytest.mark.parametrize("where", ["before the step", "before the save", "after the save", "during the save"])
def test_a_kill_then_resume_gives_the_same_bits(straight, tmp_path, monkeypatch, stop_at, where):
    folder, expected = straight
    recipe = toy_recipe(folder, output_dir=str(tmp_path / "run"), training={**STEPS, "keep": "best"})
    real_step, real_save, real_json = loop.Trainer._launch, loop.Trainer._save_if_due, checkpoint.write_json
    at = {"step": 0}

    def step(self):
        at["step"] = self.progress.step + 1
        if where == "before the step" and at["step"] == stop_at:
            raise Killed
        return real_step(self)

    def save(self):
        if where == "before the save" and at["step"] == stop_at:
            raise Killed
        real_save(self)
        if where == "after the save" and at["step"] == stop_at:
            raise Killed

    def write_json(path, value):
        if where == "during the save" and at["step"] >= stop_at:
            raise Killed
        real_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_launch", step)
        patch.setattr(loop.Trainer, "_save_if_due", save)
        patch.setattr(checkpoint, "write_json", write_json)
        train(recipe, quiet())
    train(recipe, quiet())
    same(final_state(tmp_path / "run", recipe), expected)


def test_resume_with_dropout_and_a_skipped_step(tmp_path, monkeypatch):
    sections = with_dropout(tmp_path)
    real, calls = objective.token_loss_sum, []

    def spoiled(model, batch, device, weights=None):  # not finite in the second optimizer step of either run
        loss = real(model, batch, device)
        calls.append(model.training)
        return loss * float("nan") if model.training and sum(calls) in (3, 4) else loss

    states = []
    for name, stop_at in (("straight", None), ("stopped", 5)):
        calls.clear()
        recipe = toy_recipe(tmp_path, output_dir=str(tmp_path / name), training=STEPS, **sections)
        with monkeypatch.context() as patch:
            patch.setattr(objective, "token_loss_sum", spoiled)
            if stop_at is None:
                train(recipe, quiet())
            else:
                real_step = loop.Trainer._launch

                def step(self, real_step=real_step, stop_at=stop_at):
                    if self.progress.step == stop_at:
                        raise Killed
                    return real_step(self)

                patch.setattr(loop.Trainer, "_launch", step)
                with pytest.raises(Killed):
                    train(recipe, quiet())
        if stop_at is not None:
            train(recipe, quiet())
        states.append(final_state(tmp_path / name, recipe))
    assert [line["skipped"] for line in states[0]["metrics"]] == [0] + [1] * 11
    same(*states)


def test_early_stopping_counts_over_a_resume(tmp_path, monkeypatch):
    losses = {2: 3.0, 4: 4.0, 6: 4.0, 8: 4.0, 10: 4.0}
    monkeypatch.setattr(loop.Trainer, "evaluate", lambda self: {"eval_loss": losses[self.progress.step]})
    settings = {"max_steps": 50, "eval_every": 2, "save_every": 1, "early_stopping_patience": 3}
    recipe = toy_recipe(tmp_path, training=settings)
    real = loop.Trainer._launch

    def step(self):
        if self.progress.step == 5:
            raise Killed
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_launch", step)
        train(recipe, quiet())
    train(recipe, quiet())
    assert metrics(tmp_path / "run")[-1]["step"] == 8


def test_a_metrics_line_cut_short_is_written_again(straight, tmp_path):
    folder, expected = straight
    recipe = toy_recipe(folder, output_dir=str(tmp_path / "run"), training={**STEPS, "keep": "best"})
    train(recipe, quiet())
    file = tmp_path / "run" / "metrics.jsonl"
    for step in ("step-000012",):
        (tmp_path / "run" / "checkpoints" / step / "COMPLETE").unlink()
    file.write_bytes(file.read_bytes()[:-20])
    train(recipe, quiet())
    same(final_state(tmp_path / "run", recipe), expected)


# ---- real processes


def write_recipe(folder, name, **training):
    write_toy(folder, n=80)
    settings = {"max_steps": 140, "save_every": 2, "eval_every": 35, "micro_batch_size": 2, "keep_checkpoints": 2}
    data = toy(folder, output_dir=str(folder / name), training={**settings, **training})
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return folder / f"{name}.yaml", folder / name


def start(recipe):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "metatt_scale.cli", "train", str(recipe)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def last_step(folder):
    found = checkpoint.list_checkpoints(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
    return int(found[-1].name.removeprefix("step-")) if found else 0


def wait_for_step_after(process, folder, step, seconds=120):
    """Wait until a checkpoint newer than `step` is there, so that training is under way."""
    end = time.monotonic() + seconds
    while last_step(folder) <= step:
        assert process.poll() is None, f"ended early: {process.stderr.read()}"
        assert time.monotonic() < end, "no checkpoint appeared"
        time.sleep(0.005)


def finish(recipe):
    process = start(recipe)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe, run = write_recipe(folder, "straight")
    finish(recipe)
    return folder, (run / "adapter" / "metatt.safetensors").read_bytes(), bits_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signalled_process_saves_and_exits_and_the_next_one_ends_alike(uninterrupted, number, code):
    folder, expected, expected_metrics = uninterrupted
    recipe, run = write_recipe(folder, f"signalled-{code}")
    process = start(recipe)
    wait_for_step_after(process, run, 0)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    first, last = errors.strip().splitlines()
    assert first == f"{signal.Signals(number).name}: finishing this step, then saving"
    step = last_step(run)
    assert last == f"stopped by {signal.Signals(number).name} after step {step}; the checkpoint is written"
    assert 2 <= step < 140 and not (run / "adapter").exists()
    assert metrics(run)[-1]["step"] == step
    finish(recipe)
    assert (run / "adapter" / "metatt.safetensors").read_bytes() == expected
    assert bits_of(run) == expected_metrics


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(tmp_path):
    # One optimizer step of a thousand micro-batches takes far longer than this test waits.
    recipe, run = write_recipe(tmp_path, "run", batch_size=20000, micro_batch_size=1, max_steps=1)
    text = recipe.read_text().replace("- path:", "- weight: 400.0\n    path:")
    recipe.write_text(text)
    process = start(recipe)
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None and "finishing this step" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.strip()) == (130, "interrupted")
    assert last_step(run) == 0 and not (run / "adapter").exists()


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_bit(uninterrupted):
    folder, expected, expected_metrics = uninterrupted
    recipe, run = write_recipe(folder, "killed")
    chance, kills, step = random.Random(7), [], 0
    while len(kills) < 10:
        process = start(recipe)
        wait_for_step_after(process, run, step + chance.randrange(8))
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before the tenth kill: give it more steps"
        kills.append((metrics_step(run), step := last_step(run)))
    print("kills (last line of metrics, newest checkpoint):", kills)
    assert kills[-1][1] < 140
    finish(recipe)
    assert (run / "adapter" / "metatt.safetensors").read_bytes() == expected
    assert bits_of(run) == expected_metrics
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


def metrics_step(run):
    """The step of the last line, which the kill may have cut short."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:
        return "cut short"


def test_other_training_records_are_refused(tmp_path):
    """The recipe names a file; a checkpoint also knows what was in it."""
    write_toy(tmp_path)
    recipe = toy_recipe(tmp_path)
    train(recipe, quiet())
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace("=", "~"))
    with pytest.raises(ValueError, match="records or the backbone"):
        train(recipe, quiet())


def test_other_weights_behind_the_same_path_are_refused(tmp_path):
    write_toy(tmp_path)
    recipe = toy_recipe(tmp_path)
    train(recipe, quiet())
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"initializer_range": 0.2', '"initializer_range": 0.3'))
    with pytest.raises(ValueError, match="records or the backbone"):
        train(recipe, quiet())


def test_two_runs_never_share_a_folder(tmp_path):
    write_toy(tmp_path)
    recipe = toy_recipe(tmp_path)
    with only_run(tmp_path / "run"), pytest.raises(ValueError, match="another run is writing there"):
        train(recipe, quiet())
    train(recipe, quiet())


def test_a_launcher_that_says_half_is_refused(tmp_path, monkeypatch):
    """Two ranks that do not find each other would train two models."""
    write_toy(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK"):
        train(toy_recipe(tmp_path), quiet())


def test_lines_that_cannot_be_read_are_left_out_of_metrics_and_told(tmp_path):
    recipe = toy_recipe(tmp_path)
    train(recipe, quiet())
    file = tmp_path / "run" / "metrics.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    bad = [b'\xff\xfe{"step": 1}\n', b"[1]\n", b'{"step": true}\n', b"[" * 100_000 + b"\n", b'{"step": 1e400}\n']
    file.write_bytes(whole[0] + b"".join(bad) + b'{"step": 2, "spectra": [NaN]}\n' + b"".join(whole[2:]) + b'{"st')
    train(recipe, console := quiet())
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 2, 3, 4, 5, 6]
    assert "left out 5 lines" in said(console) and "2, 3, 4, 5, 6" in said(console)
    train(recipe, console := quiet())
    assert "left out" not in said(console) and len(metrics(tmp_path / "run")) == 6

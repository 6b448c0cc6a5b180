"""Steps whose numbers are read while the next one is in work, as on a GPU: the same run, to the bit."""

import os
import signal

import pytest
import torch

from metatt_scale.training import TrainingStopped, checkpoint, loop, objective, train
from tests.model.test_nonfinite_steps import spoil
from tests.toy import TIMING, metrics, quiet, said, toy_recipe, write_toy

SETTINGS = {"micro_batch_size": 16, "max_steps": 11, "save_every": 5, "eval_every": 4, "keep": "best"}


@pytest.fixture
def late(monkeypatch):
    real, most = loop.Trainer.train, []

    def train_late(self):
        self.read_late = True
        real_launch = self._launch

        def launch():
            real_launch()
            most.append(len(self._launched))

        self._launch = launch
        real(self)

    monkeypatch.setattr(loop.Trainer, "train", train_late)
    return most


def numbers(folder):
    return [{key: value for key, value in line.items() if key not in TIMING} for line in metrics(folder)]


def runs(folder, monkeypatch, bad=(), **settings):
    """Return the recipe's run, its numbers and what was said."""
    recipe = toy_recipe(folder, training={**SETTINGS, **settings})
    spoil(monkeypatch, set(bad))
    done = train(recipe, console := quiet())
    return done, numbers(folder / "run"), said(console)


def test_the_same_numbers_and_bits(tmp_path, monkeypatch, request):
    for name in ("at_once", "late"):
        write_toy(tmp_path / name)
    at_once, expected, _ = runs(tmp_path / "at_once", monkeypatch, bad={2, 5, 6})
    depth = request.getfixturevalue("late")
    found, seen, text = runs(tmp_path / "late", monkeypatch, bad={2, 5, 6})
    assert seen == expected and [line["step"] for line in seen] == list(range(1, 12))
    assert all(torch.equal(a, b) for a, b in zip(found.adapter.cores, at_once.adapter.cores, strict=True))
    assert max(depth) == 2, "one step is read while another is in work"
    assert "not finite, skipped" in text
    saved = [path.name for path in checkpoint.list_checkpoints(tmp_path / "late" / "run" / "checkpoints")]
    assert saved == [path.name for path in checkpoint.list_checkpoints(tmp_path / "at_once" / "run" / "checkpoints")]


def test_a_signal_is_seen_a_step_later_and_costs_no_bit(tmp_path, monkeypatch, late):
    write_toy(tmp_path / "straight")
    straight, expected, _ = runs(tmp_path / "straight", monkeypatch)
    write_toy(tmp_path / "stopped")
    real = objective.token_loss_sum

    def interrupted(model, batch, device, weights=None):
        if len(late) == 6 and model.training and not seen:
            seen.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(model, batch, device)

    seen: list[None] = []
    late.clear()
    monkeypatch.setattr(objective, "token_loss_sum", interrupted)
    recipe = toy_recipe(tmp_path / "stopped", training=SETTINGS)
    with pytest.raises(TrainingStopped, match="SIGTERM after step 8"):
        train(recipe, quiet())
    again = train(recipe, console := quiet())
    assert "resuming after step 8" in said(console)
    assert numbers(tmp_path / "stopped" / "run") == expected
    assert all(torch.equal(a, b) for a, b in zip(again.adapter.cores, straight.adapter.cores, strict=True))


def test_a_hopeless_run_ends(tmp_path, monkeypatch, late):
    write_toy(tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        runs(tmp_path, monkeypatch, bad=range(3, 11), max_nonfinite_steps=2, save_every="never", keep="last")
    assert numbers(tmp_path / "run")[-1]["step"] <= 6

"""Steps that are not finite are skipped, and nothing of them is handed over."""

import math

import pytest
import torch

from metatt_scale.ending import DivergedError
from metatt_scale.training import checkpoint, objective, train
from metatt_scale.training.loss import token_loss_sum
from tests.toy import make_trainer, metrics, one_step, quiet, said, toy_recipe, write_toy


def spoil(monkeypatch, bad_steps, value=math.nan):
    """Make the loss of the optimizer steps whose numbers are in `bad_steps` not finite."""
    real, calls = token_loss_sum, []

    def spoiled(model, batch, device, weights=None):
        if not model.training:
            return real(model, batch, device)
        calls.append(0)
        return real(model, batch, device) * (value if len(calls) - 1 in bad_steps else 1.0)

    monkeypatch.setattr(objective, "token_loss_sum", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(tmp_path, monkeypatch, value):
    trainer = make_trainer(toy_recipe(tmp_path, training={"micro_batch_size": 16}))
    spoil(monkeypatch, {2}, value)
    for _ in range(2):
        one_step(trainer)
    cores = [core.detach().clone() for core in trainer.adapter.cores]
    state = [{k: v.clone() for k, v in trainer.optimizer.state[core].items()} for core in trainer.adapter.cores]
    tokens = trainer.progress.target_tokens
    report = one_step(trainer)
    assert (report["loss"], report["grad_norm"], report["skipped"]) == (None, None, 1)
    assert all(torch.equal(a, b) for a, b in zip(cores, trainer.adapter.cores, strict=True))
    assert all(core.grad is None for core in trainer.adapter.cores)
    for core, before in zip(trainer.adapter.cores, state, strict=True):
        assert all(torch.equal(before[name], value) for name, value in trainer.optimizer.state[core].items())
    assert (trainer.progress.step, trainer.progress.target_tokens) == (3, tokens)
    assert one_step(trainer)["loss"] is not None
    assert (trainer.progress.skipped, trainer.progress.skipped_in_a_row) == (1, 0)
    assert not torch.equal(cores[1], trainer.adapter.cores[1])


def test_single_bad_steps_do_not_stop_a_run(tmp_path, monkeypatch):
    spoil(monkeypatch, {1, 3, 5, 7, 9})
    settings = {"micro_batch_size": 16, "max_steps": 12, "max_nonfinite_steps": 2}
    train(toy_recipe(tmp_path, training=settings), console := quiet())
    assert metrics(tmp_path / "run")[-1]["skipped"] == 5
    assert "not finite, skipped" in said(console)


def test_too_many_bad_steps_in_a_row_stop_the_run_with_the_last_good_cores(tmp_path, monkeypatch):
    settings = {"micro_batch_size": 16, "max_nonfinite_steps": 3, "max_steps": 20, "save_every": "never"}
    recipe = toy_recipe(tmp_path, training=settings)
    good = make_trainer(recipe)
    for _ in range(4):
        one_step(good)
    spoil(monkeypatch, set(range(4, 20)))
    with pytest.raises(ValueError, match=r"stopped at step 7: .* not finite 3 times in a row") as caught:
        train(recipe, quiet())
    assert "\n" not in str(caught.value) and "learning_rate" in str(caught.value)
    (folder,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    saved = checkpoint.load(folder, recipe, checkpoint.expected(good.adapter))
    assert (folder.name, saved.progress.skipped) == ("step-000007", 3)
    assert all(torch.equal(a, b) for a, b in zip(saved.values.values(), good.adapter.cores, strict=True))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_that_learned_nothing_hands_over_nothing(tmp_path, monkeypatch):
    write_toy(tmp_path)
    recipe = toy_recipe(tmp_path, training={"max_steps": 3, "eval_every": "never"})
    monkeypatch.setattr(
        objective, "token_loss_sum", lambda model, batch, device, _: model(batch.input_ids_BS).logits.sum() * math.nan
    )
    with pytest.raises(ValueError, match="all 3 steps were skipped"):
        train(recipe, quiet())
    assert not (tmp_path / "run" / "adapter").exists()


def test_cores_that_are_not_finite_are_not_handed_over(tmp_path, monkeypatch):
    write_toy(tmp_path)
    recipe = toy_recipe(tmp_path, training={"max_steps": 1, "eval_every": "never"})
    step = torch.optim.AdamW.step

    def overflow(self, closure=None):
        step(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0][0, 0, 0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(DivergedError, match=r"core_0 .* not finite"):
        train(recipe, quiet())
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not (tmp_path / "run" / "adapter").exists()

"""Evaluation in a run: its loss, the best cores, early stopping."""

import json
import math

import pytest
import torch

from metatt_scale.recipe import RecipeError
from metatt_scale.reopen import reopen
from metatt_scale.training import checkpoint, loop, train
from tests.tiny import FLOAT32, FLOAT64, randomise
from tests.toy import CPU, GPT2, make_trainer, metrics, one_step, quiet, said, toy_recipe, write_toy


def test_validation_records_are_never_trained_on(tmp_path):
    trainer = make_trainer(toy_recipe(tmp_path))
    assert trainer.data.validation is not None
    held_out = set(trainer.data.validation.indices.tolist())
    seen = {int(i) for step in range(2 * trainer.order.steps_per_epoch) for i in trainer.order.global_batch(step)[1]}
    assert len(held_out) == 16 and len(seen) == 64 and not seen & held_out


def test_a_recipe_that_wants_the_best_without_validation_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="need validation records"):
        toy_recipe(tmp_path, data={"validation_size": 0}, training={"keep": "best"})


def test_evaluation_is_without_dropout_and_training_mode_comes_back(tmp_path):
    write_toy(tmp_path, config={**GPT2, "attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    trainer = make_trainer(toy_recipe(tmp_path, adapter={"target_modules": ["c_attn"]}))
    modes = []
    trainer.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    one_step(trainer)
    before = len(modes)
    losses = {trainer.evaluate()["eval_loss"] for _ in range(3)}
    assert len(losses) == 1 and all(modes[:before]) and not any(modes[before:])
    assert all(module.training for module in trainer.model.modules())
    one_step(trainer)
    assert modes[-1] and all(core.grad is None for core in trainer.adapter.cores)


def test_evaluation_loss_is_the_mean_over_all_target_tokens(tmp_path):
    values = []
    for size in (1, 5, 16):
        trainer = make_trainer(toy_recipe(tmp_path, training={"micro_batch_size": size}), torch.float64)
        randomise(trainer.adapter)
        values.append(trainer.evaluate()["eval_loss"])
    assert trainer.data.validation is not None
    table, indices = trainer.data.validation
    total = 0.0
    for index in indices:
        ids, flags = (torch.from_numpy(array) for array in table.example(int(index)))
        log_p = trainer.model(ids[None]).logits[0].detach().log_softmax(-1)
        total -= float(log_p[:-1].gather(1, ids[1:, None])[flags[1:]].sum())
    assert values == pytest.approx([total / int(table.targets[indices].sum())] * 3, rel=FLOAT64 * 10)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_keep_best_writes_the_cores_of_the_lowest_evaluation_loss(tmp_path, keep):
    # Validation records whose answers contradict the training records: their loss falls (shorter than 300 ways to go
    # on) and then rises.
    write_toy(tmp_path)
    (tmp_path / "other.jsonl").write_text(json.dumps({"instruction": "1+2", "output": "~"}) + "\n")
    data = {"validation_size": 0, "validation": [{"path": str(tmp_path / "other.jsonl")}]}
    settings = {"max_steps": 30, "eval_every": 1, "keep": keep, "learning_rate": 0.1}
    recipe = toy_recipe(tmp_path, training=settings, data=data)
    train(recipe, quiet())
    losses = [line["eval_loss"] for line in metrics(tmp_path / "run")]
    assert min(losses) < losses[-1] - 1e-3, "the last cores must not be the best, or this test proves nothing"
    opened = reopen(tmp_path / "run", quiet(), CPU)
    trainer = make_trainer(recipe)
    trainer.adapter.set_cores(list(opened.adapter.cores))
    wanted = min(losses) if keep == "best" else losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=FLOAT32)
    assert opened.description["best_loss"] == min(losses)
    assert opened.description["step"] == (losses.index(min(losses)) + 1 if keep == "best" else 30)


def test_an_evaluation_that_is_not_finite_is_no_gain(tmp_path, monkeypatch):
    losses = iter([math.nan, 2.0, math.inf, 1.0])
    monkeypatch.setattr(loop.Trainer, "evaluate", lambda self: {"eval_loss": next(losses)})
    recipe = toy_recipe(tmp_path, training={"max_steps": 4, "eval_every": 1, "keep": "best"})
    train(recipe, quiet())
    assert [line["eval_loss"] for line in metrics(tmp_path / "run")] == [None, 2.0, None, 1.0]
    _, saved, _ = checkpoint.newest_valid(tmp_path / "run" / "checkpoints", recipe, make_trainer(recipe).expected())
    assert saved is not None and (saved.progress.best_loss, saved.progress.best_step) == (1.0, 4)


def test_early_stopping(tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 9.0, 9.0])
    monkeypatch.setattr(loop.Trainer, "evaluate", lambda self: {"eval_loss": next(losses)})
    settings = {"max_steps": 50, "eval_every": 2, "early_stopping_patience": 3, "save_every": "never"}
    recipe = toy_recipe(tmp_path, training=settings)
    train(recipe, quiet())
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] == 14, "4 gains, then 3.5, 3.0, 9.0 are none"
    train(recipe, again := quiet())  # a run that has stopped early is finished
    assert "resuming after step 14" in said(again) and len(metrics(tmp_path / "run")) == 14

"""What a run hands over: something that it has learned, with finite values, or nothing and the reason."""

import math

import pytest
import torch

from metatt_scale.cli import main
from metatt_scale.ending import DivergedError
from metatt_scale.training import checkpoint, loop, optimizer, train
from metatt_scale.training.checks import check_result, values_digest
from tests.model.test_going_on import recipe_of
from tests.toy import make_trainer, one_step, quiet, toy_classifier, toy_recipe

METHODS = {
    "metatt_4d": {"rank": 4},
    "metatt_5d": {"rank": 4},
    "lotr": {"rank": 4},
    "lorta": {"rank": 4},
    "mtl_lora": {"rank": 4},
    "moe_lora": {"rank": 4},
    "loretta_adp": {"loretta": {"bottleneck": 8, "tensor_rank": 3}},
    "loretta_rep": {"rank": 4, "loretta": {"tensor_rank": 3}},
    "lora": {"rank": 4},
    "vera": {"rank": 4},
    "adalora": {"rank": 4},
    "full": {},
}
ONE_STEP = {"max_steps": 1, "eval_every": "never"}


def toy_of(folder, kind, **sections):
    adapter = {"kind": kind, "rank": 16, "alpha": 1.0 if kind == "lora" else 2.0, **METHODS.get(kind, {})}
    return toy_recipe(folder, adapter=adapter, **sections)


@pytest.mark.parametrize("kind", METHODS)
def test_a_result_that_adds_nothing_or_is_its_start_is_refused(tmp_path, kind):
    two_steps = {
        **ONE_STEP,
        "max_steps": 2,
    }  # after one AdaLoRA has no scores to allocate rank by, and takes all away
    trainer = make_trainer(toy_of(tmp_path, kind, training=two_steps), dtype=None)
    trainer.progress.target_tokens = 1
    trainer.progress.start_values = values_digest(trainer.adapter)
    assert trainer.adapter.is_zero() == (kind != "full")
    with pytest.raises(ValueError, match=r"training\.learning_rate") as caught:
        check_result(trainer.adapter, trainer.progress)
    assert not isinstance(caught.value, DivergedError)
    for _ in range(2):
        one_step(trainer)
    assert not trainer.adapter.is_zero() and values_digest(trainer.adapter) != trainer.progress.start_values
    check_result(trainer.adapter, trainer.progress)


def test_one_step_trains_and_a_rate_that_rounds_to_nothing_is_told(tmp_path, monkeypatch, capsys):
    train(toy_recipe(tmp_path, training=ONE_STEP, output_dir=str(tmp_path / "one")), quiet())
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.0)
    recipe = toy_recipe(tmp_path, training=ONE_STEP)
    (tmp_path / "r.json").write_text(recipe.model_dump_json())
    assert main(["train", str(tmp_path / "r.json")]) == 2
    assert "training.learning_rate" in capsys.readouterr().err and not (tmp_path / "run" / "adapter").exists()
    assert main(["train", str(tmp_path / "r.json")]) == 2, "nor when it goes on from its last checkpoint"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_warm_start_that_stays_as_it_was_is_told(tmp_path, monkeypatch):
    first = train(recipe_of(tmp_path, ("even",), output="first", training=ONE_STEP), quiet())
    again = recipe_of(tmp_path, ("even",), output="again", start_from=str(first.folder), training=ONE_STEP)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="started from"):
        patch.setattr(loop, "learning_rate", lambda *_: 0.0)
        train(again, quiet())
    onward = recipe_of(tmp_path, ("even",), output="onward", start_from=str(first.folder), training=ONE_STEP)
    train(onward, quiet())


def test_a_head_that_trains_alone_is_told_from_its_start(tmp_path, monkeypatch):
    adapter = {"kind": "head_only", "rank": 16, "alpha": 2.0, "target_modules": ["q_proj", "v_proj"], "init": None}
    recipe = toy_classifier(tmp_path, adapter=adapter, classifier={"head": "trained"}, training=ONE_STEP)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="started from"):
        patch.setattr(loop, "learning_rate", lambda *_: 0.0)
        train(recipe, quiet())
    train(recipe.model_copy(update={"output_dir": str(tmp_path / "other")}), quiet())


# ---- evaluations


@pytest.mark.parametrize(
    "losses, keep, diverged",
    [
        ([2.0, math.nan], "last", True),
        ([2.0, math.inf], "last", True),
        ([math.nan, 2.0], "last", False),
        ([2.0, math.nan], "best", False),
        ([math.nan, math.nan], "best", True),
    ],
)
def test_values_whose_last_evaluation_is_not_finite_are_not_handed_over(
    tmp_path, monkeypatch, losses, keep, diverged
):
    recipe = toy_recipe(tmp_path, training={"max_steps": 2, "eval_every": 1, "save_every": 1, "keep": keep})
    (tmp_path / "r.json").write_text(recipe.model_dump_json())
    given = iter(losses)
    monkeypatch.setattr(loop.Trainer, "evaluate", lambda self: {"eval_loss": next(given)})
    wanted = 3 if diverged else 0
    assert main(["train", str(tmp_path / "r.json")]) == wanted
    assert main(["train", str(tmp_path / "r.json")]) == wanted, "the finished run is looked at again"
    assert (tmp_path / "run" / "adapter").exists() == (not diverged)
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-000001", "step-000002"]


# ---- values that are not finite any more


SWEEP = {"unit": "step", "schedule": [{"after": 4, "rank": 2}]}
WAYS = {
    "before an evaluation": {},
    "before a save": {"training": {"eval_every": "never"}},
    "before a sweep": {"sweep": SWEEP, "training": {"eval_every": "never", "save_every": 3}},
    "in local steps": {"sweep": {**SWEEP, "local_steps": 1}, "training": {"eval_every": "never", "save_every": 3}},
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_values_that_are_not_finite_end_the_run_as_diverged(tmp_path, monkeypatch, way, value):
    """With the last good ones in a checkpoint, and never LAPACK's own error."""
    settings = {"max_steps": 8, "eval_every": 1, "save_every": 1, **WAYS[way].get("training", {})}
    rest = {key: section for key, section in WAYS[way].items() if key != "training"}
    recipe = toy_recipe(tmp_path, training=settings, **rest)
    step, calls = optimizer.torch.optim.AdamW.step, []

    def overflow(self, closure=None):
        step(self, closure)
        calls.append(0)
        if len(calls) == (5 if way == "in local steps" else 4):
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0, 0] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(DivergedError, match=r"step-000003; lower training"):
        train(recipe, quiet())
    assert not (tmp_path / "run" / "adapter").exists()
    newest = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    saved = checkpoint.load(newest, recipe, make_trainer(recipe).expected())
    assert saved.progress.step == 3


def test_weight_decay_that_overflows_is_diverged(tmp_path):
    settings = {"max_steps": 60, "weight_decay": 100.0, "learning_rate": 100.0, "schedule": "constant"}
    recipe = toy_recipe(tmp_path, training={**settings, "warmup_ratio": 0.0, "eval_every": 20, "max_grad_norm": 0.0})
    with pytest.raises(DivergedError):
        train(recipe, quiet())

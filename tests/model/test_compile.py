"""Runs whose layers are compiled: the same losses to rounding."""

import pytest
import torch

from metatt_scale.training import loop, run, train
from tests.toy import metrics, quiet, toy_recipe, write_toy

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler about itself


def test_layers_are_compiled_after_the_trials(tmp_path, monkeypatch):
    done = []
    tried = loop.make_objective
    monkeypatch.setattr(loop, "make_objective", lambda *given: done.append("tried") or tried(*given))
    monkeypatch.setattr(run, "compile_layers", lambda model: done.append("compiled"))
    train(toy_recipe(tmp_path, backbone={"compile": True}, training={"max_steps": 1}), quiet())
    assert done == ["tried", "compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_compiled_layers_learn_the_same(tmp_path, packing, checkpointing):
    write_toy(tmp_path)
    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        recipe = toy_recipe(
            tmp_path,
            output_dir=str(tmp_path / f"run-{compiled}"),
            backbone={"compile": compiled, "gradient_checkpointing": checkpointing},
            training={"packing": packing, "micro_batch_size": 5},
        )
        trained = train(recipe, quiet())
        done = [layer._compiled_call_impl is not None for layer in trained.model.model.layers]  # type: ignore[union-attr]
        assert all(done) == any(done) == compiled
        losses[compiled] = [line["loss"] for line in metrics(tmp_path / f"run-{compiled}")]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]

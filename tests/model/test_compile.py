"""Runs whose layers are compiled: the same losses to rounding."""

import pytest
import torch

from metatt_scale.training import train
from tests.toy import metrics, quiet, toy_recipe, write_toy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the compiler about itself
]


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
        run = train(recipe, quiet())
        done = [layer._compiled_call_impl is not None for layer in run.model.model.layers]  # type: ignore[union-attr]
        assert all(done) == any(done) == compiled
        losses[compiled] = [line["loss"] for line in metrics(tmp_path / f"run-{compiled}")]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]

"""Several tasks of uneven sizes on two ranks, replicated and sharded: losses, scores and values of one process."""

import pytest
from safetensors.torch import load_file

from metatt_scale.recipe import dump_recipe
from metatt_scale.training import train
from tests.distributed.jobs import TRAIN, finish, torchrun
from tests.model.test_tasks import toy_tasks
from tests.tiny import FLOAT32, relative
from tests.toy import metrics, quiet


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["metatt_4p1d", "mtl_lora"])
@pytest.mark.parametrize("strategy", ["replicate", "fsdp2"])
def test_two_ranks_train_tasks_together_as_one(tmp_path, kind, strategy):
    """The ranks compare the bits of all values and moments after every step, and stop at a difference."""

    def recipe(name, **parallel):
        steps = {"micro_batch_size": 3, "max_steps": 3, "learning_rate": 1e-3}
        every = {"check_replicas_every": 1, **parallel}
        return toy_tasks(tmp_path, kind=kind, output_dir=str(tmp_path / name), training=steps, parallel=every)

    one = train(recipe("one"), quiet()).folder
    two, file = tmp_path / "two", tmp_path / "two.yaml"
    file.write_text(dump_recipe(recipe("two", backbone=strategy)))
    finish(torchrun(TRAIN, file), tmp_path / "log")
    for alone, shared in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "grad_norm", *(name for name in alone if name.startswith("eval_"))):
            assert shared[name] == pytest.approx(alone[name], rel=FLOAT32), (shared["step"], name)
    alone, shared = (load_file(folder / "adapter/metatt.safetensors") for folder in (one, two))
    for name, value in alone.items():
        assert relative(shared[name], value) < FLOAT32, name

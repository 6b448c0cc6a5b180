"""A classifier on two ranks, replicated and sharded: the steps, the scores and the head of one process."""

import pytest

from metatt_scale.recipe import dump_recipe
from metatt_scale.training import train
from tests.distributed.jobs import TRAIN, finish, torchrun
from tests.tiny import FLOAT32
from tests.toy import BERT, UNDROPPED, metrics, quiet, toy_classifier

SCORES = {1: ("eval_loss", "eval_pearson", "eval_spearman"), 2: ("eval_loss", "eval_accuracy", "eval_matthews")}


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "labels"), [("replicate", 1), ("replicate", 2), ("fsdp2", 2)])
def test_two_ranks_train_and_score_as_one(tmp_path, strategy, labels):
    def recipe(name, parallel):
        same = {
            "training": {"micro_batch_size": 4, "max_steps": 3},
            "classifier": {"labels": labels, "init_bias": "labels"},
        }
        config, target = {**BERT, **UNDROPPED}, str(tmp_path / name)
        return toy_classifier(tmp_path, config=config, output_dir=target, parallel=parallel, **same)

    one = train(recipe("one", {}), quiet()).folder
    two, file = tmp_path / "two", tmp_path / "two.yaml"
    file.write_text(dump_recipe(recipe("two", {"backbone": strategy})))
    finish(torchrun(TRAIN, file), tmp_path / "log")
    assert (one / "adapter/head.safetensors").read_bytes() == (two / "adapter/head.safetensors").read_bytes()
    for alone, shared in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "grad_norm", *(SCORES[labels] if "eval_loss" in alone else ())):
            assert shared[name] == pytest.approx(alone[name], rel=FLOAT32), (shared["step"], name)

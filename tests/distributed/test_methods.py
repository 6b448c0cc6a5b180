"""Adapters that are no chain on two ranks, replicated and sharded: the steps and scores of one process."""

import pytest

from metatt_scale.recipe import dump_recipe, validate
from metatt_scale.training import train
from tests.distributed.jobs import TRAIN, finish, torchrun
from tests.tiny import FLOAT32
from tests.toy import BERT, UNDROPPED, metrics, quiet, toy_classifier

LORA = {"rank": 4, "alpha": 4.0, "target_modules": ["query", "value"]}
ADAPTERS = {
    "metatt_4d": {**LORA, "init": "ze-id-id-id"},
    "mtl_lora": LORA,
    "moe_lora": LORA,
    "loretta_rep": LORA,
    "loretta_adp": {"alpha": 4.0},
    "head_only": {},
    "full": {},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [*((kind, "replicate") for kind in ADAPTERS), ("mtl_lora", "fsdp2"), ("loretta_adp", "fsdp2")],
)
def test_two_ranks_train_adapter_and_head_as_one(tmp_path, kind, strategy):
    def recipe(name, parallel):
        steps = {"micro_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3}
        plain = toy_classifier(
            tmp_path,
            config={**BERT, **UNDROPPED},
            output_dir=str(tmp_path / name),
            classifier={"labels": 2, "head": "trained"},
            parallel=parallel,
            training=steps,
        )
        return validate(plain.model_dump(mode="json") | {"adapter": {"kind": kind, **ADAPTERS[kind]}}, "toy")

    one = train(recipe("one", {}), quiet()).folder
    two, file = tmp_path / "two", tmp_path / "two.yaml"
    file.write_text(dump_recipe(recipe("two", {"backbone": strategy})))
    finish(torchrun(TRAIN, file), tmp_path / "log")
    assert not (two / "adapter/head.safetensors").exists()
    for alone, shared in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "grad_norm", *(name for name in alone if name.startswith("eval_"))):
            assert shared[name] == pytest.approx(alone[name], rel=FLOAT32), (shared["step"], name)

"""Chains through the real `train` on the fake device, and again from a checkpoint: placement, and no waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metatt_scale.recipe import Recipe, validate
from tests.fake_cuda.fixtures import RARELY, STEPS, check_queue, resume_on_gpu, run_on_gpu
from tests.toy import BERT, ROBERTA, toy, toy_classifier, toy_recipe, write_toy

TASKS = {"a": {}, "b": {}}
SWEEP = {"unit": "step", "schedule": [{"after": 2, "rank": 2}]}


def chain(folder: Path, **sections: Any) -> Recipe:
    return toy_recipe(folder, logging=RARELY, **({"training": STEPS} | sections))


def tasks(folder: Path, **adapter: Any) -> Recipe:
    """Two tasks that are learnt together by a chain with a core for them."""
    write_toy(folder)
    records = [{"path": str(folder / "data.jsonl"), "task": name} for name in TASKS]
    kind = {"kind": "metatt_4p1d", **adapter}
    return validate(
        toy(folder, tasks=TASKS, data={"train": records}, adapter=kind, training=STEPS, logging=RARELY), "toy"
    )


CHAINS = {
    "4d": {},
    "5d": {"adapter": {"kind": "metatt_5d"}},
    "lorta": {"adapter": {"kind": "lorta"}},
    "lotr": {"adapter": {"kind": "lotr"}},
    "reference arithmetic": {"adapter": {"operator": "reference"}},
    "some layers": {"adapter": {"layers": [0, 2]}},
    "padded": {"training": {**STEPS, "packing": False}},
    "padded, one example at a time": {"training": {**STEPS, "packing": False, "micro_batch_size": 1}},
    "checkpointing": {"backbone": {"gradient_checkpointing": True, "dtype": "bfloat16"}},
    "half precision": {"backbone": {"dtype": "float16"}},
    "keep the best": {"training": {**STEPS, "keep": "best", "eval_every": 2}},
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_trains_and_resumes_on_the_device_without_waits(tmp_path: Path, name: str) -> None:
    recipe = chain(tmp_path, **CHAINS[name])
    check_queue(run_on_gpu(recipe))
    check_queue(resume_on_gpu(recipe))


@pytest.mark.parametrize("packing", [True, False])
def test_a_chain_of_tasks(tmp_path: Path, packing: bool) -> None:
    recipe = tasks(tmp_path)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"packing": packing})})
    check_queue(run_on_gpu(recipe))
    check_queue(resume_on_gpu(recipe))


@pytest.mark.parametrize(
    "config, classifier",
    [(BERT, {"labels": 2}), (ROBERTA, {"labels": 2}), (BERT, {"labels": 1, "head": "trained"})],
    ids=["bert", "roberta", "regression with a trained head"],
)
def test_a_classifier(tmp_path: Path, config: dict, classifier: dict) -> None:
    recipe = toy_classifier(tmp_path, config=config, classifier=classifier, training=STEPS, logging=RARELY)
    check_queue(run_on_gpu(recipe))
    check_queue(resume_on_gpu(recipe))


@pytest.mark.parametrize(
    "how",
    [{}, {"moments": "transport"}, {"importance": "sensitivity"}, {"local_steps": 1}],
    ids=["magnitude", "moments are transported", "sensitivity", "local steps"],
)
def test_a_sweep(tmp_path: Path, how: dict) -> None:
    recipe = chain(tmp_path, sweep={**SWEEP, **how}, training={**STEPS, "eval_every": "never"})
    done = run_on_gpu(recipe)
    check_queue(done)
    assert set(done.run.adapter.spec.ranks) == {2}
    check_queue(resume_on_gpu(recipe))

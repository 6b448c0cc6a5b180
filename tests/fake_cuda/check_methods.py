"""Every adapter that is no chain through the real `train` on the fake device, and again from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metatt_scale.recipe import Recipe, validate
from tests.fake_cuda.fixtures import RARELY, STEPS, check_queue, resume_on_gpu, run_on_gpu, shown
from tests.toy import toy, toy_classifier, write_toy

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
ALONE = {
    "lora": {"rank": 4, "alpha": 2.0, **TARGETS},
    "pissa": {"kind": "lora", "rank": 4, "alpha": 2.0, "init": "pissa", **TARGETS},
    "vera": {"rank": 8, **TARGETS},
    "loretta_rep": {"rank": 4, "alpha": 2.0, **TARGETS},
    "loretta_adp": {"alpha": 2.0, "loretta": {"bottleneck": 8, "tensor_rank": 3}},
    "full": {},
}
BY_TASK = {"mtl_lora": {"rank": 4, "alpha": 1.0, **TARGETS}, "moe_lora": {"rank": 8, "alpha": 1.0, **TARGETS}}


def method(folder: Path, adapter: dict[str, Any], *, tasks: bool = False) -> Recipe:
    write_toy(folder)
    recipe = toy(folder, training=STEPS, logging=RARELY)
    recipe["adapter"] = adapter
    if tasks:
        recipe["tasks"] = {"a": {}, "b": {}}
        recipe["data"]["train"] = [{"path": str(folder / "data.jsonl"), "task": name} for name in recipe["tasks"]]
    return validate(recipe, "toy")


@pytest.mark.parametrize("name", ALONE)
def test_a_method_trains_and_resumes_on_the_device_without_waits(tmp_path: Path, name: str) -> None:
    recipe = method(tmp_path, {"kind": name, **ALONE[name]})
    check_queue(run_on_gpu(recipe))
    check_queue(resume_on_gpu(recipe))


@pytest.mark.parametrize("name", BY_TASK)
def test_a_method_of_tasks(tmp_path: Path, name: str) -> None:
    recipe = method(tmp_path, {"kind": name, **BY_TASK[name]}, tasks=True)
    check_queue(run_on_gpu(recipe))
    check_queue(resume_on_gpu(recipe))


def test_a_head_alone(tmp_path: Path) -> None:
    recipe = toy_classifier(tmp_path, classifier={"labels": 2, "head": "trained"}, training=STEPS, logging=RARELY)
    recipe = recipe.model_copy(update={"adapter": type(recipe.adapter)(kind="head_only")})
    check_queue(run_on_gpu(recipe))
    check_queue(resume_on_gpu(recipe))


def test_adalora_waits_for_its_own_allocation_only(tmp_path: Path) -> None:
    budget = {"init_r": 4, "tinit": 1, "tfinal": 1, "deltaT": 1}
    recipe = method(tmp_path, {"kind": "adalora", "rank": 2, "alpha": 2.0, "adalora": budget, **TARGETS})
    for done in (run_on_gpu(recipe), resume_on_gpu(recipe)):
        others = [wait for wait in done.record.in_step() if wait.function != "adalora.py:stepped"]
        assert not others, "\n".join(shown(others))

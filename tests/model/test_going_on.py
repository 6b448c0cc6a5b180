"""A run that goes on from another one's chain: same function at the start, more tasks, and what is forgotten."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from metatt_scale.reopen import reopen
from metatt_scale.training import TrainingStopped, train
from metatt_scale.training.loop import Trainer
from tests.model.test_tasks import records, toy_tasks
from tests.tiny import FLOAT32
from tests.toy import (
    BERT,
    CPU,
    LLAMA,
    UNDROPPED,
    make_trainer,
    metrics,
    quiet,
    said,
    toy_classifier,
    toy_recipe,
    write_toy,
)

FIRST, SECOND = ("even", "sum"), ("digit", "sum", "even")


def recipe_of(folder, names, *, kind="metatt_4p1d", output="run", start_from=None, **sections):
    write_toy(folder, config={**BERT, **UNDROPPED})
    records(folder)
    known = {"even": {"labels": 2}, "digit": {"labels": 3}, "sum": {"labels": 1}}
    sources = [{"path": str(folder / f"{name}.jsonl"), "task": name} for name in names]
    return toy_tasks(
        folder,
        kind=kind,
        output_dir=str(folder / output),
        tasks={name: known[name] for name in names},
        data={"train": sources, "validation": sources},
        adapter={"start_from": start_from} if start_from else {},
        **sections,
    )


def scores(trainer):
    return {name: score for name, score in trainer.evaluate().items() if name.startswith(("eval_even", "eval_sum"))}


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("kinds", [("metatt_4p1d", "metatt_4p1d"), ("metatt_4d", "metatt_4p1d")])
def test_known_tasks_start_where_the_other_run_ended(tmp_path, head, kinds):
    """With a task more, in another order, and (from 4D) with a core for tasks that was not there."""
    classifier = {"head": head}
    long = {"max_steps": 10}  # after fewer steps a correlation is almost 0, and has no digits to compare
    first = train(
        recipe_of(tmp_path, FIRST, kind=kinds[0], output="first", classifier=classifier, training=long), quiet()
    )
    start = {"kind": kinds[1], "start_from": str(first.folder), "classifier": classifier}
    before, after = make_trainer(recipe_of(tmp_path, FIRST, kind=kinds[0], classifier=classifier)), None
    before.adapter.set_values(reopen(first.folder, quiet(), CPU).adapter.tensors())
    after = make_trainer(recipe_of(tmp_path, SECOND, **start))
    assert scores(after) == pytest.approx(scores(before), rel=FLOAT32)
    if kinds[0] == "metatt_4p1d":
        old, new = before.adapter.cores[2], after.adapter.cores[2]
        assert torch.equal(new[:, 0], old.mean(1)) and torch.equal(new[:, 1], old[:, 1])


def test_what_is_forgotten_is_reported(tmp_path):
    first = train(recipe_of(tmp_path, FIRST, output="first"), quiet())
    recipe = recipe_of(tmp_path, SECOND, start_from=str(first.folder))
    run = train(recipe, quiet())
    lines = [line for line in metrics(run.folder) if "eval_loss" in line]
    start = json.loads(next((run.folder / "checkpoints").glob("step-*/state.json")).read_text())
    before = start["progress"]["start_scores"]
    for line in lines:
        assert line["forgetting"].keys() == {"even", "sum"}
        assert line["forgetting"]["even"] == pytest.approx(before["eval_even_accuracy"] - line["eval_even_accuracy"])
    again = train(recipe, quiet())  # finished: nothing is evaluated anew
    assert np.allclose([c.detach() for c in again.adapter.cores[0]], [c.detach() for c in run.adapter.cores[0]])


def test_a_stopped_run_no_longer_needs_the_other_one(tmp_path, monkeypatch):
    """Its checkpoint has the frozen head of the first run, which no seed gives, and the names of its tasks."""
    first = train(recipe_of(tmp_path, FIRST, output="first"), quiet())
    recipe = recipe_of(tmp_path, SECOND, start_from=str(first.folder), seed=2)
    expected = train(recipe, quiet())
    last = max((expected.folder / "checkpoints").iterdir())
    assert any(name.startswith("head:") for name in load_file(last / "state.safetensors"))
    again = recipe_of(tmp_path, SECOND, start_from=str(first.folder), seed=2, output="again")
    launch = Trainer._launch

    def stop_after_three(self):
        launch(self)
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        patch.setattr(Trainer, "_launch", stop_after_three)
        train(again, quiet())
    shutil.rmtree(first.folder)
    found = train(again, quiet())
    for name in ("metatt.safetensors", "head.safetensors"):
        one, other = (load_file(run.folder / "adapter" / name) for run in (found, expected))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert metrics(found.folder)[-1]["forgetting"].keys() == {"even", "sum"}


def test_a_language_model_goes_on(tmp_path):
    first = train(toy_recipe(tmp_path, output_dir=str(tmp_path / "first")), quiet())
    recipe = toy_recipe(tmp_path, adapter={"start_from": str(first.folder / "adapter")})
    trainer = make_trainer(recipe)
    assert all(torch.equal(a, b) for a, b in zip(trainer.adapter.cores, first.adapter.cores, strict=True))
    lines = [line for line in metrics(train(recipe, quiet()).folder) if "forgetting" in line]
    assert lines and lines[-1]["forgetting"]["all"] < 0, "the same records again: the loss goes on falling"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"adapter": {"rank": 3}}, "its core of input is"),
        ({"adapter": {"alpha": 1.0}}, "its alpha is 4.0"),
        ({"adapter": {"target_modules": ["q_proj"]}}, "behind other modules"),
        ({"adapter": {"kind": "metatt_5d"}}, "its modes are"),
        ({"adapter": {"start_from": "nowhere"}}, "no such folder"),
        ({"adapter": {"kind": "mtl_lora"}}, "`start_from` is .* which mtl_lora does not read"),
    ],
)
def test_another_form_is_refused(tmp_path, change, says):
    first = train(toy_recipe(tmp_path, output_dir=str(tmp_path / "first"), training={"max_steps": 1}), quiet())
    adapter = {"start_from": str(first.folder), **change["adapter"]}
    with pytest.raises(ValueError, match=says):
        make_trainer(toy_recipe(tmp_path, adapter=adapter))


def test_a_start_that_is_not_there_is_noticed_before_the_data_are_read(tmp_path):
    recipe = toy_recipe(tmp_path, adapter={"start_from": "nowhere"})
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(ValueError, match=r"adapter.start_from 'nowhere'.*no such folder"):
        train(recipe, quiet())


def test_other_weights_of_the_same_shapes_are_noticed(tmp_path, caplog):
    first = train(toy_recipe(tmp_path, output_dir=str(tmp_path / "first")), quiet())
    start = {"start_from": str(first.folder)}
    console = quiet()
    reopen(first.folder, console, CPU)
    make_trainer(toy_recipe(tmp_path, adapter=start))
    assert "weights" not in said(console) and not caplog.records
    recipe = toy_recipe(tmp_path, adapter=start)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**LLAMA, "initializer_range": 0.1}))
    make_trainer(recipe)
    assert "that chain was trained on other weights (random-sha256 " in caplog.text
    reopen(first.folder, console, CPU)
    assert "has other weights than the model this adapter was trained on, random-sha256 " in said(console)


def test_a_run_of_another_kind_or_without_names_for_its_labels_is_refused(tmp_path):
    low_rank = {"kind": "mtl_lora", "rank": 4}
    first = train(toy_recipe(tmp_path, output_dir=str(tmp_path / "first"), adapter=low_rank), quiet())
    with pytest.raises(ValueError, match=r"adapter.start_from .*it is of kind mtl_lora"):
        make_trainer(toy_recipe(tmp_path, adapter={"start_from": str(first.folder)}))
    unnamed = train(toy_classifier(tmp_path, output_dir=str(tmp_path / "unnamed")), quiet())
    with pytest.raises(ValueError, match="give both `tasks`"):
        make_trainer(recipe_of(tmp_path, ("even", "sum"), start_from=str(unnamed.folder)))


def test_a_known_task_may_not_be_left_out(tmp_path):
    first = train(recipe_of(tmp_path, FIRST, output="first"), quiet())
    with pytest.raises(ValueError, match="knows the task 'sum', which `tasks` does not name"):
        make_trainer(recipe_of(tmp_path, ("even", "digit"), start_from=str(first.folder)))

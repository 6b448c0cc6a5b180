"""Several tasks at once: their records, their losses, their scores, their slices; and what is refused."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from metatt_scale.data import IGNORE, Mixture, collate, micro_batches
from metatt_scale.data.sampling import passes
from metatt_scale.recipe import STEP_NUMBERS, DataRecipe, validate
from metatt_scale.training import train
from tests.tiny import FLOAT32, randomise
from tests.toy import BERT, UNDROPPED, make_trainer, metrics, one_step, quiet, said, toy, toy_recipe, write_toy

KINDS = ["metatt_4d", "metatt_4p1d", "metatt_5p1d"]
NAMES = ("even", "digit", "sum")


def alike(names=NAMES, **keys):
    return {name: keys for name in names}


def records(folder):
    """Three tasks on pairs of numbers: are both even, their last digit modulo 3, and their sum."""
    sizes = {"even": 60, "digit": 30, "sum": 20}
    for task, size in sizes.items():
        lines = []
        for i in range(size):
            a, b = i * 7 % 131, i * 5 % 97
            label = {"even": int((a + b) % 2 == 0), "digit": (a + b) % 3, "sum": (a + b) / 50}[task]
            lines.append(json.dumps({"one": str(a), "two": str(b), "text": f"{a} {b}", "label": label, "of": task}))
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return sizes


def toy_tasks(folder, *, kind="metatt_4p1d", **sections):
    write_toy(folder, config={**BERT, **UNDROPPED})
    records(folder)
    tasks = {"even": {"labels": 2}, "digit": {"labels": 3, "metric": "matthews"}, "sum": {"labels": 1}}
    tasks["sum"]["text_fields"] = ["text"]
    sources = [{"path": str(folder / f"{task}.jsonl"), "task": task} for task in tasks]
    wanted = {
        "classifier": {"init_std": 0.5},
        "tasks": tasks,
        "adapter": {"kind": kind, "target_modules": ["query", "value"]},
        "data": {
            "format": "sentences",
            "text_fields": ["one", "two"],
            "train": sources,
            "validation": sources,
            "validation_size": 0,
        },
    }
    for name, keys in sections.items():
        wanted[name] = {**wanted.get(name, {}), **keys} if isinstance(keys, dict) and name != "tasks" else keys
    return validate(toy(folder, **wanted), "toy")


# ---- the joint loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_joint_loss_is_the_sum_of_the_tasks_means(tmp_path, kind):
    """Loss and gradient of a mixed global batch, by hand, example by example, in float64."""
    trainer = make_trainer(toy_tasks(tmp_path, kind=kind), torch.float64)
    randomise(trainer.adapter)
    table, (_, indices) = trainer.data.table, trainer.order.global_batch(0)
    counts = np.bincount(table.tasks[indices], minlength=3)
    assert (counts > 0).all() and len(set(counts)) > 1
    loss, _ = trainer._accumulate(indices, len(indices), 0)
    found = [core.grad.clone() for core in trainer.adapter.cores]
    trainer.adapter.zero_grad()

    total = torch.zeros((), dtype=torch.float64)
    for index in indices:
        task = int(table.tasks[index])
        batch, whole = collate(table, [index], 0), slice(int(table.lengths[index]))
        trainer.adapter.row_tasks = torch.tensor([[task]])
        (logits,) = trainer.model(batch.input_ids_BS[:, whole], token_type_ids=batch.segments_BS[:, whole]).logits
        if task == 2:
            own = (logits[5] - table.values[index]).square()
        else:
            start, width = ((0, 2), (2, 3))[task]
            own = F.cross_entropy(logits[start : start + width], torch.tensor(int(table.classes[index])))
        term = own / int(counts[task])
        term.backward()
        total += term.detach()
    trainer.adapter.pull_back()
    assert float(loss) / len(indices) == pytest.approx(float(total), rel=FLOAT32)  # the weights are fp32
    for core, gradient in zip(trainer.adapter.cores, found, strict=True):
        assert (core.grad - gradient).norm() < FLOAT32 * gradient.norm()


def test_ranks_and_micro_batches_change_nothing(tmp_path):
    whole = make_trainer(toy_tasks(tmp_path, training={"micro_batch_size": 16}), torch.float64)
    parts = make_trainer(toy_tasks(tmp_path, training={"micro_batch_size": 3}), torch.float64)
    assert one_step(whole)["loss"] == pytest.approx(one_step(parts)["loss"], rel=1e-6)
    assert whole.evaluate() == pytest.approx(parts.evaluate(), rel=1e-6)
    table, (_, indices) = whole.data.table, whole.order.global_batch(0)
    weights = whole.objective.weights(table, indices)
    total = 0.0
    with torch.no_grad():
        for rank in range(3):
            for batch in micro_batches(table, indices, micro_batch_size=2, rank=rank, world_size=3, pad_token_id=0):
                whole.adapter.row_tasks = batch.tasks_BS
                total += float(whole.objective.loss_sum(batch, weights))
        whole.adapter.row_tasks = (batch := collate(table, indices, 0)).tasks_BS
        assert total == pytest.approx(float(whole.objective.loss_sum(batch, weights)), rel=1e-9)


def test_a_task_that_a_batch_lacks_costs_nothing(tmp_path):
    trainer = make_trainer(toy_tasks(tmp_path))
    table = trainer.data.table
    only = np.flatnonzero(table.tasks == 1)[:4]
    loss, _ = trainer._accumulate(only, 4, 0)
    gradient = trainer.adapter.cores[2].grad
    assert np.isfinite(float(loss)) and (gradient is None or bool(torch.isfinite(gradient).all()))


def test_labels_of_other_kinds_say_nothing(tmp_path):
    table = make_trainer(toy_tasks(tmp_path)).data.table
    assert (table.classes[table.tasks == 2] == IGNORE).all() and (table.classes[table.tasks != 2] >= 0).all()
    assert np.isnan(table.values[table.tasks != 2]).all() and np.isfinite(table.values[table.tasks == 2]).all()


@pytest.mark.parametrize("packing", ["auto", False])
def test_tasks_of_a_language_model(tmp_path, packing):
    """The fused head with weights, packed and padded: loss and gradient of tokens weighed by their task."""
    write_toy(tmp_path)
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    marked = [{**json.loads(line), "source": "ab"[i % 3 == 0]} for i, line in enumerate(lines)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, marked)) + "\n")
    source = {"path": str(tmp_path / "data.jsonl")}
    sources = [{**source, "task": name, "where": {"source": name}} for name in "ab"]
    recipe = toy_recipe(
        tmp_path,
        tasks={"a": {}, "b": {}},
        adapter={"kind": "metatt_4p1d"},
        data={"train": sources, "validation": sources, "validation_size": 0},
        training={"packing": packing, "max_steps": 4},
    )
    trainer = make_trainer(recipe, torch.float64)
    randomise(trainer.adapter)
    assert trainer.objective.packed == (packing == "auto")
    table, (_, indices) = trainer.data.table, trainer.order.global_batch(0)
    assert sorted(np.bincount(table.tasks)) == [27, 53]
    tokens = trainer.objective.denominator(table, indices)
    loss, _ = trainer._accumulate(indices, tokens, 0)
    expected = 0.0
    for task in range(2):
        own = indices[table.tasks[indices] == task]
        with torch.no_grad():
            sums = [trainer.objective.loss_sum(batch) for batch in trainer._own_batches(table, own)]
        expected += float(sum(sums)) / int(table.targets[own].sum())
    assert float(loss) / tokens == pytest.approx(expected, rel=FLOAT32)
    train(recipe, quiet())
    line = metrics(tmp_path / "run")[-1]
    assert line["eval_loss"] == pytest.approx(line["eval_a_loss"] + line["eval_b_loss"], rel=FLOAT32)


# ---- a run


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_scores_every_task_and_keeps_the_best_mean(tmp_path, kind):
    training = {"max_steps": 12, "eval_every": 3, "keep": "best", "best_by": "metric", "learning_rate": 3e-3}
    run = train(toy_tasks(tmp_path, kind=kind, training=training), quiet())
    lines = [line for line in metrics(run.folder) if "eval_loss" in line]
    for line in lines:
        wanted = (line["eval_even_accuracy"], line["eval_digit_matthews"], line["eval_sum_spearman"])
        assert line["eval_mean"] == pytest.approx(sum(wanted) / 3, rel=FLOAT32)
        assert line["eval_loss"] == pytest.approx(sum(line[f"eval_{name}_loss"] for name in NAMES), rel=FLOAT32)
    best = max(lines, key=lambda line: line["eval_mean"])
    assert json.loads((run.folder / "adapter" / "metatt.json").read_text())["step"] == best["step"]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def test_each_task_core_slice_learns_from_its_own_records_alone(tmp_path):
    trainer = make_trainer(toy_tasks(tmp_path))
    randomise(trainer.adapter)
    table = trainer.data.table
    only = np.flatnonzero(table.tasks == 1)[:4]
    trainer._accumulate(only, 4, 0)
    norms = trainer.adapter.cores[2].grad.norm(dim=(0, 2))
    assert norms[1] > 0 and norms[0] == norms[2] == 0


def test_one_named_task_is_scored_like_several(tmp_path):
    """The first step of sequential learning."""
    write_toy(tmp_path, config={**BERT, **UNDROPPED})
    records(tmp_path)
    source = [{"path": str(tmp_path / "even.jsonl"), "task": "even"}]
    training = {"max_steps": 3, "keep": "best", "best_by": "metric"}
    data = {"train": source, "validation": source}
    run = train(toy_tasks(tmp_path, tasks={"even": {"labels": 2}}, data=data, training=training), quiet())
    line = metrics(run.folder)[-1]
    assert line["eval_mean"] == line["eval_even_accuracy"]


def test_evaluations_have_the_keys_that_follow_from_the_recipe_and_headlines_are_shown(tmp_path):
    recipe, console = toy_tasks(tmp_path, training={"max_steps": 3, "eval_every": 2}, logging={"every": 5}), quiet()
    lines = metrics(train(recipe, console).folder)
    assert {key for key in lines[-1] if key.startswith("eval_")} == set(recipe.evaluation_keys)
    assert set(STEP_NUMBERS) <= set(lines[-1])
    shown = [line for line in said(console).splitlines() if line.startswith("step ")]
    assert len(shown) == 3, "the first, and each with an evaluation"
    for key in ("mean", "even_accuracy", "digit_matthews", "sum_spearman"):
        assert f"  {key} {lines[-1][f'eval_{key}']:.4f}  " in shown[-1]


def test_tasks_in_another_order_are_another_recipe(tmp_path):
    """Their order is that of the slices, and of the head's columns."""
    recipe = toy_tasks(tmp_path, training={"max_steps": 2})
    train(recipe, quiet())
    turned = recipe.model_copy(update={"tasks": dict(reversed(recipe.tasks.items()))})
    with pytest.raises(ValueError, match="tasks were in the order even, digit, sum, are in sum, digit, even"):
        train(turned, quiet())


def test_a_task_without_an_example_is_refused_before_the_first_step(tmp_path):
    few = {"validation": [], "validation_size": 2}
    with pytest.raises(ValueError, match="has no example to be judged by"):
        train(toy_tasks(tmp_path, data=few), quiet())


# ---- sampling


def shares(how, sizes=(100, 300, 25)):
    sources = [{"path": "x", "task": task} for task in ("a", "b", "c")]
    recipe = DataRecipe.model_validate({"train": tuple(sources), "sampling": how})
    mixture = Mixture(tuple(np.arange(size) for size in sizes), passes(recipe, sizes))
    return mixture.counts


def test_strategies_of_sampling():
    assert shares({}) == (100, 300, 25)
    assert shares({"strategy": "uniform"}) == (142, 142, 142)
    roots = np.sqrt([100, 300, 25])
    assert shares({"strategy": "temperature"}) == tuple(np.round(425 * roots / roots.sum()))
    assert shares({"strategy": "temperature", "temperature": 1}) == (100, 300, 25)
    assert shares({"cap": 50}) == (50, 50, 25)
    assert shares({"cap": 50, "strategy": "uniform"}) == (42, 42, 42)


def test_a_task_of_two_sources_is_one():
    sources = [{"path": "x", "task": "a"}, {"path": "y", "task": "a"}, {"path": "z", "task": "b"}]
    recipe = DataRecipe.model_validate({"train": tuple(sources), "sampling": {"strategy": "uniform"}})
    assert np.round(np.array(passes(recipe, (30, 10, 80))) * (30, 10, 80)).tolist() == [45, 15, 60]


# ---- what is refused


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tasks": {"even": {"labels": 2}}}, "of task 'digit', which `tasks` does not name"),
        ({"tasks": alike(labels=2, names=(*NAMES, "more"))}, "'more' has no source"),
        ({"tasks": alike()}, "`tasks.even.labels` is missing"),
        ({"classifier": {"labels": 2}}, "give each task its own there"),
        ({"tasks": alike(labels=1, metric="f1")}, "scored by spearman"),
        ({"tasks": {}, "classifier": {"labels": 2}}, "give all sources a task, or none"),
        ({"sampling": {"cap": 0}}, "sampling"),
        ({"sampling": {"temperature": 5.0}}, "`strategy` is proportional"),
    ],
)
def test_what_is_refused(tmp_path, change, says):
    if "sampling" in change:
        change = {"data": change}
    with pytest.raises(ValueError, match=says):
        toy_tasks(tmp_path, **change)


def test_a_task_core_without_tasks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no `tasks`"):
        toy_recipe(tmp_path, adapter={"kind": "metatt_4p1d"})


def test_where_nothing_is_is_said(tmp_path):
    source = {"path": str(tmp_path / "data.jsonl"), "where": {"source": "nobody"}}
    with pytest.raises(
        ValueError, match=r"with \{'source': 'nobody'\} \(the fields of its first record: 'instruction'"
    ):
        train(toy_recipe(tmp_path, data={"train": [source]}), quiet())

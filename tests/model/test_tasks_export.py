"""One of several tasks by itself: exported with its weights and labels, chosen by name."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from metatt_scale.cli import main
from metatt_scale.evaluation import read_scores
from metatt_scale.export import export
from metatt_scale.reopen import reopen
from metatt_scale.training import train
from tests.model.test_classifier_export import IDS, logits, relative, saved_encoder
from tests.model.test_tasks import toy_tasks
from tests.questions import questions, write
from tests.tiny import FLOAT32
from tests.toy import BERT, CPU, ROBERTA, UNDROPPED, quiet, toy_recipe, write_toy

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
COLUMNS = {"even": slice(0, 2), "digit": slice(2, 5), "sum": slice(5, 6)}


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
@pytest.mark.parametrize("kind", ["metatt_4d", "metatt_4p1d", "mtl_lora", "moe_lora"])
def test_peft_and_transformers_read_one_task_of_a_classifier(tmp_path, config, kind):
    encoder = saved_encoder(tmp_path, config, pooler=True)
    adapter = {"rank": 4, "init": None} if kind.startswith("metatt") else {"rank": 4}
    recipe = toy_tasks(tmp_path, kind=kind, backbone={"path": str(encoder), "dtype": "float32"}, adapter=adapter)
    run = train(recipe, quiet())
    for index, (task, columns) in enumerate(COLUMNS.items()):
        opened = reopen(run.folder, quiet(), CPU)
        opened.adapter.task = index
        ours = logits(opened.model)[:, columns]
        folder = export(run.folder, "lora", quiet(), task=task, replace=True)
        n_labels = ours.shape[1]
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=n_labels)
        assert relative(logits(PeftModel.from_pretrained(base, folder)), ours) < FLOAT32
        merged = export(run.folder, "merged", quiet(), task=task, replace=True)
        plain = AutoModelForSequenceClassification.from_pretrained(merged)
        assert plain.config.num_labels == n_labels and relative(logits(plain), ours) < FLOAT32
        assert task in (merged / "README.md").read_text()
    if kind != "metatt_4d":
        with pytest.raises(ValueError, match=r"several tasks.*--task"):
            export(run.folder, "lora", quiet(), replace=True)


def test_a_language_models_task_by_name(tmp_path, capsys):
    write_toy(tmp_path)
    sources = [{"path": str(tmp_path / "data.jsonl"), "task": name, "limit": 40} for name in ("one", "two")]
    data = {"train": sources, "validation_size": 0}
    adapter = {"kind": "metatt_4p1d"}
    run = train(toy_recipe(tmp_path, tasks={"one": {}, "two": {}}, data=data, adapter=adapter), quiet())
    opened = reopen(run.folder, quiet(), CPU)
    with torch.no_grad():
        opened.adapter.cores[2][:, 1] *= 3.0
    opened.adapter.task = 0
    first = logits(opened.model)
    merged = AutoModelForCausalLM.from_pretrained(export(run.folder, "merged", quiet(), task="one"))
    assert relative(merged(IDS).logits, first) < FLOAT32
    opened.adapter.task = 1
    assert relative(logits(opened.model), first) > FLOAT32

    told = ["generate", str(run.folder), "--prompt", "1+1", "--max-new-tokens", "2"]
    assert main([*told, "--task", "two"]) == 0
    assert main(told) == 2
    assert "choose one by name with --task" in capsys.readouterr().err
    assert main([*told, "--task", "three"]) == 2
    assert "its tasks are one, two" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", str(run.folder), "--tasks", "boolq", "--task", "three"]) == 2
    assert "does not know" in capsys.readouterr().err


def test_scores_of_a_task_stand_beside_those_of_others_and_in_its_own_card(tmp_path, capsys):
    write_toy(tmp_path)
    write(tmp_path / "piqa.jsonl", questions("piqa"))
    sources = [{"path": str(tmp_path / "data.jsonl"), "task": name, "limit": 40} for name in ("one", "two")]
    run = train(
        toy_recipe(
            tmp_path,
            tasks={"one": {}, "two": {}},
            data={"train": sources, "validation_size": 0},
            adapter={"kind": "metatt_4p1d"},
            training={"max_steps": 1},
        ),
        quiet(),
    )
    for task in ("one", "two"):
        told = ["evaluate", str(run.folder), "--tasks", "piqa", "--data", str(tmp_path), "--task", task]
        assert main(told) == 0
    assert set(read_scores(run.folder / "results.json")) == {"fine_tuned one", "fine_tuned two"}
    card = (export(run.folder, "lora", quiet(), task="two") / "README.md").read_text()
    assert "| task | two |" in card and "| fine_tuned two | piqa | acc |" in card and "fine_tuned one" not in card
    assert card.count(str(tmp_path / "data.jsonl")) == 1, "both tasks read it"
    with pytest.raises(ValueError, match="holds the adapter of all tasks; leave --task out"):
        export(run.folder, "metatt", quiet(), task="two")
    card = (export(run.folder, "metatt", quiet()) / "README.md").read_text()
    assert "\n| task |" not in card and "fine_tuned one" in card and "fine_tuned two" in card


def test_a_run_without_tasks_knows_none(tmp_path):
    run = train(toy_recipe(tmp_path, training={"max_steps": 1}), quiet())
    with pytest.raises(ValueError, match="trained without `tasks`"):
        export(run.folder, "lora", quiet(), task="one")


def test_labels_of_a_kind_that_the_encoder_has_are_no_surprise(tmp_path):
    """All tasks at once: without a core for tasks the whole head is one export."""
    encoder = saved_encoder(tmp_path, {**BERT, **UNDROPPED}, pooler=True)
    backbone = {"path": str(encoder), "dtype": "float32"}
    run = train(toy_tasks(tmp_path, kind="metatt_4d", backbone=backbone), quiet())
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=6)
    loaded = PeftModel.from_pretrained(base, export(run.folder, "lora", quiet()))
    assert relative(logits(loaded), logits(run.model)) < FLOAT32

"""Classifiers in the formats others read: PEFT's LoRA with the frozen head in it, and plain transformers folders."""

import json
import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from metatt_scale.adapter import read_description, save_adapter
from metatt_scale.backbone import byte_tokenizer, head_tensors, load_backbone
from metatt_scale.cli import main
from metatt_scale.export import export
from metatt_scale.training import train
from tests.tiny import FLOAT32, relative
from tests.toy import BERT, CPU, ROBERTA, UNDROPPED, quiet, toy_classifier

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(24).view(2, 12) + 5


def saved_encoder(folder, config, *, pooler):
    """An encoder on disk as the hub has it: without a classifier's head, with a pooler or without."""
    recipe = toy_classifier(folder, config={**config, **UNDROPPED})
    model: Any = load_backbone(recipe.backbone, CPU, 5, classes=2)
    state = {name: value for name, value in model.base_model.state_dict().items() if pooler or "pooler" not in name}
    model.base_model.save_pretrained(folder / "encoder", state_dict=state)
    byte_tokenizer().save_pretrained(folder / "encoder")
    return folder / "encoder"


def trained(folder, config, *, labels=2, pooler=True):
    encoder = saved_encoder(folder, config, pooler=pooler)
    backbone = {"path": str(encoder), "dtype": "float32"}
    recipe = toy_classifier(folder, config={**config, **UNDROPPED}, classifier={"labels": labels}, backbone=backbone)
    return encoder, train(recipe, quiet())


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("config", "labels", "pooler", "saved"),
    [
        (BERT, 3, True, ["bert.pooler", "classifier"]),
        (BERT, 1, False, ["bert.pooler", "classifier"]),
        (ROBERTA, 2, False, ["classifier"]),
        (ROBERTA, 1, False, ["classifier"]),
    ],
    ids=["bert", "bert without pooler", "roberta", "roberta regression"],
)
def test_peft_reads_chain_and_head_onto_a_fresh_classifier(tmp_path, config, labels, pooler, saved):
    encoder, run = trained(tmp_path, config, labels=labels, pooler=pooler)
    ours, folder = logits(run.model), export(run.folder, "lora", quiet())
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # a folder that stands alone
    told = json.loads((folder / "adapter_config.json").read_text())
    assert (told["task_type"], told["modules_to_save"]) == ("SEQ_CLS", saved)
    torch.manual_seed(99)
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=labels)
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, folder)
    assert relative(before, ours) > 1e-2, "another head, and no adapter"
    assert relative(logits(loaded), ours) < FLOAT32

    loaded.save_pretrained(tmp_path / "again")  # in PEFT's own naming
    theirs = load_file(tmp_path / "again" / "adapter_model.safetensors")
    own = load_file(folder / "adapter_model.safetensors")
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in theirs.items()}
    assert relative(logits(loaded.merge_and_unload()), ours) < FLOAT32
    card = (folder / "README.md").read_text()
    assert f"num_labels={labels})`" in card and ("one number" in card) == (labels == 1)


@pytest.mark.parametrize(("config", "labels"), [(BERT, 2), (ROBERTA, 3), (BERT, 1)])
def test_the_merged_export_is_a_transformers_classifier(tmp_path, config, labels):
    _, run = trained(tmp_path, config, labels=labels)
    folder = export(run.folder, "merged", quiet())
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert relative(logits(plain), logits(run.model)) < FLOAT32
    assert plain.config.problem_type == ("regression" if labels == 1 else None)
    cores = export(run.folder, "metatt", quiet())
    assert {"metatt.json", "metatt.safetensors", "head.safetensors"} <= {path.name for path in cores.iterdir()}
    assert f"({6 * 16} examples)" in (cores / "README.md").read_text()


def test_the_command_exports_and_a_head_that_is_not_finite_is_refused(tmp_path, capsys):
    _, run = trained(tmp_path, BERT)
    assert main(["export", str(run.folder), "--to", "lora"]) == 0
    head = run.model.get_parameter("classifier.weight")
    with torch.no_grad():
        head[0, 0] = torch.inf
    folder = run.folder / "adapter"
    about = {k: v for k, v in read_description(folder).items() if k not in ("head_sha256", "weights_sha256")}
    save_adapter(folder, run.adapter, about, head_tensors(run.model))
    assert main(["export", str(run.folder), "--to", "lora", "--replace"]) == 2
    error = capsys.readouterr().err
    assert "base_model.model.classifier.weight is not finite; the adapter's tensors or head" in error

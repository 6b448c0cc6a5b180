"""Every kind of adapter through `train`: it learns, killed runs resume to the same bits, files give it back."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from metatt_scale.backbone import load_backbone
from metatt_scale.export import export
from metatt_scale.files import sha256
from metatt_scale.recipe import validate
from metatt_scale.reopen import reopen
from metatt_scale.report.runs import read_runs
from metatt_scale.training import loop, train
from tests.tiny import FLOAT32
from tests.toy import BERT, CPU, UNDROPPED, bits_of, metrics, quiet, toy_classifier, toy_recipe

ADAPTERS = {
    "mtl_lora": {"rank": 4, "alpha": 4.0},
    "moe_lora": {"rank": 4, "alpha": 4.0},
    "loretta_adp": {"alpha": 4.0, "loretta": {"bottleneck": 8, "tensor_rank": 3}},
    "loretta_rep": {"rank": 4, "alpha": 4.0, "loretta": {"tensor_rank": 3}},
    "full": {},
}
MERGED = ("mtl_lora", "moe_lora", "loretta_rep")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
KINDS = pytest.mark.parametrize("kind", ADAPTERS)
IDS = torch.arange(3, 15).view(2, 6)


def language_model(folder, kind, **sections):
    # What toy recipes set themselves is taken back to its default.
    return toy_recipe(folder, adapter={"rank": 16, "alpha": 2.0, "kind": kind, **ADAPTERS[kind]}, **sections)


class Killed(BaseException):
    """Stands for SIGKILL."""


def kill_and_resume(monkeypatch, straight, killed, step):
    train(straight, quiet())
    launch = loop.Trainer._launch

    def dies(trainer):
        if trainer.progress.step == step:
            raise Killed
        launch(trainer)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_launch", dies)
        train(killed, quiet())
    return train(killed, quiet())


@KINDS
def test_a_killed_run_learns_to_the_same_bits_and_its_files_give_the_same_model(tmp_path, monkeypatch, kind):
    long = {"training": {"max_steps": 12, "save_every": 4}}
    recipes = [language_model(tmp_path, kind, output_dir=str(tmp_path / name), **long) for name in ("a", "b")]
    run = kill_and_resume(monkeypatch, *recipes, step=6)
    assert bits_of(tmp_path / "a") == bits_of(tmp_path / "b")
    saved = [(tmp_path / name / "adapter/metatt.safetensors").read_bytes() for name in ("a", "b")]
    assert saved[0] == saved[1]
    losses = [line["eval_loss"] for line in metrics(tmp_path / "b") if "eval_loss" in line]
    assert losses[-1] < losses[0]
    opened = reopen(run.folder, quiet(), CPU)
    with torch.no_grad():
        assert torch.equal(opened.model(IDS).logits, run.model.eval()(IDS).logits)
    assert opened.description["trainable_parameters"] == run.adapter.n_trained
    check_exports(run, kind)


def check_exports(run, kind):
    """What transformers and PEFT make of the exports computes as our model; what has no such form is refused."""
    with torch.no_grad():
        expected = run.model(IDS).logits
        if kind == "loretta_adp":
            with pytest.raises(ValueError, match="a bottleneck with a nonlinearity is no change of weights"):
                export(run.folder, "merged", quiet())
        else:
            folder = export(run.folder, "merged", quiet())
            merged = AutoModelForCausalLM.from_pretrained(folder).eval()
            assert (merged(IDS).logits - expected).norm() < FLOAT32 * expected.norm()
        if kind not in MERGED:
            with pytest.raises(ValueError, match="there is no LoRA form"):
                export(run.folder, "lora", quiet())
            return
        folder = export(run.folder, "lora", quiet())
        fresh = load_backbone(reopen(run.folder, quiet(), CPU).recipe.backbone, CPU, 42)
        theirs = PeftModel.from_pretrained(fresh, str(folder)).eval()
        assert (theirs(IDS).logits - expected).norm() < FLOAT32 * expected.norm()


@KINDS
def test_damaged_or_unfitting_files_are_refused(tmp_path, kind):
    folder = train(language_model(tmp_path, kind, training={"max_steps": 1}), quiet()).folder / "adapter"
    file = folder / "metatt.safetensors"
    whole, description = load_file(file), json.loads((folder / "metatt.json").read_text())

    def refused(tensors, says):
        save_file(tensors, file)
        (folder / "metatt.json").write_text(json.dumps(description | {"weights_sha256": sha256(file)}))
        with pytest.raises(ValueError, match=f"metatt.json.*{re.escape(says)}|{re.escape(says)}.*metatt.json"):
            reopen(folder, quiet(), CPU)

    name, value = next(iter(whole.items()))
    counted = kind != "full"  # before anything is made
    without = {key: tensor for key, tensor in whole.items() if key != name}
    refused(without, "values" if counted else f"{name} is missing")
    refused(whole | {name: value.flatten()[:1]}, "values" if counted else name)
    refused(whole | {name: value.flatten()}, name)
    refused(whole | {name: value.double()}, name)
    refused(whole | {"more": value.clone()}, "values" if counted else "more")
    refused(whole | {"more": value.new_zeros(0)}, "more")
    save_file(whole, file)
    with pytest.raises(ValueError, match="its hash differs"):
        (folder / "metatt.json").write_text(json.dumps(description | {"weights_sha256": "0" * 64}))
        reopen(folder, quiet(), CPU)


# ---- a trained head


def classifier(folder, kind="metatt_4d", **sections):
    adapter = {"kind": kind, **ADAPTERS.get(kind, {})}
    if kind == "metatt_4d":
        adapter |= {"rank": 4, "alpha": 4.0, "init": "ze-id-id-id"}
    names = {} if kind in ("loretta_adp", "full", "head_only") else {"target_modules": ["query", "value"]}
    wanted = {"classifier": {"labels": 2, "head": "trained"}, **sections}
    recipe = toy_classifier(folder, config={**BERT, **UNDROPPED}, **wanted)
    return validate(recipe.model_dump(mode="json") | {"adapter": adapter | names}, "toy")


HEADED = pytest.mark.parametrize("kind", ["metatt_4d", "head_only", *ADAPTERS])


@HEADED
def test_a_trained_head_learns_resumes_and_comes_back(tmp_path, monkeypatch, kind):
    recipes = [classifier(tmp_path, kind, output_dir=str(tmp_path / name)) for name in ("a", "b")]
    run = kill_and_resume(monkeypatch, *recipes, step=5)
    assert bits_of(tmp_path / "a") == bits_of(tmp_path / "b")
    assert not (run.folder / "adapter/head.safetensors").exists()
    saved = load_file(run.folder / "adapter/metatt.safetensors")
    names = [f"head.{m}.{k}" for m in ("bert.pooler.dense", "classifier") for k in ("weight", "bias")]
    assert [name for name in saved if name.startswith("head.")] == sorted(names)
    assert run.adapter.n_head == 32 * 32 + 32 + 2 * 32 + 2
    description = json.loads((run.folder / "adapter/metatt.json").read_text())
    counted = (description["trainable_parameters"], description["head_parameters"])
    assert counted == (run.adapter.n_trained - run.adapter.n_head, run.adapter.n_head)
    card = (export(run.folder, "metatt", quiet()) / "README.md").read_text()
    assert f"| trained parameters | {counted[0]:,} and {counted[1]:,} of the head |" in card
    if kind != "loretta_adp":
        folder = export(run.folder, "merged", quiet())
        merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            expected = run.model(IDS).logits
            assert (merged(IDS).logits - expected).norm() < FLOAT32 * expected.norm()
    assert read_runs([run.folder])[0].parameters == counted[0]
    opened = reopen(run.folder, quiet(), CPU)
    with torch.no_grad():
        assert torch.equal(opened.model(IDS).logits, run.model.eval()(IDS).logits)

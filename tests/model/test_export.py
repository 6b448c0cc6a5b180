"""Exports of every form: the cores read back, the card, targets that are kept, refusals."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from metatt_scale.adapter import inject, load_adapter, save_adapter
from metatt_scale.backbone import load_backbone
from metatt_scale.evaluation import TaskScore
from metatt_scale.evaluation.scores import Key, record
from metatt_scale.export import export
from metatt_scale.files import sha256
from metatt_scale.reopen import fingerprint, read_recipe
from tests.exports import QUIET, logits_of, recipe_of, save_backbone, untrained_run
from tests.tiny import FLOAT32, randomise, relative
from tests.toy import CPU

# ---- the cores, read by ourselves


def test_metatt_gives_the_same_bits(trained_run):
    folder, run, recipe = trained_run
    target = export(run.folder, "metatt", QUIET)
    fresh = load_backbone(recipe.backbone, CPU)
    frozen = logits_of(fresh)
    adapter = load_adapter(target, fresh, CPU)
    assert torch.equal(logits_of(fresh), logits_of(run.model)) and not torch.equal(logits_of(fresh), frozen)
    assert all(torch.equal(a, b) for a, b in zip(adapter.cores, run.adapter.cores, strict=True))
    # An export is itself something to export from.
    again = export(target, "lora", QUIET, out=folder / "again")
    first = load_file(export(run.folder, "lora", QUIET, replace=True) / "adapter_model.safetensors")
    second = load_file(again / "adapter_model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def test_another_place_of_the_backbone(trained_run, tmp_path):
    _, run, _ = trained_run
    moved = tmp_path / "elsewhere"
    save_backbone(moved)
    merged = export(run.folder, "merged", QUIET, out=tmp_path / "m", backbone={"path": str(moved)})
    assert relative(logits_of(AutoModelForCausalLM.from_pretrained(merged)), logits_of(run.model)) < FLOAT32
    other = save_backbone(tmp_path / "other", hidden_size=64)
    with pytest.raises(ValueError, match="load it on the backbone it was trained on"):
        export(run.folder, "merged", QUIET, out=tmp_path / "n", backbone={"path": str(other)})
    assert not (tmp_path / "n").exists()


# ---- the card


def test_the_card_says_where_the_model_comes_from(trained_run, tmp_path):
    folder, run, _ = trained_run
    without = export(run.folder, "metatt", QUIET, out=tmp_path / "without")
    assert "No scores on record" in (without / "README.md").read_text()
    description, recipe = read_recipe(run.folder / "adapter")
    samples = {"acc": "1101", "acc_norm": "1000"}
    for task, adapter in (("boolq", description["weights_sha256"]), ("piqa", "of another adapter")):
        key: Key = {"fingerprint": fingerprint(recipe, run.weights, adapter)}
        score = TaskScore(metric="acc", samples=samples, key=key, seconds=1.0)
        record(run.folder / "results.json", "fine_tuned", task, score)
    try:
        for to in ("lora", "merged", "metatt"):
            card = (export(run.folder, to, QUIET, out=tmp_path / to) / "README.md").read_text()
            assert f'base_model: "{folder / "backbone"}"\n' in card
            assert "input 48 x layer 3 x projection 3 x output 32; ranks 3, 4, 5; alpha 1.5" in card
            count = 48 * 3 + 3 * 3 * 4 + 4 * 3 * 5 + 5 * 32
            assert f"| trained parameters | {count:,} |" in card
            assert "| adapted modules | 9 (" in card and "self_attn.q_proj" in card and "mlp.down_proj" in card
            assert str(folder / "sums.jsonl") in card and "4 steps of 12 examples, learning rate 0.02" in card
            assert "| fine_tuned | boolq | acc | 0.7500 | 0.2500 | 4 |" in card
            assert "| fine_tuned | boolq | acc_norm | 0.2500 | 0.2500 | 4 |" in card
            assert "piqa" not in card  # scored before the adapter was trained anew
    finally:
        (run.folder / "results.json").unlink()


# ---- targets


def contents(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_existing_target_is_kept_unless_it_may_be_replaced(trained_run, tmp_path):
    _, run, _ = trained_run
    target = tmp_path / "there"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    for to in ("lora", "merged", "metatt"):
        with pytest.raises(FileExistsError, match=r"exists already; remove it, choose --out, or pass --replace"):
            export(run.folder, to, QUIET, out=target)
        assert contents(target) == {"mine.txt": b"mine"}
        with pytest.raises(FileExistsError, match="no export of this toolkit"):
            export(run.folder, to, QUIET, out=target, replace=True)
        with pytest.raises(FileExistsError, match="no export of this toolkit"):
            export(run.folder, to, QUIET, out=run.folder, replace=True)
    assert contents(target) == {"mine.txt": b"mine"}
    target = export(run.folder, "metatt", QUIET, out=tmp_path / "export")
    export(run.folder, "lora", QUIET, out=target, replace=True)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "metatt_export.json"}
    assert set(contents(target)) == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "there"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_failing_export_leaves_nothing_and_takes_nothing(tmp_path, replace):
    save_backbone(tmp_path / "backbone")
    recipe = recipe_of(tmp_path)
    model = load_backbone(recipe.backbone, CPU)
    adapter = inject(model, recipe.adapter, 0, CPU)
    randomise(adapter)
    with torch.no_grad():
        adapter.cores[0][0, 0, 0] = math.inf
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    about = {"base_model": "b", "kind": "metatt_4d", "step": 1, "target_tokens": 1, "records": []}
    save_adapter(
        tmp_path / "run" / "adapter",
        adapter,
        {**about, "recipe": recipe.model_dump(mode="json"), "metatt_scale": "0"},
    )
    place = tmp_path / "place"
    if replace:
        (place / "there").mkdir(parents=True)
        (place / "there" / "metatt_export.json").write_text("mine")
    with pytest.raises(ValueError, match="not finite; nothing was merged"):
        export(tmp_path / "run", "merged", QUIET, out=place / "there", replace=replace)
    assert contents(place) == ({"there/metatt_export.json": b"mine"} if replace else {})
    assert [p.name for p in place.iterdir()] == (["there"] if replace else [])


# ---- refusals


def test_what_cannot_be_exported(tmp_path, trained_run):
    _, run, _ = trained_run
    with pytest.raises(ValueError, match="choose one of lora, merged, metatt"):
        export(run.folder, "onnx", QUIET)
    with pytest.raises(ValueError, match="no such folder"):
        export(tmp_path / "nowhere", "lora", QUIET)
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="has not finished"):
        export(tmp_path / "unfinished", "lora", QUIET)


def test_an_adapter_cannot_ask_for_remote_code(trained_run, tmp_path):
    """Its own word does not count; only the person who opens it may allow it."""
    _, run, _ = trained_run
    folder = tmp_path / "adapter"
    shutil.copytree(run.folder / "adapter", folder)
    description = json.loads((folder / "metatt.json").read_text())
    description["recipe"]["backbone"]["trust_remote_code"] = True
    (folder / "metatt.json").write_text(json.dumps(description))
    assert not read_recipe(folder)[1].backbone.trust_remote_code
    assert read_recipe(folder, {"trust_remote_code": True})[1].backbone.trust_remote_code


def test_factors_that_are_not_finite_are_not_exported(tmp_path):
    run, _, _ = untrained_run(tmp_path)
    folder = run / "adapter"
    cores = load_file(folder / "metatt.safetensors")
    cores["core_0"][0, 0, 0] = math.nan
    save_file(cores, folder / "metatt.safetensors")
    description = json.loads((folder / "metatt.json").read_text())
    description["weights_sha256"] = sha256(folder / "metatt.safetensors")
    (folder / "metatt.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"lora_A\.weight is not finite; the adapter's tensors or head"):
        export(run, "lora", QUIET)

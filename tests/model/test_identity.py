"""Two backbones are the same only if all their bytes are."""

import copy
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from metatt_scale import hashes
from metatt_scale.adapter import read_description
from metatt_scale.backbone import identity, identity_by_ends, is_other, load_backbone
from metatt_scale.evaluation import evaluate
from metatt_scale.parallel import World
from metatt_scale.recipe import BackboneRecipe, EvaluationRecipe
from metatt_scale.scoring import score_run
from metatt_scale.training import train
from tests.exports import recipe_of, save_backbone, untrained_run
from tests.questions import questions, write
from tests.toy import CPU, quiet

MIB = 1 << 20


def folder_with(path, middle):
    """A folder whose 3 MiB of weights differ from another's in the middle alone."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    weights = torch.zeros(3 * MIB, dtype=torch.uint8)
    weights[3 * MIB // 2] = middle
    save_file({"weights": weights}, path / "model.safetensors")
    return BackboneRecipe(path=str(path))


def test_weights_that_differ_in_the_middle_are_others(tmp_path):
    one, other = folder_with(tmp_path / "one", 1), folder_with(tmp_path / "other", 2)
    assert identity(one) != identity(other)
    assert is_other(other, identity(one)) and not is_other(one, identity(one))
    shutil.copytree(one.path, tmp_path / "copy")
    assert identity(BackboneRecipe(path=str(tmp_path / "copy"))) == identity(one)


def test_a_gguf_file_is_known_by_its_bytes_alone(tmp_path):
    for name, middle in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / f"{name}.gguf").write_bytes(bytes(2 * MIB) + bytes([middle]) + bytes(2 * MIB))
    a, b, c = (identity(BackboneRecipe(path=str(tmp_path / f"{name}.gguf"))) for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "modeling_own.py"])
def test_what_else_decides_the_outputs_counts(tmp_path, name):
    recipe = folder_with(tmp_path / "one", 1)
    before = identity(recipe)
    (tmp_path / "one" / name).write_text('{"changed": true}')
    assert identity(recipe) != before


def test_an_identity_that_an_earlier_version_wrote_is_still_compared(tmp_path):
    one, other = folder_with(tmp_path / "one", 1), folder_with(tmp_path / "other", 2)
    known = identity_by_ends(one)
    assert not is_other(one, known) and not is_other(other, known)  # it did not tell these two apart
    with open(tmp_path / "other" / "model.safetensors", "ab") as file:
        file.write(b"more")
    assert is_other(other, known)


def test_hashing_a_large_model_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setenv("METATT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("metatt_scale.backbone.identify._LARGE_BYTES", 3 * MIB)
    monkeypatch.setattr(hashes, "_SMALL_BYTES", MIB)
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 0.0)
    recipe, told = folder_with(tmp_path / "one", 1), []
    first = identity(recipe, told.append)
    assert len(told) == 1 and recipe.path in told[0]
    assert identity(recipe, told.append) == first and len(told) == 1


# ---- what relies on it


WIDE = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 2, "max_position_embeddings": 512}
"""Weights of 7 MB, of which the first and the last MiB hold less than half."""


def swap_middle(folder):
    """Give all weights but those in the first and the last MiB of the file other values."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    middle = np.frombuffer(content, np.float32, len(content) // 4 - 2 * MIB // 4, MIB)
    middle[:] = np.random.default_rng(1).normal(0, 0.3, len(middle))
    file.write_bytes(content)


def test_a_score_on_record_is_not_that_of_swapped_weights(tmp_path, no_network):
    run, _, _ = untrained_run(tmp_path, model=WIDE)
    write(tmp_path / "piqa.jsonl", questions("piqa", 40))
    settings = EvaluationRecipe(tasks=("piqa",), data=str(tmp_path))

    def answers():
        scores = score_run(run, settings, quiet(), backbone=None, zero_shot=True, task=None, device="cpu")
        return {label: tasks["piqa"].samples["acc"] for label, tasks in scores.items()}

    before = answers()
    swap_middle(tmp_path / "backbone")
    after = answers()
    (run / "results.json").unlink()
    assert after == answers() != before


def test_a_run_does_not_go_on_with_swapped_weights(tmp_path):
    save_backbone(tmp_path / "backbone", **WIDE)
    recipe = recipe_of(tmp_path)
    run = train(recipe, quiet())
    assert read_description(run.folder / "adapter")["base_model_weights"] == identity(recipe.backbone)
    swap_middle(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"checkpoints/step-0*4"):
        train(recipe, quiet())


def test_a_run_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    save_backbone(tmp_path / "backbone")
    recipe = recipe_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("metatt_scale.training.run.identity", lambda recipe, tell: identity_by_ends(recipe))
        patch.setattr("metatt_scale.training.run.check_unchanged", lambda recipe, known: None)
        train(recipe, quiet())
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_nonfinite_steps": 9})})
    train(longer, quiet())
    with open(tmp_path / "backbone" / "config.json", "a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"checkpoints/step-0*4"):
        train(longer, quiet())


def test_weights_that_change_while_they_are_loaded_are_refused(tmp_path, monkeypatch):
    save_backbone(tmp_path / "backbone", **WIDE)
    recipe = recipe_of(tmp_path)

    def load(*arguments, **options):
        model = load_backbone(*arguments, **options)
        swap_middle(tmp_path / "backbone")
        return model

    monkeypatch.setattr("metatt_scale.training.run.load_backbone", load)
    with pytest.raises(ValueError, match=re.escape(recipe.backbone.path)):
        train(recipe, quiet())


def test_a_score_on_record_is_not_that_of_another_tokenizer(byte_llama, byte_bpe, no_network, tmp_path):
    write(tmp_path / "piqa.jsonl", questions("piqa", 4))
    settings, asked = EvaluationRecipe(tasks=("piqa",), data=str(tmp_path)), []
    other = copy.deepcopy(byte_bpe)
    other.eos_token = other.convert_ids_to_tokens(5)
    hook = byte_llama.register_forward_pre_hook(lambda *_: asked.append(1))
    for tokenizer, asks in ((byte_bpe, True), (byte_bpe, False), (other, True)):
        asked.clear()
        evaluate(byte_llama, tokenizer, settings, tmp_path / "r.json", "zero_shot", "f", world=World(device=CPU))
        assert bool(asked) == asks
    hook.remove()

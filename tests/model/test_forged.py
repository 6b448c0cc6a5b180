"""Files that anybody can forge, hashes and all: nothing of them is installed or takes memory before it is checked."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from metatt_scale.adapter import Target, TargetMap
from metatt_scale.files import sha256
from metatt_scale.methods import build
from metatt_scale.recipe import validate
from metatt_scale.reopen import reopen
from metatt_scale.training import checkpoint, train
from metatt_scale.training.checkpoint import DamagedCheckpointError
from tests.toy import CPU, quiet, toy, toy_classifier, toy_recipe, write_toy

LAST = "step-000006"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    recipe = toy_recipe(folder)
    run = train(recipe, quiet())
    return folder, recipe, dataclasses.replace(checkpoint.expected(run.adapter), total_steps=6)


@pytest.fixture
def run(finished, tmp_path):
    """A copy: its recipe, what its checkpoints must hold, and the newest of them."""
    folder, recipe, wanted = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    recipe = recipe.model_copy(update={"output_dir": str(tmp_path / "run")})
    return recipe, wanted, tmp_path / "run" / "checkpoints" / LAST


def sign(folder):
    """Put the hashes of a checkpoint right."""
    marker = {name: sha256(folder / name) for name in ("state.json", "state.safetensors")}
    (folder / "COMPLETE").write_text(json.dumps(marker))


# ---- checkpoints


def tensor(name, change):
    def forge(folder):
        tensors = load_file(folder / "state.safetensors")
        changed = change(tensors.pop(name))
        save_file(tensors | ({} if changed is None else {name: changed}), folder / "state.safetensors")

    return forge


def added(name, value):
    def forge(folder):
        save_file(load_file(folder / "state.safetensors") | {name: value}, folder / "state.safetensors")

    return forge


def progress(**changes):
    def forge(folder):
        state = json.loads((folder / "state.json").read_text())
        state["progress"] |= changes
        state["progress"] = {key: value for key, value in state["progress"].items() if value is not ...}
        (folder / "state.json").write_text(json.dumps(state))

    return forge


FORGED = {
    "a moment of one number": tensor("adam:core_1:exp_avg", lambda value: value.flatten()[:1].clone()),
    "a moment in another order": tensor("adam:core_1:exp_avg_sq", lambda value: value.mT.contiguous()),
    "a moment in 64 bits": tensor("adam:core_1:exp_avg", lambda value: value.double()),
    "a moment is missing": tensor("adam:core_1:exp_avg", lambda value: None),
    "a counter of two": tensor("adam:core_1:step", lambda value: value.repeat(2)),
    "a counter that is no number": tensor("adam:core_1:step", lambda value: value * math.nan),
    "moments of nothing": added("adam:core_9:exp_avg", torch.zeros(1)),
    "an unknown moment": added("adam:core_1:other", torch.zeros(1)),
    "an unknown core": added("value:core_9", torch.zeros(1, 1, 1)),
    "an unknown tensor": added("core_9", torch.zeros(1)),
    "a best core of another shape": tensor("best:core_2", lambda value: value[:, :1].clone()),
    "a best core is missing": tensor("best:core_2", lambda value: None),
    "a core in 16 bits": tensor("value:core_2", lambda value: value.half()),
    "a core is flat": tensor("value:core_2", lambda value: value.flatten()),
    "a head where none is": added("head:classifier.weight", torch.zeros(2, 2)),
    "step 2**62": progress(step=2**62),
    "step of another folder": progress(step=4),
    "no step": progress(step=...),
    "step is text": progress(step="6"),
    "step is true": progress(step=True),
    "not finished": progress(finished=False),
    "no word of the end": progress(finished=...),
    "skipped more than were done": progress(skipped=7),
    "skipped in a row more than at all": progress(skipped_in_a_row=1),
    "best in the future": progress(best_step=9),
    "best without a loss": progress(best_loss=None),
    "tokens 10**400": progress(target_tokens=10**400),
    "sweeps are numbers": progress(sweeps=[1]),
    "scores are text": progress(start_scores={"eval_loss": "low"}),
    "nested": progress(start_scores=json.loads("[" * 500 + "]" * 500)),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_checkpoint_is_refused(run, name):
    recipe, wanted, folder = run
    FORGED[name](folder)
    sign(folder)
    with pytest.raises(ValueError, match=LAST):
        checkpoint.load(folder, recipe, wanted)


def test_finished_early_is_believed_of_runs_that_may_stop_early(run, finished):
    recipe, wanted, folder = run
    longer = dataclasses.replace(wanted, total_steps=9)
    progress(evaluations_without_gain=2)(folder)
    sign(folder)
    with pytest.raises(DamagedCheckpointError, match="finished"):
        checkpoint.load(folder, recipe, longer)
    training = recipe.training.model_copy(update={"early_stopping_patience": 2})
    patient = recipe.model_copy(update={"training": training})
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"recipe": patient.model_dump(mode="json")}))
    sign(folder)
    assert checkpoint.load(folder, patient, longer).progress.finished


def test_a_run_passes_over_a_forged_checkpoint(run, finished):
    recipe, _, folder = run
    FORGED["a moment of one number"](folder)
    sign(folder)
    train(recipe, console := quiet())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "adam:core_1:exp_avg" in text and "resuming after step 4" in text


# ---- adapters

KINDS = {
    "mtl_lora": {"rank": 4, "mtl_lora": {"up_projections": 2}},
    "moe_lora": {"rank": 4, "moe_lora": {"experts": 2, "task_width": 5}},
    "loretta_rep": {"rank": 4, "loretta": {"tensor_rank": 3}},
    "loretta_adp": {"loretta": {"bottleneck": 8, "tensor_rank": 3}},
    "lora": {"rank": 3},
    "lora pissa": {"rank": 3, "init": "pissa"},
    "vera": {"rank": 3},
    "adalora": {"rank": 3},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_size_of_an_adapter_is_known_before_it_is_made(tmp_path, name):
    write_toy(tmp_path)
    data = toy(tmp_path) | {"adapter": {"kind": name.split()[0], **KINDS[name]}}
    recipe = validate(data, "toy")
    widths = [(32, 48), (48, 16), (40, 40)]
    targets = tuple(
        Target(path=f"layers.{k}.p", layer=k, projection=0, d_in=i, d_out=o) for k, (i, o) in enumerate(widths)
    )
    target_map = TargetMap(targets=targets, layers=(0, 1, 2), projections=("p",))
    made = build.make_alone(target_map, recipe, torch.float32).result()
    assert build.METHODS[recipe.adapter.kind].size(target_map, recipe) == sum(v.numel() for v in made.values())


def test_a_wide_target_takes_no_memory(run, finished, tmp_path, monkeypatch):
    write_toy(tmp_path)
    adapter = {"kind": "lora", "rank": 4}
    recipe = validate(toy(tmp_path) | {"adapter": adapter, "output_dir": str(tmp_path / "lora")}, "toy")
    folder = train(recipe, quiet()).folder / "adapter"
    description = json.loads((folder / "metatt.json").read_text())
    description["targets"][0] |= {"d_in": 10**9, "d_out": 10**9}
    (folder / "metatt.json").write_text(json.dumps(description))
    monkeypatch.setattr(build, "make_alone", lambda *_: pytest.fail("made before it was checked"))
    with pytest.raises(ValueError, match=r"values behind .* modules"):
        build.read_alone(folder, recipe)


def test_a_chain_of_another_kind_than_its_recipe_is_refused(run):
    folder = run[2].parents[1] / "adapter"
    description = json.loads((folder / "metatt.json").read_text())
    for kind in ("metatt_5d", "lotr", "lorta"):
        description["recipe"]["adapter"]["kind"] = kind
        (folder / "metatt.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match=kind):
            reopen(folder, quiet(), CPU)


def test_no_weight_but_the_heads_is_replaced(tmp_path):
    """By the file of a frozen head, whose names are a stranger's."""
    recipe = toy_classifier(tmp_path)
    folder = train(recipe, quiet()).folder / "adapter"
    head = load_file(folder / "head.safetensors")
    description = json.loads((folder / "metatt.json").read_text())
    name = "bert.embeddings.LayerNorm.weight"
    first = next(iter(head))
    for forged in (
        head | {name: torch.full((32,), 9.0)},
        {key: value for key, value in head.items() if key != first},
        head | {first: head[first].flatten()[:1]},
        head | {first: head[first].int()},
    ):
        save_file(forged, folder / "head.safetensors")
        about = description | {"head_sha256": sha256(folder / "head.safetensors")}
        (folder / "metatt.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match=r"head\.safetensors"):
            reopen(folder, quiet(), CPU)
        onward = toy_classifier(tmp_path, adapter={"start_from": str(folder)}, output_dir=str(tmp_path / "onward"))
        with pytest.raises(ValueError, match=r"adapter\.start_from"):
            train(onward, quiet())

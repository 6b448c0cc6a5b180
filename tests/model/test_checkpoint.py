"""Checkpoints are whole or refused by name, the newest whole one is found, and none is deleted that is needed."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import metatt_scale.training.run as run_module
from metatt_scale.files import sha256
from metatt_scale.parallel import World
from metatt_scale.training import checkpoint, train
from metatt_scale.training.checkpoint import DamagedCheckpointError, RunState
from tests.tiny import randomise
from tests.toy import CPU, make_trainer, one_step, quiet, said, snapshot, toy_recipe

STEPS = ["step-000004", "step-000006"]


def trained(tmp_path, **sections):
    """A finished run of six steps with checkpoints 4 and 6; returns its recipe, shapes and checkpoint folder."""
    recipe = toy_recipe(tmp_path, **sections)
    run = train(recipe, quiet())
    return recipe, checkpoint.expected(run.adapter), tmp_path / "run" / "checkpoints"


def names(root):
    return [path.name for path in checkpoint.list_checkpoints(root)]


# ---- writing


def test_round_trip(tmp_path):
    recipe = toy_recipe(tmp_path)
    trainer = make_trainer(recipe)
    randomise(trainer.adapter)
    one_step(trainer)
    progress = RunState(step=7, skipped=2, skipped_in_a_row=1, best_loss=0.1 + 0.2, best_step=3, target_tokens=99)
    best = {name: torch.full_like(core, 0.5) for name, core in trainer.adapter.trained().items()}
    taken = checkpoint.take_snapshot(trainer.adapter, trainer.optimizer, progress, best, "digest", World(device=CPU))
    folder = checkpoint.save(tmp_path / "checkpoints", taken, recipe)
    assert (folder.name, sorted(os.listdir(folder))) == (
        "step-000007",
        ["COMPLETE", "state.json", "state.safetensors"],
    )
    loaded = checkpoint.load(folder, recipe, checkpoint.expected(trainer.adapter))
    assert loaded.progress == progress and (loaded.world_size, loaded.threads) == (1, torch.get_num_threads())
    for got, expected in ((loaded.values, trainer.adapter.tensors()), (loaded.best, best)):
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)

    other = make_trainer(recipe)
    other.install(loaded.values, loaded.moments)
    for mine, theirs in zip(trainer.adapter.cores, other.adapter.cores, strict=True):
        state, restored = trainer.optimizer.state[mine], other.optimizer.state[theirs]
        assert state.keys() == restored.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[key], restored[key]) for key in state)
    one_step(trainer)
    other.progress.step = 1
    one_step(other)
    assert all(torch.equal(a, b) for a, b in zip(trainer.adapter.cores, other.adapter.cores, strict=True))


def test_a_checkpoint_of_before_a_key_existed_is_of_the_same_recipe(tmp_path):
    recipe, shapes, root = trained(tmp_path)
    folder = checkpoint.list_checkpoints(root)[-1]
    state = json.loads((folder / "state.json").read_text())
    del state["recipe"]["data"]["text_fields"], state["recipe"]["sweep"]
    (folder / "state.json").write_text(json.dumps(state))
    marker = {name: sha256(folder / name) for name in ("state.json", "state.safetensors")}
    (folder / "COMPLETE").write_text(json.dumps(marker))
    assert checkpoint.load(folder, recipe, shapes).progress.step == 6


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path):
    recipe = toy_recipe(tmp_path)
    trainer = make_trainer(recipe)
    taken = checkpoint.take_snapshot(trainer.adapter, trainer.optimizer, RunState(), {}, "digest", World(device=CPU))
    folder = checkpoint.save(tmp_path, taken, recipe)
    loaded = checkpoint.load(folder, recipe, checkpoint.expected(trainer.adapter))
    assert loaded.moments == {} and loaded.best == {}
    trainer.install(loaded.values, loaded.moments)
    one_step(trainer)


@pytest.mark.parametrize("keep", [2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    _, _, root = trained(tmp_path, training={"max_steps": 8, "save_every": 1, "keep_checkpoints": keep})
    assert names(root) == [f"step-{step:06d}" for step in range(9 - keep, 9)]


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for name in (".step-000002.tmp-abc", ".step-000001.tmp-abc-old", "mine", "step-best"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text("x")
    trained(tmp_path)
    assert sorted(os.listdir(root)) == ["mine", *STEPS, "step-best"]


def save_at(root, recipe, trainer, step):
    taken = checkpoint.take_snapshot(
        trainer.adapter, trainer.optimizer, RunState(step=step), {}, "digest", World(device=CPU)
    )
    return checkpoint.save(root, taken, recipe)


def test_damaged_checkpoints_do_not_count_among_those_kept(tmp_path):
    recipe, more = toy_recipe(tmp_path), toy_recipe(tmp_path, training={"keep_checkpoints": 9})
    trainer, root = make_trainer(recipe), tmp_path / "checkpoints"
    save_at(root, recipe, trainer, 2)
    for step in (4, 6):
        save_at(root, more, trainer, step)
        (root / f"step-{step:06d}" / "COMPLETE").unlink()
    save_at(root, recipe, trainer, 3)  # resumed after step 2, stopped by a signal after step 3
    assert names(root) == ["step-000002", "step-000003"]
    save_at(root, more, trainer, 5)
    (root / "step-000005" / "state.json").unlink()
    save_at(root, recipe, trainer, 7)
    assert names(root) == ["step-000003", "step-000007"]


def test_a_failing_write_leaves_the_older_checkpoints_alone(tmp_path, monkeypatch):
    recipe, _, root = trained(tmp_path)
    before = snapshot(root)

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("write_json", "save_tensors", "sha256"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(checkpoint, name, full)
            save_at(root, recipe, make_trainer(recipe), 8)
        assert snapshot(root) == before


# ---- reading: damage


def truncate(length):
    def damage(folder: Path):
        file = folder / "state.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * length) if length < 1 else length])

    return damage


def flip(name, place):
    def damage(folder: Path):
        content = bytearray((folder / name).read_bytes())
        content[int(len(content) * place)] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def signed(name, content):
    """Damage with a matching hash: what a version of the format that this one does not know would look like."""

    def damage(folder: Path):
        (folder / name).write_bytes(content)
        marker = json.loads((folder / "COMPLETE").read_text())
        (folder / "COMPLETE").write_text(json.dumps({**marker, name: sha256(folder / name)}))

    return damage


def without_a_core(folder: Path):
    tensors = load_file(folder / "state.safetensors")
    del tensors["value:core_2"]
    save_file(tensors, folder / "state.safetensors")
    signed("state.safetensors", (folder / "state.safetensors").read_bytes())(folder)


DAMAGES = {
    "tensors empty": (truncate(0.0), "hash of state.safetensors"),
    "tensors cut in the header": (truncate(9), "hash of state.safetensors"),
    "tensors cut in half": (truncate(0.5), "hash of state.safetensors"),
    "tensors without the last byte": (truncate(0.99999), "hash of state.safetensors"),
    "tensors flipped in the header": (flip("state.safetensors", 0.001), "hash of state.safetensors"),
    "tensors flipped in the values": (flip("state.safetensors", 0.9), "hash of state.safetensors"),
    "state flipped": (flip("state.json", 0.5), "hash of state.json"),
    "no marker": (lambda folder: (folder / "COMPLETE").unlink(), "COMPLETE is missing"),
    "no state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "no tensors": (lambda folder: (folder / "state.safetensors").unlink(), "state.safetensors is missing"),
    "marker is garbage": (write("COMPLETE", b"{"), "unreadable"),
    "marker is binary": (write("COMPLETE", b"\xff\xfe\x00"), "unreadable"),
    "marker is a list": (write("COMPLETE", b"[]"), "unreadable"),
    "marker is empty": (write("COMPLETE", b""), "unreadable"),
    "marker lacks a hash": (write("COMPLETE", b"{}"), "unreadable"),
    "state is garbage": (signed("state.json", b"{}}"), "unreadable"),
    "state is a list": (signed("state.json", b"[]"), "unreadable"),
    "tensors are garbage": (signed("state.safetensors", b"\x00" * 100), "unreadable"),
    "a core is missing": (without_a_core, "unreadable"),
    "marker is a folder": (
        lambda folder: ((folder / "COMPLETE").unlink(), (folder / "COMPLETE").mkdir()),
        "unreadable",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, to be copied by the tests that damage it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe, shapes, _ = trained(folder)
    return folder, recipe, shapes


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run: its recipe (in the copied folder), shapes, and checkpoint folder."""
    folder, recipe, shapes = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    return recipe.model_copy(update={"output_dir": str(tmp_path / "run")}), shapes, tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_the_name_of_the_folder_and_the_older_one_is_taken(run, name):
    recipe, shapes, root = run
    damage, says = DAMAGES[name]
    damage(root / STEPS[1])
    with pytest.raises(DamagedCheckpointError) as caught:
        checkpoint.load(root / STEPS[1], recipe, shapes)
    assert str(root / STEPS[1]) in str(caught.value) and says in str(caught.value)
    before = snapshot(root)
    found, loaded, refused = checkpoint.newest_valid(root, recipe, shapes)
    assert found == root / STEPS[0] and loaded is not None and loaded.progress.step == 4
    assert refused == [str(caught.value)] and snapshot(root) == before


def test_a_state_of_another_version_is_refused(run):
    recipe, shapes, root = run
    state = json.loads((root / STEPS[1] / "state.json").read_text())
    for changed in ({"progress": {**state["progress"], "later": 1}}, {"progress": None}):
        signed("state.json", json.dumps({**state, **changed}).encode())(root / STEPS[1])
        with pytest.raises(DamagedCheckpointError, match="step-000006: unreadable"):
            checkpoint.load(root / STEPS[1], recipe, shapes)


# ---- reading: not this run's


def test_other_shapes_are_refused(run):
    recipe, shapes, root = run
    with pytest.raises(ValueError, match=r"step-000006: core_3 .*not the same adapter") as caught:
        wider = {**shapes.values, "core_3": shapes.values["core_3"]._replace(shape=(4, 33, 1))}
        checkpoint.newest_valid(root, recipe, dataclasses.replace(shapes, values=wider))
    assert not isinstance(caught.value, DamagedCheckpointError)


@pytest.mark.parametrize(
    "section, key, value, says",
    [
        ("training", "learning_rate", 0.5, "training.learning_rate was 0.01, is 0.5"),
        ("training", "max_steps", 9, "training.max_steps was 6, is 9"),
        ("training", "batch_size", 8, "training.batch_size was 16, is 8"),
        ("adapter", "alpha", 1.0, "adapter.alpha was 4.0, is 1.0"),
        ("adapter", "rank", [4, 4, 4], "adapter.rank was 4, is [4, 4, 4]"),
        ("data", "cutoff_length", 99, "data.cutoff_length was 256, is 99"),
        ("backbone", "dtype", "bfloat16", "backbone.dtype was 'float32', is 'bfloat16'"),
    ],
)
def test_another_recipe_is_refused_by_the_key_that_differs(run, finished, section, key, value, says):
    _, _, root = run
    other = toy_recipe(finished[0], **{section: {key: value}}, output_dir=str(root.parent))
    before = snapshot(root)
    with pytest.raises(ValueError) as caught:
        train(other, quiet())
    assert says in str(caught.value) and str(root / STEPS[1]) in str(caught.value)
    assert snapshot(root) == before


def test_what_decides_no_bit_may_differ(run, finished, tmp_path):
    _, _, root = run
    moved = tmp_path / "moved"
    root.parent.rename(moved)
    free = toy_recipe(
        finished[0],
        output_dir=str(moved),
        device="cpu",
        evaluation={"tasks": ["boolq"], "limit": 3},
        logging={"every": 5, "project": "other"},
        training={"save_every": "never", "keep_checkpoints": 5, "resume": "exact"},
    )
    train(free, console := quiet())
    assert "resuming after step 6" in said(console)


# ---- which checkpoint a run goes on from


def test_auto_says_which_checkpoint_it_passes_over(run):
    recipe, shapes, root = run
    final = (root.parent / "adapter" / "metatt.safetensors").read_bytes()
    truncate(0.5)(root / STEPS[1])
    train(recipe, console := quiet())
    output = said(console)
    assert f"skipped a damaged checkpoint: {root / STEPS[1]}: the hash of state.safetensors" in output
    assert f"resuming after step 4 from {root / STEPS[0]}" in output
    assert names(root) == STEPS
    assert checkpoint.load(root / STEPS[1], recipe, shapes).progress.step == 6
    assert (root.parent / "adapter" / "metatt.safetensors").read_bytes() == final


def test_when_all_are_damaged_the_run_stops_and_deletes_nothing(run):
    recipe, _, root = run
    for step in STEPS:
        (root / step / "COMPLETE").unlink()
    before = snapshot(root.parent)
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints is intact .*COMPLETE is missing.*output_dir"):
        train(recipe, quiet())
    assert snapshot(root.parent) == before


def test_never_refuses_a_folder_with_checkpoints(run, finished):
    _, _, root = run
    before = snapshot(root.parent)
    fresh = toy_recipe(finished[0], output_dir=str(root.parent), training={"resume": "never"})
    with pytest.raises(ValueError, match=r"holds checkpoints \(step-000006\) and training.resume is never"):
        train(fresh, quiet())
    assert snapshot(root.parent) == before


@pytest.mark.parametrize("left", ["adapter", "exports", "results.json"])
def test_results_whose_checkpoints_are_gone_are_not_replaced(run, left):
    recipe, _, root = run
    shutil.rmtree(root)
    shutil.rmtree(root.parent / "adapter") if left != "adapter" else None
    if left == "exports":
        (root.parent / left / "lora").mkdir(parents=True)
    elif left == "results.json":
        (root.parent / left).write_text("{}")
    before = snapshot(root.parent)
    with pytest.raises(ValueError, match=f"holds {left}, but no checkpoint .*choose another output_dir, or move it"):
        train(recipe, quiet())
    assert snapshot(root.parent) == before


def test_what_a_run_leaves_before_its_first_checkpoint_is_no_loss(run):
    recipe, _, root = run
    final = (root.parent / "adapter" / "metatt.safetensors").read_bytes()
    shutil.rmtree(root)
    shutil.rmtree(root.parent / "adapter")
    train(recipe, quiet())
    assert (root.parent / "adapter" / "metatt.safetensors").read_bytes() == final


@pytest.mark.parametrize(
    "name, says", [("recipe.yaml", "not of a run's making"), ("metrics.jsonl", "belongs to no run")]
)
def test_files_of_others_are_not_replaced(tmp_path, name, says):
    recipe = toy_recipe(tmp_path)
    folder = Path(recipe.output_dir)
    folder.mkdir()
    (folder / name).write_text("# mine\nseed: 1\n")
    with pytest.raises(ValueError, match=f"{says}.*nothing was changed"):
        train(recipe, quiet())
    assert (folder / name).read_text() == "# mine\nseed: 1\n" and sorted(p.name for p in folder.iterdir())[-1] == name


def test_exact_refuses_another_number_of_threads_and_auto_warns(run, finished):
    recipe, _, root = run
    before, threads = snapshot(root.parent), torch.get_num_threads()
    exact = toy_recipe(finished[0], output_dir=str(root.parent), training={"resume": "exact"})
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(ValueError, match=f"OMP_NUM_THREADS={threads} "):
            train(exact, quiet())
        assert snapshot(root.parent) == before
        train(recipe, console := quiet())
        assert "will agree only to rounding" in said(console)
    finally:
        torch.set_num_threads(threads)
    train(exact, console := quiet())
    assert "resuming" in said(console) and "rounding" not in said(console)


def test_exact_refuses_other_kernels_and_auto_warns(run, finished, monkeypatch):
    recipe, _, root = run
    before = snapshot(root.parent)
    exact = toy_recipe(finished[0], output_dir=str(root.parent), training={"resume": "exact"})
    monkeypatch.setattr(run_module, "kernels_of", lambda _: "NVIDIA H100")
    with pytest.raises(ValueError, match=r"training\.resume is exact"):
        train(exact, quiet())
    assert snapshot(root.parent) == before
    train(recipe, console := quiet())
    assert "will agree only to rounding" in said(console)


def test_exact_takes_deterministic_kernels(tmp_path, monkeypatch):
    """Around all that computes; `test_determinism` knows what they are."""
    seen = []

    @contextlib.contextmanager
    def deterministic(device):
        seen.append(device)
        yield
        seen.append("end")

    monkeypatch.setattr(run_module, "deterministic_kernels", deterministic)
    monkeypatch.setattr(run_module, "load_backbone", lambda *_: seen.append("load") or 1 / 0)
    for resume, wanted in (("auto", ["load"]), ("exact", [CPU, "load"])):
        with pytest.raises(ZeroDivisionError):
            train(toy_recipe(tmp_path, training={"resume": resume}), quiet())
        assert seen == wanted
        seen.clear()

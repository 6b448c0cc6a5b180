"""Malformed input through the real command line: exit code 2, one message on stderr, nothing changed or deleted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from metatt_scale.cli import main
from tests.model.bad_input import CASES, backbones
from tests.model.bad_input.cases import cut, train
from tests.toy import snapshot, toy, write_toy

# ---- the test of them all


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of six steps, and a model folder with weights beside it."""
    base = tmp_path_factory.mktemp("base")
    write_toy(base)
    (base / "r.yaml").write_text(yaml.safe_dump(toy(base)))
    assert main(["train", str(base / "r.yaml")]) == 0
    assert main(["export", str(base / "run"), "--to", "merged", "--out", str(base / "model_on_disk")]) == 0
    shutil.rmtree(base / "run" / "exports", ignore_errors=True)
    return base


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of everything, with the paths in recipes and checkpoints unchanged in meaning."""
    here = tmp_path / "here"
    shutil.move(finished, here)  # the recipe names absolute paths: what is tested lies where it was made
    shutil.copytree(here, finished)
    shutil.rmtree(here)
    shutil.copytree(finished, tmp_path / "backup")
    shutil.move(finished / "model_on_disk", finished.parent / "model_on_disk")
    monkeypatch.chdir(finished)
    yield finished
    shutil.rmtree(finished)
    shutil.rmtree(finished.parent / "model_on_disk")
    shutil.copytree(tmp_path / "backup", finished)


def check(code, output, says):
    """One message, and nothing of Python in it."""
    assert code == 2, f"exit code {code}: {output}"
    lines = output.splitlines(keepends=True)
    output = "".join(line for line in lines if not line.startswith("device: "))  # generate says it on stderr
    assert output.startswith("error: ") and output.count("error: ") == 1 and output.endswith("\n"), output
    for word in says:
        assert word in output, output
    for jargon in ("Traceback", "<class", "[Errno", "object at 0x", "\x1b"):
        assert jargon not in output, output
    assert len(output) < 1200 and output.count("\n") <= 4, output


@pytest.mark.parametrize("name", CASES)
def test_one_message_and_nothing_changed(folder, capsys, name):
    make, says = CASES[name]
    arguments = make(folder)
    before = snapshot(folder)
    code = main(arguments)
    output = capsys.readouterr()
    after = snapshot(folder)
    check(code, output.err, says)
    assert {path: after.get(path) for path in before} == before
    new = {path for path in after.keys() - before.keys() if after[path] != "folder" and not path.startswith("cache")}
    assert not new, f"left behind: {new}"


def test_there_are_many_cases_and_the_files_they_break_are_good(folder, capsys):
    assert len(CASES) > 100
    assert main(["train", *train(folder)[1:]]) == 0
    backbones.model_folder()(folder)
    assert main(train(folder, backbone={"path": str(folder / "saved")})) == 2
    assert "backbone.path was" in capsys.readouterr().err, "the same run directory, another model"
    assert main(["generate", str(folder / "run"), "--prompt", "1+2", "--max-new-tokens", "2"]) == 0
    for to in ("lora", "metatt", "merged"):
        assert main(["export", str(folder / "run"), "--to", to]) == 0
        assert main(["export", str(folder / "run"), "--to", to]) == 2
        assert main(["export", str(folder / "run"), "--to", to, "--replace"]) == 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "required: recipe"),
        (["plan", "--jsn", "r.yaml"], "--jsn"),
        (["export", "run"], "required: --to"),
        (["export", "run", "--to", "gguf"], "invalid choice: 'gguf'"),
        (["evaluate", "run", "--limit", "few"], "invalid int value: 'few'"),
        (["generate", "run"], "required: --prompt"),
        (["generate", "run", "--prompt", "x", "--temperature", "hot"], "invalid float value"),
    ],
)
def test_arguments(arguments, says, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and says in output.err and "--help" in output.err
    assert output.out == "" and output.err.count("\n") == 1


# ---- our own mistakes are not hidden


@pytest.mark.parametrize("error", [AssertionError("ours"), TypeError("ours"), KeyError("ours"), IndexError("ours")])
def test_our_own_mistakes_still_show_a_traceback(folder, monkeypatch, error):
    from metatt_scale.training import loop

    def fail(self):
        raise error

    monkeypatch.setattr(loop.Trainer, "_launch", fail)
    with pytest.raises(type(error), match="ours"):
        main(train(folder))


def test_debug_shows_the_traceback_behind_a_message(folder, monkeypatch):
    monkeypatch.setenv("METATT_DEBUG", "1")
    with pytest.raises(ValueError, match="no such recipe"):
        main(["train", "none.yaml"])


def test_a_full_disk_is_one_message_and_the_older_checkpoints_stay(folder, monkeypatch, capsys):
    from metatt_scale.training import checkpoint

    before = snapshot(folder / "run")
    real, calls = checkpoint.save_tensors, []

    def save(path, tensors):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device", str(path))
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", save)
    code = main(train(folder))
    check(code, capsys.readouterr().err, ["No space left on device", "step-000006"])
    assert sorted(os.listdir(folder / "new" / "checkpoints")) == ["step-000002", "step-000004"]
    assert snapshot(folder / "run") == before


# ---- as processes


def run_process(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "metatt_scale.cli", *map(str, arguments)]
    root = Path(__file__).resolve().parents[2]
    variables = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=cwd, env=variables)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, says",
    [
        (["backbone.path=nobody/no-such-model"], ["'nobody/no-such-model'", "check the name and the network"]),
        (["backbone.path=no-such-model"], ["'no-such-model'", "check the name and the network"]),
        (["adapter.target_modules=[qproj]"], ["'qproj' matches no module"]),
    ],
)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_processes_offline(folder, overrides, says, command):
    before = snapshot(folder)
    done = run_process(command, train(folder)[1], *overrides, cwd=folder)
    check(done.returncode, done.stderr, says)
    after = snapshot(folder)
    del before["r.yaml"], after["r.yaml"]
    assert {path: value for path, value in after.items() if not path.startswith("cache")} == {
        path: value for path, value in before.items() if not path.startswith("cache")
    }


@pytest.mark.slow
def test_data_of_the_hub_offline(folder):
    arguments = train(folder, data={"train": [{"path": "nobody/no-such-data"}], "validation_size": 0})
    done = run_process(*arguments, cwd=folder, HF_DATASETS_OFFLINE="1")
    check(done.returncode, done.stderr, ["'nobody/no-such-data'", "the hub did not deliver"])


@pytest.mark.slow
def test_a_damaged_adapter_as_a_process(folder):
    cut("metatt.safetensors")(folder / "run" / "adapter")
    done = run_process("generate", folder / "run", "--prompt", "1", cwd=folder)
    check(done.returncode, done.stderr, ["metatt.safetensors: its hash differs"])
    assert done.stdout == ""


@pytest.mark.slow
def test_a_launcher_gives_the_same_message(folder):
    launcher = Path(__file__).resolve().parents[2] / "launch" / "train.py"
    done = subprocess.run(
        [sys.executable, str(launcher), "none.yaml"], capture_output=True, text=True, timeout=120, cwd=folder
    )
    check(done.returncode, done.stderr, ["none.yaml: no such recipe"])

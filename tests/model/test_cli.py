"""The command line on good input: what each command prints, writes and returns."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from metatt_scale import __version__, hardware
from metatt_scale.cli import _evaluation_settings, main
from metatt_scale.process import SPIN_COUNT
from metatt_scale.recipe import EvaluationRecipe, load_recipe
from metatt_scale.training import TrainingStopped, loop
from tests.toy import metrics, snapshot, toy, write_toy

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "device: "
"""What the first line of a command begins with."""


@pytest.fixture
def recipe(tmp_path):
    """The recipe file of a toy run in tmp_path/run."""
    write_toy(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(toy(tmp_path)))
    return tmp_path / "r.yaml"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["plan", "-h"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("usage: metatt-scale")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"metatt-scale {__version__}\n")


def test_plan_counts_as_text_and_as_json(recipe, capsys):
    assert main(["plan", str(recipe), "--json", "adapter.rank=8"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["trainable_parameters"] == 32 * 8 + 3 * 64 + 2 * 64 + 8 * 32
    assert counts["sizes"] == [32, 3, 2, 32] and counts["ranks"] == [8, 8, 8] and counts["adapted_modules"] == 6
    assert counts["lora_parameters"] == {"8": 3 * 8 * (64 + 48), "16": 3 * 16 * (64 + 48)}
    assert main(["plan", str(recipe), "adapter.rank=8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "trainable parameters 832 metatt_4d: input 32 x layer 3" in text and "LoRA r=8 instead 2,688" in text
    assert not (recipe.parent / "run").exists(), "planning writes nothing"


def test_plan_of_a_shipped_architecture_needs_no_weights(recipe, capsys):
    """Paper, table 2: MetaTT-4D of rank 8 on Q and V of Llama-2-7B."""
    assert main(["plan", str(recipe), "--json", "adapter.rank=8", "backbone.path=random:llama2_7b"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["trainable_parameters"] == 2 * 4096 * 8 + (32 + 2) * 64
    assert counts["lora_parameters"]["8"] == 4_194_304 and counts["backbone_parameters"] == 6_738_415_616


def test_train_says_what_it_did_and_what_comes_next(recipe, capsys):
    folder = recipe.parent / "run"
    assert main(["train", str(recipe), "training.max_steps=4"]) == 0
    output = capsys.readouterr()
    for words in (
        "80 examples",
        "step 4/4",
        "loss",
        "left 0:00",
        f"adapter: {folder}/adapter",
        "metatt-scale export",
    ):
        assert words in output.out
    assert "Traceback" not in output.err and "error" not in output.err
    assert output.out.startswith(DEVICE)
    files = {"recipe.yaml", "metrics.jsonl", "checkpoints", "adapter", ".lock"}
    assert set(os.listdir(folder)) == files
    assert set(os.listdir(folder / "adapter")) >= {"metatt.json", "metatt.safetensors"}
    resolved = load_recipe(folder / "recipe.yaml")
    assert resolved.training.max_steps == 4 and resolved == load_recipe(recipe, ["training.max_steps=4"])


def test_training_again_changes_no_bit(recipe, capsys):
    folder = recipe.parent / "run"
    assert main(["train", str(recipe)]) == 0
    before = snapshot(folder)
    assert main(["train", str(recipe)]) == 0
    assert "resuming after step 6" in capsys.readouterr().out and snapshot(folder) == before


def test_the_written_recipe_trains_the_same_adapter(recipe):
    assert main(["train", str(recipe)]) == 0
    resolved = recipe.parent / "run" / "recipe.yaml"
    assert main(["train", str(resolved), f"output_dir={recipe.parent / 'again'}"]) == 0
    one, other = (recipe.parent / name / "adapter" / "metatt.safetensors" for name in ("run", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_the_flag_of_the_deepspeed_launcher_is_accepted(recipe):
    assert main(["train", "--local_rank=0", str(recipe), "training.max_steps=1"]) == 0


@pytest.mark.parametrize("number, code", [(15, 143), (2, 130)])
def test_a_stopped_run_returns_the_code_of_its_signal(recipe, monkeypatch, capsys, number, code):
    def stop(self):
        raise TrainingStopped(number, 5)

    monkeypatch.setattr(loop.Trainer, "train", stop)
    assert main(["train", str(recipe)]) == code
    assert "after step 5; the checkpoint is written" in capsys.readouterr().err


def test_an_interrupt_outside_the_loop_is_one_word(recipe, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "train", interrupt)
    assert main(["train", str(recipe)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_generate_prints_the_text_alone(recipe, capsys):
    assert main(["train", str(recipe), "training.learning_rate=0.1"]) == 0
    capsys.readouterr()
    run = str(recipe.parent / "run")
    arguments = ["generate", run, "--prompt", "1+2", "--max-new-tokens", "8"]
    printed = []
    for more in ([], [], ["--backbone-only"], ["--backbone", f"random:{recipe.parent / 'model' / 'config.json'}"]):
        assert main([*arguments, *more]) == 0
        output = capsys.readouterr()
        printed.append(output.out)
        assert output.err.startswith(DEVICE)
    assert printed[0] == printed[1] == printed[3] != printed[2]
    assert "loading" not in printed[0] and "device" not in printed[0]


@pytest.mark.parametrize(
    "to, file", [("lora", "adapter_config.json"), ("merged", "config.json"), ("metatt", "metatt.json")]
)
def test_export(recipe, capsys, to, file):
    assert main(["train", str(recipe), "training.max_steps=2"]) == 0
    before = snapshot(recipe.parent / "run" / "adapter")
    capsys.readouterr()
    for out in ([], ["--out", str(recipe.parent / "elsewhere")]):
        assert main(["export", str(recipe.parent / "run"), "--to", to, *out]) == 0
        folder = Path(out[1]) if out else recipe.parent / "run" / "exports" / to
        assert (folder / file).is_file() and (folder / "README.md").is_file()
        output = capsys.readouterr().out
        assert f"{to} export: {folder}" in output.replace("\n", "")
        assert output.startswith(DEVICE) == (to == "merged")  # the others compute nothing
    assert snapshot(recipe.parent / "run" / "adapter") == before


def test_evaluate_and_benchmark_say_where_they_compute(recipe, monkeypatch, capsys):
    assert main(["train", str(recipe), "training.max_steps=1"]) == 0
    monkeypatch.setattr("metatt_scale.scoring.evaluate", lambda *_, world: {})
    monkeypatch.setattr("metatt_scale.evaluation.score_table", lambda _: "")
    monkeypatch.setattr("metatt_scale.benchmark.command._table", lambda name: lambda *_: 1 / 0)
    capsys.readouterr()
    assert main(["evaluate", str(recipe.parent / "run"), "--tasks", "boolq", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(DEVICE)
    with pytest.raises(ZeroDivisionError):
        main(["benchmark", str(recipe), "--device", "cpu"])
    assert capsys.readouterr().out.startswith(DEVICE)


def test_a_gpu_that_is_not_there_is_one_message(recipe, monkeypatch, capsys):
    assert main(["train", str(recipe), "training.max_steps=1"]) == 0
    monkeypatch.setattr(hardware, "find_hardware", lambda: hardware.Hardware(torch="2.13.0+cpu"))
    run = str(recipe.parent / "run")
    for command in (
        ["train", str(recipe), "device=cuda"],
        ["benchmark", str(recipe), "device=cuda"],
        ["benchmark", str(recipe), "--device", "cuda"],
        ["evaluate", run, "--tasks", "boolq", "--device", "cuda"],
        ["generate", run, "--prompt", "1+2", "--device", "cuda"],
        ["export", run, "--to", "merged", "--device", "cuda"],
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        output = capsys.readouterr()
        assert output.err.startswith("error: device is cuda, but ") and output.err.count("\n") == 1
    assert not (recipe.parent / "run" / "exports" / "merged").exists()


def test_evaluation_settings_are_the_recipes_with_the_options_laid_over(tmp_path):
    options = Namespace(tasks=None, data=None, limit=None, batch_size=None)
    recipe = EvaluationRecipe(tasks=("boolq",), data="folder", limit=7, batch_size=3)
    assert _evaluation_settings(options, recipe) == recipe
    options = Namespace(tasks="piqa, siqa,,", data=None, limit=1, batch_size=None)
    expected = EvaluationRecipe(tasks=("piqa", "siqa"), data="folder", limit=1, batch_size=3)
    assert _evaluation_settings(options, recipe) == expected


@pytest.mark.slow
def test_a_bad_recipe_is_told_before_anything_heavy_is_imported(recipe):
    """Also through the launcher: it is the user's first contact. An import alone changes no variable."""
    code = (
        "import os, sys\nbefore = dict(os.environ)\nfrom metatt_scale.cli import main\nassert os.environ == before\n"
        "code = main(['train', sys.argv[1], 'training.epochs=no'])\n"
        "print(code, [name for name in ('torch', 'transformers', 'accelerate', 'datasets') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "2 []\n" and done.stderr.startswith("error: ")


def test_a_process_ends_without_taking_the_interpreter_down():
    """Handlers run and nothing printed is lost, but no object is freed: a thread of gloo's might be at it still."""
    code = (
        "import atexit, sys\nfrom metatt_scale.ending import leave\n"
        "class Held:\n    def __del__(self): print('freed')\n"
        "held = Held()\natexit.register(print, 'handled', end='')\nprint('said', end=', ')\n"
        "leave(3)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (3, "said, handled", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "plan"])
def test_launchers(recipe, name):
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), str(recipe), "training.max_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_DISPLAY_ENV": "VERBOSE"}
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment.pop(variable, None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=recipe.parent, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("trainable parameters" if name == "plan" else "adapter: ") in done.stdout
    # GNU's OpenMP prints what it has read when torch loads it.
    shown = re.findall(
        r"\nOPENMP DISPLAY ENVIRONMENT BEGIN\n.*?OPENMP DISPLAY ENVIRONMENT END\n", done.stderr, re.DOTALL
    )
    assert shown and all(f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in block for block in shown)
    if name == "train":
        assert done.stderr == "".join(shown), "nothing but progress, and that on stdout"
        assert [line["step"] for line in metrics(recipe.parent / "run")] == [1, 2]

"""The `benchmark` command: what it refuses, and what it says of its settings."""

import os
import sys
import tempfile

import pytest
import torch

from metatt_scale.benchmark.report import describe_backbone
from metatt_scale.benchmark.settings import Settings
from metatt_scale.cli import main
from tests.benchmark import PEFT_WARNINGS
from tests.toy import GPT2, toy_recipe, write_toy

pytestmark = PEFT_WARNINGS


# ---- what cannot be


@pytest.mark.parametrize(
    "config, says",
    [
        (GPT2, "--length is 65, but GPT2LMHeadModel has learned 64 positions; set --length to 64 or less"),
        (
            {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300},
            "is not a causal language model that this toolkit can train (an encoder needs a `classifier`)",
        ),
    ],
)
def test_steps_refuse_what_training_refuses(tmp_path, recipe_file, config, says, capsys):
    write_toy(tmp_path, config=config)
    assert main(["benchmark", str(recipe_file), "--length", "65", "--repeats", "1"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and says in output.err and output.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--length", "1"], "--length is 1; it must be at least 2"),
        (["--examples", "-1"], "--examples is -1"),
        (["--table", "end_to_end", "--block-steps", "0"], "--block-steps is 0"),
        (["--table", "speed"], "invalid choice: 'speed'"),
        (["--table", "wire", "--examples", "4"], "--table wire takes --ranks, --repeats only"),
        (["--block-steps", "4"], "choose another table"),
        (["--new-tokens", "4"], "--table steps takes --examples, --length, --ranks, --repeats only"),
        (["--table", "generation", "--new-tokens", "0"], "--new-tokens is 0; it must be at least 1"),
        (["--table", "generation", "--block-steps", "4"], "--table generation takes --examples, --length, --new"),
        (["--ranks", "8,x"], "--ranks is '8,x'"),
        (["--ranks", "8,8"], "give different numbers"),
        (["--ranks", "0"], "numbers from 1 to 8192"),
        (["adapter.target_modules=[qproj]", "--json", "new/a/out.json"], "'qproj' matches no module"),
        (["backbone.compile=true"], "--table steps compiles no arm, so its numbers would be another run's; add back"),
        (["--json", "."], "--json is ., which is a folder"),
        (["--json", ""], "--json is ''; give the name of a file, for example steps.json"),
        (["--json", "recipe.yaml/out.json"], "recipe.yaml is a file and not a folder; give a file below a folder"),
        (["--json", "x" * 230], "(File name too long); give --json a file in a folder that you may write to"),
        (["--examples", "1000000000000"], "--examples is 1000000000000; it must be at least 1 and at most 65,536"),
        (["--table", "wire"], "start it with torchrun"),
    ],
)
def test_bad_arguments_are_one_message(recipe_file, arguments, says, capsys, monkeypatch):
    monkeypatch.chdir(recipe_file.parent)
    before = sorted(os.listdir())
    assert main(["benchmark", str(recipe_file), *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and says in output.err and output.err.count("\n") == 1
    # What only the model can tell comes after the line that names the device.
    assert output.out.count("\n") <= output.out.startswith("device: ") and sorted(os.listdir()) == before


def test_what_is_no_ordinary_file_is_not_replaced(recipe_file, capsys):
    pipe = recipe_file.with_name("pipe")
    os.mkfifo(pipe)
    assert main(["benchmark", str(recipe_file), "--json", str(pipe)]) == 2
    assert "which is no ordinary file and would be replaced" in capsys.readouterr().err and pipe.is_fifo()


def test_loops_that_know_no_tasks_are_not_measured_on_them(recipe_file, capsys):
    tasks = ["tasks={a: {}, b: {}}", "data.train=[{path: data.jsonl, task: a}, {path: data.jsonl, task: b}]"]
    assert main(["benchmark", str(recipe_file), "--table", "end_to_end", "adapter.kind=metatt_4p1d", *tasks]) == 2
    assert "the recipe has `tasks`, which the other loops" in capsys.readouterr().err


def more_than_there_is(*_):
    torch.empty(1 << 50)


def more_than_a_gpu_has(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("measure", [more_than_there_is, more_than_a_gpu_has])
def test_no_room_is_one_message(recipe_file, measure, monkeypatch, capsys):
    monkeypatch.setattr("metatt_scale.benchmark.command._table", lambda name: measure)
    assert main(["benchmark", str(recipe_file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and "--examples" in said and said.count("\n") == 1


def test_overrides_are_not_required(capsys):
    assert main(["benchmark"]) == 2
    said = capsys.readouterr().err
    assert "required: recipe" in said and "dotted.key" not in said


@pytest.mark.parametrize("given", [[], ["--json", "new/out.json"]], ids=["default", "named"])
def test_a_folder_that_takes_no_file_is_refused_first(recipe_file, given, monkeypatch, capsys):
    def refuse(*arguments, **named):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    assert main(["benchmark", str(recipe_file), *given]) == 2
    said = capsys.readouterr().err
    assert ("--json is new/out.json, and" if given else "--json is not given, and") in said
    assert "(Read-only file system); give --json a file in a folder that you may write to" in said


def test_a_measured_table_is_printed_though_its_numbers_cannot_be_written(recipe_file, monkeypatch, capsys):
    def fail(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("metatt_scale.benchmark.report.write_json", fail)
    options = ("--table", "sweep", "--repeats", "1", "--ranks", "4", "--json", str(recipe_file.with_name("a.json")))
    assert main(["benchmark", str(recipe_file), *options]) == 2
    output = capsys.readouterr()
    assert "MetaTT-4D r=4" in output.out and "raw numbers" not in output.out
    assert "No space left on device" in output.err


def test_only_the_wire_is_measured_by_several_processes(recipe_file, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["benchmark", str(recipe_file)]) == 2
    assert "`benchmark --table steps` works in one" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["steps", "end_to_end", "generation"])
def test_peft_is_named_where_it_is_missing_before_anything_is_loaded(recipe_file, table, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = [f"backbone.path={recipe_file.parent / 'nowhere'}", "--table", table, "--repeats", "1"]
    assert main(["benchmark", str(recipe_file), *arguments]) == 2
    assert "PEFT, which is not installed; run `pip install metatt-scale[peft]`" in capsys.readouterr().err


# ---- what it says


def test_settings_have_defaults_that_the_help_names(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    text = capsys.readouterr().out
    text = " ".join(text.split())
    assert "(8,16,64); for steps, sweep, wire, generation" in text
    assert f"({Settings().block_steps}); for end_to_end" in text and "rounds that count (7) --" in text


def test_a_title_names_what_is_not_the_default(tmp_path):
    plain = toy_recipe(tmp_path)
    other = toy_recipe(tmp_path, backbone={"attention": "eager"}, adapter={"operator": "reference"})
    assert describe_backbone(plain).endswith("checkpointing")
    assert describe_backbone(other) == describe_backbone(plain) + ", attention eager, operator reference"

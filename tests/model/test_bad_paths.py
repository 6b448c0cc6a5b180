"""Paths that cannot be used and values out of range, through the command line: one message, exit code 2."""

import os

import pytest

from metatt_scale.cli import main
from tests.exports import untrained_run
from tests.toy import snapshot

UNKNOWN = "~nobody-of-this-name/x"


@pytest.fixture
def run(tmp_path):
    return untrained_run(tmp_path)[0]


def refused(capsys, *arguments, naming):
    """The message of a command that ends with 2, which names all of `naming`."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # before it `generate` says where it would compute
    assert error.startswith("error: "), error
    for name in naming:
        assert name in error, error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", UNKNOWN),
        ("backbone.path", UNKNOWN),
        ("backbone.path", f"random:{UNKNOWN}"),
        ("data.train", f"[{{path: {UNKNOWN}}}]"),
        ("data.cache_dir", UNKNOWN),
        ("parallel.deepspeed_config", UNKNOWN),
        ("adapter.start_from", UNKNOWN),
    ],
)
def test_an_unknown_user_in_a_recipe(recipe_file, capsys, key, value):
    extra = ["parallel.backbone=zero3"] if key.startswith("parallel") else []
    name = "data source" if key == "data.train" else key
    refused(capsys, "train", recipe_file, f"{key}={value}", *extra, naming=[name, "nobody-of-this-name"])


def test_an_unknown_user_in_an_argument(run, recipe_file, capsys, tmp_path):
    before = snapshot(tmp_path)
    for arguments, name in (
        (["train", UNKNOWN], "recipe"),
        (["study", UNKNOWN], "~"),
        (["generate", UNKNOWN, "--prompt", "a"], "~"),
        (["generate", run, "--prompt", "a", "--backbone", UNKNOWN], "backbone.path"),
        (["export", run, "--to", "metatt", "--out", UNKNOWN], "--out"),
        (["report", run, "--out", UNKNOWN], "--out"),
        (["evaluate", run, "--tasks", "piqa", "--data", UNKNOWN], "evaluation.data"),
        (["benchmark", recipe_file, "--json", UNKNOWN], "--json"),
    ):
        refused(capsys, *arguments, naming=[name, "nobody-of-this-name"])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("text", ["a\0b", "x" * 300, "x/" * 3000], ids=["null", "name", "whole"])
def test_a_path_that_no_file_system_takes(run, recipe_file, capsys, text):
    for arguments, name in (
        (["train", text], "recipe"),
        (["study", text], "argument study"),
        (["generate", text, "--prompt", "a"], "argument RUN"),
        (["generate", run, "--prompt", "a", "--backbone", text], "argument --backbone"),
        (["export", run, "--to", "metatt", "--out", text], "argument --out"),
        (["report", text], "argument RUN"),
        (["report", run, "--out", text], "argument --out"),
        (["evaluate", run, "--data", text], "argument --data"),
        (["evaluate", run, "--data", ".", "--tasks", text], "tasks"),
        (["benchmark", recipe_file, "--json", text], "argument --json"),
    ):
        refused(capsys, *arguments, naming=[name])


def test_a_file_where_a_folder_is_needed(run, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        refused(
            capsys, "export", run, "--to", "metatt", "--out", tmp_path / out, naming=["--out", str(tmp_path / "file")]
        )
        refused(capsys, "report", run, "--out", tmp_path / out, naming=["--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_leaves_no_room_for_the_one_it_is_written_under(run, capsys, tmp_path):
    refused(capsys, "export", run, "--to", "metatt", "--out", tmp_path / ("x" * 250), naming=["x" * 200, "255"])
    assert not [name for name in os.listdir(tmp_path) if "x" in name and "x" * 9 in name]


@pytest.mark.parametrize("path", ["package:", "package:a.b", "package:sys", "package:__main__", "random:"])
def test_a_backbone_without_a_name(recipe_file, capsys, path):
    refused(capsys, "train", recipe_file, f"backbone.path={path}", naming=["backbone.path", path])


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e-9", "1e9"])
def test_a_temperature_out_of_range(run, capsys, value, monkeypatch):
    monkeypatch.setattr("metatt_scale.reopen.load_backbone", None)  # known before a model is loaded
    refused(
        capsys, "generate", run, "--prompt", "a", f"--temperature={value}", naming=["temperature", "0.001", "100"]
    )
    refused(capsys, "generate", run, "--prompt", "a", "--max-new-tokens=0", naming=["max_new_tokens"])


@pytest.mark.parametrize("metric", ["pearson", "f1"])
def test_a_metric_without_labels(recipe_file, capsys, metric):
    keys = ["data.format=sentences", "data.text_fields=[text]", f"classifier={{metric: {metric}}}"]
    refused(capsys, "train", recipe_file, *keys, naming=["classifier.labels"])

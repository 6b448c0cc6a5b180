"""Malformed input through the real command line: exit code 2, one message on stderr, nothing changed or deleted."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from metatt_scale.cli import main
from metatt_scale.files import sha256
from tests.toy import GPT2, LLAMA, snapshot, toy, write_toy

CASES = {}
"""name -> (function that breaks something in a folder and returns the arguments, what the message must say)."""


def case(name, *says):
    """Register a function as a case."""

    def register(function):
        assert name not in CASES
        CASES[name] = (function, says)
        return function

    return register


def cases(make, table):
    """Register make(*row's arguments) for each row (name, arguments, says...)."""
    for name, arguments, *says in table:
        CASES[name] = (make(*arguments), tuple(says))


def train(folder, *overrides, text=None, **sections):
    """Write a recipe and return the arguments that train it."""
    file = folder / "r.yaml"
    # Its own run directory, unless the case speaks of the finished one.
    data = toy(folder, **{"output_dir": str(folder / "new"), **sections})
    file.write_text(yaml.safe_dump(data) if text is None else text)
    return ["train", str(file), *overrides]


# ---- recipes and arguments


@case("no recipe file", "no such recipe", "r.yaml")
def _(folder):
    train(folder)
    return ["train", str(folder / "none.yaml")]


@case("recipe is a folder", "is a folder")
def _(folder):
    return ["train", str(folder)]


@case("recipe is a model file", "not UTF-8")
def _(folder):
    return ["train", str(folder / "run" / "adapter" / "metatt.safetensors")]


def recipe_text(text):
    return lambda folder: train(folder, text=text)


def override(*overrides):
    return lambda folder: train(folder, *overrides)


def section(**sections):
    return lambda folder: train(folder, **sections)


cases(
    lambda make, *arguments, **sections: make(*arguments, **sections),
    [
        ("recipe is empty", (recipe_text, ""), "the file is empty"),
        ("recipe is broken YAML", (recipe_text, "a: [1\nb: 2"), "line 2", "not valid YAML"),
        ("recipe builds objects", (recipe_text, "a: !!python/object/apply:os.system [echo]"), "tag"),
        ("recipe lacks keys", (recipe_text, "seed: 1"), "`output_dir` is missing", "`backbone` is missing"),
        ("unknown key", (override, "training.learning_rte=1"), "did you mean `training.learning_rate`"),
        ("wrong type", (override, "training.epochs=two"), '`training.epochs` is "two"; give a whole number'),
        ("override without value", (override, "training.epochs"), "expected dotted.key=value"),
        ("rank too long", (override, "adapter.rank=[4,4,4,4]"), "`rank` has 4 entries", "3 inner bonds"),
        ("rank zero", (override, "adapter.rank=0"), "`rank` must be at least 1"),
        ("init of three cores", (override, "adapter.init=ze-no-id"), "needs 4 letter pairs"),
        ("init not zero", (override, "adapter.init=no-no-no-id"), "chain that is not zero", "allow_nonzero_start"),
        ("mode order", (override, "adapter.mode_order=[input,layer,output]"), "exactly once"),
        (
            "targets match nothing",
            (override, "adapter.target_modules=[qproj]"),
            "'qproj' matches no module",
            "q_proj",
        ),
        ("target is not linear", (override, "adapter.target_modules=[self_attn]"), "which is not a linear module"),
        ("target outside layers", (override, "adapter.target_modules=[lm_head]"), "belongs to no layer"),
        ("expression matches nothing", (override, "adapter.target_modules=q_proj"), "regular expression"),
        ("expression is broken", (override, "adapter.target_modules='('"), "is not a regular expression"),
        ("layers beyond the model", (override, "adapter.layers=[7,9]"), "the model's layers are 0 to 2"),
        ("validation takes all", (override, "data.validation_size=80"), "leaves nothing to train on"),
        ("best without validation", (override, "data.validation_size=0", "training.keep=best"), "validation records"),
        ("weight gives nothing", (override, "data.train=[{path: data.jsonl, weight: 1e-6}]"), "raise its `weight`"),
        ("no flash attention", (override, "backbone.attention=flash_attention_2"), "needs the package flash-attn"),
    ],
)


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


# ---- records


def data(name, content, **keys):
    def make(folder):
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        return train(folder, data={"train": [{"path": str(path)}], "validation_size": 0, **keys})

    return make


GOOD = {"instruction": "a", "output": "b"}
PACKED = gzip.compress(
    b"".join(json.dumps({"instruction": str(i), "output": "b"}).encode() + b"\n" for i in range(99))
)
cases(
    lambda *arguments, **keys: data(*arguments, **keys),
    [
        ("data missing", ("none.jsonl", None), "none.jsonl' does not exist"),
        ("data of unknown kind", ("data.csv", b"a,b"), "data.csv is of no known kind"),
        ("broken line", ("d.jsonl", b'{"instruction": "a", "output": "b"}\n{"instr'), "d.jsonl:2: line is not JSON"),
        ("missing field", ("d.jsonl", [GOOD, {"instruction": "a"}]), "d.jsonl:2", "no field 'output'"),
        (
            "wrong type",
            ("d.jsonl", [GOOD, GOOD, {"instruction": 1, "output": "b"}]),
            "d.jsonl:3",
            "a number in field",
        ),
        ("record is a list", ("d.jsonl", [[1, 2]]), "d.jsonl:1: record is an array"),
        ("empty answer", ("d.jsonl", [{"instruction": "a", "output": " "}]), "d.jsonl:1", "nothing to learn from"),
        ("file empty", ("d.jsonl", b""), "holds no usable instruction record"),
        ("array empty", ("d.json", b"[]"), "holds no usable instruction record"),
        ("array broken", ("d.json", b'[{"instruction":\n "a"'), "d.json:2: file is not JSON"),
        ("not UTF-8", ("d.jsonl", b'{"instruction": "\xff", "output": "b"}\n'), "d.jsonl:1: line is not UTF-8"),
        ("not a gzip", ("d.jsonl.gz", b"plain text"), "is a damaged gzip file"),
        ("gzip cut short", ("d.jsonl.gz", PACKED[: len(PACKED) // 2]), "is a damaged gzip file"),
        ("gzip with a flipped byte", ("d.jsonl.gz", PACKED[:30] + b"\x00" + PACKED[31:]), "is a damaged gzip file"),
    ],
)


@case("folder without data", "holds no .json")
def _(folder):
    (folder / "empty").mkdir()
    return train(folder, data={"train": [{"path": str(folder / "empty")}]})


@case("nothing is left after the cut", "raise `data.cutoff_length`")
def _(folder):
    (folder / "long.jsonl").write_text(json.dumps({"instruction": "a" * 99, "output": "b"}))
    source = {"train": [{"path": str(folder / "long.jsonl")}], "validation_size": 0, "cutoff_length": 8}
    return train(folder, data=source)


@case("every record is bad and skipped", "no usable instruction record", "d.jsonl:1")
def _(folder):
    return data("d.jsonl", [{"a": 1}] * 3, on_bad_record="skip")(folder)


@case("chat without a template", "the tokenizer has no chat template")
def _(folder):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return data("d.jsonl", [{"messages": turns}], format="chat")(folder)


@case("cache is a file", "token cache", "data.cache_dir")
def _(folder):
    return train(folder, data={"cache_dir": str(folder / "data.jsonl")})


@case("output_dir is a file", "data.jsonl is a file; choose another output_dir")
def _(folder):
    return train(folder, output_dir=str(folder / "data.jsonl"))


@case("output_dir is below a file", "data.jsonl is a file; choose another output_dir")
def _(folder):
    return train(folder, output_dir=str(folder / "data.jsonl" / "a" / "b"))


# ---- backbones


def backbone(make):
    """A case whose backbone.path is what `make(folder)` returns."""
    return lambda folder: train(folder, backbone={"path": make(folder)})


def config(content):
    """`random:` on a folder whose config.json is this."""

    def make(folder):
        (folder / "other").mkdir()
        (folder / "other" / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return f"random:{folder / 'other'}"

    return backbone(make)


def model_folder(*damages):
    """A saved model (from the module's finished run) with damage done to it."""

    def make(folder):
        target = folder / "saved"
        shutil.copytree(folder.parent / "model_on_disk", target)
        for damage in damages:
            damage(target)
        return str(target)

    return backbone(make)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name, share=0.5):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def put(name, content):
    return lambda folder: (folder / name).write_text(content)


BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 300}
VISION = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
cases(
    lambda make: make,
    [
        ("no such folder", (backbone(lambda folder: str(folder / "none")),), "no such folder"),
        ("path is a file", (backbone(lambda folder: str(folder / "model" / "config.json")),), "write random:"),
        ("gguf missing", (backbone(lambda folder: str(folder / "m.gguf")),), "no such GGUF file"),
        ("package missing", (backbone(lambda _: "package:no_such_package"),), "is not installed", "pip install"),
        ("package without model", (backbone(lambda _: "package:json"),), "expected one .gguf file"),
        ("package is nonsense", (backbone(lambda _: "package:a/b"),), "is not installed"),
        ("random unknown", (backbone(lambda _: "random:gpt5"),), "'random:gpt5'", "shipped architecture"),
        ("random empty folder", (backbone(lambda folder: f"random:{folder / 'run'}"),), "neither a config JSON"),
        ("config is broken", (config("{"),), "config.json: not a transformers config JSON"),
        ("config is a list", (config([1]),), "config.json: not a transformers config JSON"),
        ("config lacks model_type", (config({"hidden_size": 32}),), "config.json: not a transformers config JSON"),
        ("config of unknown type", (config({"model_type": "nope"}),), "config.json: not a transformers config JSON"),
        ("config with text for a number", (config({**LLAMA, "hidden_size": "big"}),), "config.json"),
        ("config of a vision model", (config(VISION),), "vit"),
        ("config of an encoder", (config(BERT),), "BertForMaskedLM is not a causal language model"),
        ("vocabulary too small", (config({**LLAMA, "vocab_size": 20}),), "has embeddings for 20 tokens only"),
        ("folder is empty", (backbone(lambda folder: str(folder / "run")),), "config.json"),
        ("folder without weights", (backbone(lambda folder: str(folder / "model")),), "no .safetensors file"),
        ("no tokenizer", (model_folder(without("tokenizer.json", "tokenizer_config.json")),), "tokenizer"),
        ("tokenizer broken", (model_folder(put("tokenizer.json", "{")),), "tokenizer"),
        ("tokenizer is garbage", (model_folder(put("tokenizer.json", "[1, 2]")),), "tokenizer"),
        ("weights cut short", (model_folder(cut("model.safetensors")),), "saved"),
        ("weights empty", (model_folder(cut("model.safetensors", 0)),), "saved"),
        ("weights missing", (model_folder(without("model.safetensors")),), ".safetensors"),
        ("model config broken", (model_folder(put("config.json", "{")),), "saved"),
    ],
)


@case("records longer than the positions", "learned 6 positions")
def _(folder):
    arguments = config({**GPT2, "n_positions": 6})(folder)
    return [*arguments, "adapter.target_modules=[c_attn]"]


@case("GPT-2 quantised", "no torch Linear inside its layers")
def _(folder):
    arguments = config(GPT2)(folder)
    return [*arguments, "adapter.target_modules=[c_attn]", "backbone.quantization=nf4"]


@case("plan matches nothing", "'qproj' matches no module")
def _(folder):
    return ["plan", *train(folder)[1:], "adapter.target_modules=[qproj]"]


@case("plan of nothing", "no such folder")
def _(folder):
    return ["plan", *train(folder)[1:], "backbone.path=/none/at/all"]


# ---- checkpoints


def damaged_run(*damages, **sections):
    """Go on with the finished run after damage to its checkpoints."""

    def make(folder):
        for damage in damages:
            damage(folder / "run" / "checkpoints")
        return train(folder, output_dir=str(folder / "run"), **sections)

    return make


def in_both(damage):
    return lambda root: [damage(root / name) for name in ("step-000004", "step-000006")]


cases(
    lambda make: make,
    [
        ("checkpoints cut", (damaged_run(in_both(cut("state.safetensors"))),), "none of the 2 checkpoints is whole"),
        ("markers missing", (damaged_run(in_both(without("COMPLETE"))),), "COMPLETE is missing"),
        ("states missing", (damaged_run(in_both(without("state.json"))),), "state.json is missing"),
        ("states garbage", (damaged_run(in_both(put("state.json", "{"))),), "hash of state.json"),
        ("another recipe", (damaged_run(adapter={"alpha": 2.0}),), "adapter.alpha was 4.0, is 2.0"),
        ("another rank", (damaged_run(adapter={"rank": 5}),), "adapter.rank was 4, is 5"),
        ("never resume", (damaged_run(training={"resume": "never"}),), "training.resume is never"),
        ("checkpoints is a file", (lambda folder: _checkpoints_file(folder),), "checkpoints is a file; choose"),
    ],
)


def _checkpoints_file(folder):
    (folder / "other_run").mkdir()
    (folder / "other_run" / "checkpoints").write_text("mine")
    return train(folder, output_dir=str(folder / "other_run"))


# ---- adapters


def edit(**changes):
    """Change keys of metatt.json; a function gets the old value."""

    def damage(folder):
        file = folder / "run" / "adapter" / "metatt.json"
        description = json.loads(file.read_text())
        for key, value in changes.items():
            if value is None:
                del description[key]
            else:
                description[key] = value(description[key]) if callable(value) else value
        file.write_text(json.dumps(description))

    return damage


def below_adapter(damage):
    return lambda folder: damage(folder / "run" / "adapter")


def signed_core(folder):
    """A core of another shape, with the hash of the file put right."""
    file = folder / "run" / "adapter" / "metatt.safetensors"
    save_file({**load_file(file), "core_1": torch.zeros(4, 5, 4)}, file)
    edit(weights_sha256=sha256(file))(folder)


def missing_core(folder):
    file = folder / "run" / "adapter" / "metatt.safetensors"
    cores = load_file(file)
    del cores["core_3"]
    save_file(cores, file)
    edit(weights_sha256=sha256(file))(folder)


def garbage_core(folder):
    file = folder / "run" / "adapter" / "metatt.safetensors"
    file.write_bytes(b"\x00" * 64)
    edit(weights_sha256=sha256(file))(folder)


def other_model(folder):
    (folder / "model" / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": 64}))


def fewer_layers(folder):
    (folder / "model" / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 2}))


def first_target(**changes):
    return edit(targets=lambda targets: [{**targets[0], **changes}, *targets[1:]])


DAMAGED_ADAPTERS = {
    "weights cut": (below_adapter(cut("metatt.safetensors")), "the file is damaged"),
    "weights missing": (below_adapter(without("metatt.safetensors")), "metatt.safetensors is missing"),
    "weights garbage": (garbage_core, "damaged adapter"),
    "a core missing": (missing_core, "damaged adapter"),
    "a core of another shape": (signed_core, "holds"),
    "description broken": (below_adapter(put("metatt.json", '{"format"')), "not readable as JSON"),
    "description nested": (below_adapter(put("metatt.json", "[" * 100_000)), "not readable as JSON"),
    "description a list": (below_adapter(put("metatt.json", "[]")), "unknown adapter format"),
    "description of the future": (edit(format=9), "unknown adapter format"),
    "description without recipe": (edit(recipe=None), "no usable `recipe`"),
    "description with half a recipe": (edit(recipe={"seed": 1}), "`backbone` is missing"),
    "description without origin": (edit(base_model=None), "no usable `base_model`"),
    "sizes edited": (edit(sizes=[32, 3, 2, 33]), "describes cores of shapes"),
    "ranks edited": (edit(ranks=[4, 4]), "damaged adapter"),
    "modes edited": (edit(modes=["input", "layer", "projection", "colour"]), "damaged adapter"),
    "alpha edited": (edit(alpha="much"), "damaged adapter"),
    "alpha not finite": (edit(alpha=float("nan")), "damaged adapter"),
    "targets missing": (edit(targets=None), "damaged adapter"),
    "target a number": (edit(targets=[1]), "damaged adapter"),
    "target of layer 99": (first_target(layer=99), "damaged adapter"),
    "target of layer -1": (first_target(layer=-1), "damaged adapter"),
    "target with text": (first_target(d_in="wide"), "damaged adapter"),
}
ADAPTERS_ON_A_BACKBONE = {
    "another model": (other_model, "made for a model whose model.layers.0.self_attn.q_proj is 32 -> 32", "64 -> 64"),
    "fewer layers": (fewer_layers, "no such linear module"),
    "target renamed": (first_target(path="model.layers.0.nothing"), "no such linear module"),
}
COMMANDS = {
    "generate": lambda run: ["generate", run, "--prompt", "1+2"],
    "export lora": lambda run: ["export", run, "--to", "lora"],
    "export merged": lambda run: ["export", run, "--to", "merged"],
    "evaluate": lambda run: ["evaluate", run, "--tasks", "boolq", "--data", str(Path(run).parent)],
}


def on_adapter(damage, command):
    def make(folder):
        damage(folder)
        return COMMANDS[command](str(folder / "run"))

    return make


for _name, (_damage, *_says) in DAMAGED_ADAPTERS.items():
    _needs_model = ("generate", "export merged") if _name in ("weights cut", "sizes edited") else ("generate",)
    for _command in (*_needs_model, "export lora"):
        CASES[f"{_command}: {_name}"] = (on_adapter(_damage, _command), tuple(_says))
for _name, (_damage, *_says) in ADAPTERS_ON_A_BACKBONE.items():
    for _command in ("generate", "export merged", "evaluate"):
        CASES[f"{_command}: {_name}"] = (on_adapter(_damage, _command), tuple(_says))


def on_run(*arguments):
    return lambda folder: [argument.replace("RUN", str(folder / "run")) for argument in arguments]


(lambda table: cases(on_run, table))(
    [
        ("no run", ("generate", "RUN-x", "--prompt", "a"), "no such folder"),
        ("a folder that is no run", ("generate", "RUN/checkpoints", "--prompt", "a"), "holds no adapter"),
        ("a file that is no run", ("generate", "RUN/recipe.yaml", "--prompt", "a"), "no such folder"),
        ("evaluate no run", ("evaluate", "RUN-x", "--tasks", "boolq"), "no such folder"),
        ("evaluate without tasks", ("evaluate", "RUN"), "no tasks: name some with --tasks"),
        ("evaluate with empty tasks", ("evaluate", "RUN", "--tasks", " , "), "no tasks"),
        ("limit 0", ("evaluate", "RUN", "--tasks", "boolq", "--limit", "0"), "--limit is 0; it must be at least 1"),
        ("batch size -1", ("evaluate", "RUN", "--tasks", "boolq", "--batch-size", "-1"), "--batch-size is -1"),
        ("no such task data", ("evaluate", "RUN", "--tasks", "boolq", "--data", "RUN/none"), "no such folder"),
        ("no data of the task", ("evaluate", "RUN", "--tasks", "boolq", "--data", "RUN"), "'boolq' has no data"),
        ("empty prompt", ("generate", "RUN", "--prompt", ""), "a prompt is empty"),
        ("no new tokens", ("generate", "RUN", "--prompt", "a", "--max-new-tokens", "0"), "at least 1"),
        ("negative heat", ("generate", "RUN", "--prompt", "a", "--temperature", "-1"), "at least 0"),
        ("no such backbone", ("generate", "RUN", "--prompt", "a", "--backbone", "/none/x"), "no such folder"),
        ("empty backbone", ("generate", "RUN", "--prompt", "a", "--backbone", ""), "backbone.path"),
        ("export into the run", ("export", "RUN", "--to", "lora", "--out", "RUN"), "exists already", "--replace"),
        ("export into a file", ("export", "RUN", "--to", "lora", "--out", "RUN/recipe.yaml"), "exists already"),
        ("export below a file", ("export", "RUN", "--to", "metatt", "--out", "RUN/recipe.yaml/x"), "recipe.yaml"),
    ]
)


@case("an unfinished run", "has checkpoints but has not finished")
def _(folder):
    shutil.rmtree(folder / "run" / "adapter")
    return ["export", str(folder / "run"), "--to", "lora"]


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
    assert (
        main(["train", *train(folder, backbone={"path": model_folder()(folder) and str(folder / "saved")})[1:]]) == 2
    )
    assert "backbone.path was" in capsys.readouterr().err, "the same run directory, another model"
    assert main(["generate", str(folder / "run"), "--prompt", "1+2", "--max-new-tokens", "2"]) == 0
    for to in ("lora", "metatt", "merged"):
        assert main(["export", str(folder / "run"), "--to", to]) == 0
        assert main(["export", str(folder / "run"), "--to", to]) == 2
        assert main(["export", str(folder / "run"), "--to", to, "--replace"]) == 0


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

"""Finished runs with damaged checkpoints or adapters, and commands that cannot be done with a whole one."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from metatt_scale.files import sha256
from tests.model.bad_input.cases import CASES, case, cases, cut, put, train, without
from tests.toy import LLAMA

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


def checkpoints_file(folder):
    (folder / "other_run").mkdir()
    (folder / "other_run" / "checkpoints").write_text("mine")
    return train(folder, output_dir=str(folder / "other_run"))


cases(
    lambda make: make,
    [
        ("checkpoints cut", (damaged_run(in_both(cut("state.safetensors"))),), "none of the 2 checkpoints is intact"),
        ("markers missing", (damaged_run(in_both(without("COMPLETE"))),), "COMPLETE is missing"),
        ("states missing", (damaged_run(in_both(without("state.json"))),), "state.json is missing"),
        ("states garbage", (damaged_run(in_both(put("state.json", "{"))),), "hash of state.json"),
        ("another recipe", (damaged_run(adapter={"alpha": 2.0}),), "adapter.alpha was 4.0, is 2.0"),
        ("another rank", (damaged_run(adapter={"rank": 5}),), "adapter.rank was 4, is 5"),
        ("never resume", (damaged_run(training={"resume": "never"}),), "training.resume is never"),
        ("checkpoints is a file", (checkpoints_file,), "checkpoints is a file; choose"),
    ],
)


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
    "a core missing": (missing_core, "core_3 is missing"),
    "a core of another shape": (signed_core, "core_1"),
    "description broken": (below_adapter(put("metatt.json", '{"format"')), "metatt.json", "no whole JSON"),
    "description nested": (below_adapter(put("metatt.json", "[" * 100_000)), "metatt.json", "nested too deeply"),
    "description a list": (below_adapter(put("metatt.json", "[]")), "metatt.json", "a JSON object"),
    "description of the future": (edit(format=9), "`format` is 9", "the version that wrote it"),
    "description without recipe": (edit(recipe=None), "`recipe` is missing"),
    "description with half a recipe": (edit(recipe={"seed": 1}), "`backbone` is missing"),
    "description without origin": (edit(base_model=None), "`base_model` is missing"),
    "sizes edited": (edit(sizes=[32, 3, 2, 33]), "core_3"),
    "ranks edited": (edit(ranks=[4, 4]), "damaged adapter"),
    "modes edited": (edit(modes=["input", "layer", "projection", "colour"]), "damaged adapter"),
    "alpha edited": (edit(alpha="much"), "`alpha`"),
    "alpha not finite": (edit(alpha=float("nan")), "`alpha`"),
    "targets missing": (edit(targets=None), "`targets` is missing"),
    "target a number": (edit(targets=[1]), "`targets.0`"),
    "target of layer 99": (first_target(layer=99), "damaged adapter"),
    "target of layer -1": (first_target(layer=-1), "`targets.0.layer`"),
    "target 10**9 wide": (first_target(d_in=10**9, d_out=10**9), "damaged adapter"),
    "a module twice": (edit(targets=lambda targets: targets[:1] * 2), "metatt.json", "twice"),
    "a number of 400 digits": (edit(step=10**400), "`step`"),
    "a key of half a character": (edit(more={"\ud800": 1}), "surrogate"),
    "target with text": (first_target(d_in="wide"), "`targets.0.d_in`"),
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


cases(
    on_run,
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
        ("negative heat", ("generate", "RUN", "--prompt", "a", "--temperature", "-1"), "temperature", "-1"),
        ("no such backbone", ("generate", "RUN", "--prompt", "a", "--backbone", "/none/x"), "no such folder"),
        ("empty backbone", ("generate", "RUN", "--prompt", "a", "--backbone", ""), "backbone.path"),
        ("export into the run", ("export", "RUN", "--to", "lora", "--out", "RUN"), "exists already", "--replace"),
        ("export into a file", ("export", "RUN", "--to", "lora", "--out", "RUN/recipe.yaml"), "--out", "recipe.yaml"),
        ("export below a file", ("export", "RUN", "--to", "metatt", "--out", "RUN/recipe.yaml/x"), "recipe.yaml"),
    ],
)


@case("an unfinished run", "has checkpoints but has not finished")
def _(folder):
    shutil.rmtree(folder / "run" / "adapter")
    return ["export", str(folder / "run"), "--to", "lora"]

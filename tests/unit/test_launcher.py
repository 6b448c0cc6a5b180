"""Which engine holds the backbone: every launcher's environment against every wish of the recipe."""

import itertools
import json
import os
from pathlib import Path

import pytest

from metatt_scale.parallel.launcher import ContradictionError, read_launch
from metatt_scale.recipe import ParallelRecipe, RecipeError

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "python": {},
    "torchrun": {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"},
    "accelerate plain": {"TORCHELASTIC_RUN_ID": "1", "ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"},
    "accelerate fsdp2": {"TORCHELASTIC_RUN_ID": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "accelerate zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "accelerate zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "deepspeed": {"CROSS_RANK": "0", "CROSS_SIZE": "1", "WORLD_SIZE": "2"},
}
WANTED = {
    "python": None,
    "torchrun": None,
    "accelerate plain": None,
    "accelerate fsdp2": "fsdp2",
    "accelerate zero3": "zero3",
    "accelerate zero2": "replicate",
    "deepspeed": "zero3",
}
"""What each launcher asks for; None leaves it to the recipe."""


@pytest.fixture
def launched(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "CROSS_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)

    def launch(name):
        for key, value in LAUNCHERS[name].items():
            monkeypatch.setenv(key, value)

    return launch


def write(tmp_path, stage):
    path = tmp_path / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(path)


@pytest.mark.parametrize(
    "name, backbone", list(itertools.product(LAUNCHERS, ["auto", "replicate", "fsdp2", "zero3"]))
)
def test_launcher_and_recipe_agree_or_are_told(launched, name, backbone):
    launched(name)
    asked, recipe = WANTED[name], ParallelRecipe(backbone=backbone)
    if backbone != "auto" and asked not in (None, backbone):
        with pytest.raises(
            RecipeError, match=rf"parallel\.backbone is {backbone}, but .* means {asked}; set .* start"
        ):
            read_launch(recipe)
        return
    launch = read_launch(recipe)
    assert launch.strategy == (backbone if backbone != "auto" else asked or "replicate")
    assert (launch.note is not None) == (name == "accelerate zero2")
    assert launch.deepspeed is None


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", ["python", "torchrun", "accelerate zero3", "deepspeed"])
def test_lower_stages_have_nothing_to_shard(launched, tmp_path, name, stage):
    launched(name)
    launch = read_launch(ParallelRecipe(deepspeed_config=write(tmp_path, stage)))
    assert launch.strategy == "replicate" and launch.deepspeed is None
    assert launch.note and f"ZeRO-{stage} shards optimizer state" in launch.note and "\n" not in launch.note
    with pytest.raises(RecipeError, match="name a DeepSpeed file of stage 3"):
        read_launch(ParallelRecipe(backbone="zero3", deepspeed_config=write(tmp_path, stage)))


@pytest.mark.parametrize("name", ["python", "torchrun", "accelerate zero3", "accelerate zero2", "deepspeed"])
def test_a_file_of_stage_3_shards(launched, tmp_path, name):
    launched(name)
    launch = read_launch(ParallelRecipe(deepspeed_config=write(tmp_path, 3)))
    assert launch.strategy == "zero3" and launch.deepspeed == {"zero_optimization": {"stage": 3}}
    assert launch.deepspeed_file == str(tmp_path / "zero3.json")


def test_accelerates_own_deepspeed_file_counts(launched, tmp_path, monkeypatch):
    launched("accelerate zero3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", write(tmp_path, 2))
    assert read_launch(ParallelRecipe()).strategy == "replicate"
    launch = read_launch(ParallelRecipe(deepspeed_config=write(tmp_path, 3)))  # the recipe's file goes first
    assert launch.strategy == "zero3"


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a DeepSpeed JSON file"),
        ("[]", "not a DeepSpeed JSON file"),
        (None, "not a DeepSpeed JSON file"),
        ("[" * 10_000, "not a DeepSpeed JSON file"),
        ('{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": Infinity}}', "Infinity is no JSON number"),
        ('{"zero_optimization": {"stage": 4}}', "stage is 4"),
        ('{"zero_optimization": {"stage": true}}', "stage is true; it must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "auto"}}', 'stage is "auto"'),
        ('{"zero_optimization": 3}', "zero_optimization is 3; it must be an object"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}',
            'offload_param is "cpu"; it must be an object',
        ),
        ('{"zero_optimization": {"stage": 3, "offload_param": null}}', "offload_param is null; .* or be left out"),
        ('{"zero_optimization": {"stage": 3}, "bf16": true}', "bf16 is true; it must be an object"),
        ('{"zero_optimization": {"stage": 3}, "fp16": []}', r"fp16 is \[\]; it must be an object"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_deepspeed_files(launched, tmp_path, content, message):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=message) as refusal:
        read_launch(ParallelRecipe(deepspeed_config=str(path)))
    assert str(path) in str(refusal.value)


FSDP2_ONLY = {"cpu_offload": True, "shard_size": 2, "reshard_after_forward": False}


@pytest.mark.parametrize("name, value", FSDP2_ONLY.items())
@pytest.mark.parametrize("strategy", ["replicate", "zero3"])
def test_settings_of_fsdp2_under_another_engine(launched, name, value, strategy):
    message = (
        rf"parallel\.{name} is {value}, a setting of fsdp2, but the backbone is {strategy}; leave it out".lower()
    )
    with pytest.raises(ValueError, match=message):
        ParallelRecipe.model_validate({"backbone": strategy, name: value})
    launched("deepspeed" if strategy == "zero3" else "torchrun")
    with pytest.raises(ContradictionError, match=message):
        read_launch(ParallelRecipe.model_validate({name: value}))


@pytest.mark.parametrize(
    "name, variable, value, setting",
    [
        ("accelerate fsdp2", "FSDP_OFFLOAD_PARAMS", "true", {"cpu_offload": True}),
        ("accelerate fsdp2", "FSDP_RESHARD_AFTER_FORWARD", "false", {"reshard_after_forward": False}),
        ("accelerate zero3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", None),
    ],
)
def test_what_accelerate_was_told_is_not_dropped(launched, monkeypatch, name, variable, value, setting):
    """Refused unless the recipe says the same; with the remedy, which is then taken."""
    launched(name)
    monkeypatch.setenv(variable, value)
    setting = setting or {"deepspeed_config": str(ROOT / "ds_configs" / "zero3_offload_cpu.json")}
    key = next(iter(setting))
    with pytest.raises(ContradictionError, match=rf"accelerate launch --.* {value} has no effect.*parallel\.{key}: "):
        read_launch(ParallelRecipe())
    read_launch(ParallelRecipe.model_validate(setting))


def test_a_stage_that_is_none(launched, monkeypatch):
    launched("accelerate zero3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "three")
    with pytest.raises(
        RecipeError, match="ACCELERATE_DEEPSPEED_ZERO_STAGE is 'three'; give accelerate launch --zero"
    ):
        read_launch(ParallelRecipe())


def test_contradictions_among_the_settings(launched, tmp_path, monkeypatch):
    launched("accelerate fsdp2")
    assert read_launch(ParallelRecipe(cpu_offload=True, shard_size="node")).strategy == "fsdp2"
    with pytest.raises(RecipeError, match="deepspeed_config is set"):
        read_launch(ParallelRecipe(deepspeed_config=write(tmp_path, 3)))
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RecipeError, match="--fsdp_version 2"):
        read_launch(ParallelRecipe())

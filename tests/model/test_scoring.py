"""Who holds the backbone when a run is scored: as the run had it, as far as this job allows."""

import json
import os

import pytest
import torch

from metatt_scale.parallel import place_in_world
from metatt_scale.recipe import RecipeError, validate
from metatt_scale.scoring import _here

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAUNCHERS = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "1"},
    "deepspeed": {"CROSS_SIZE": "1"},
    "accelerate fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """Return the launch and the settings with which a run is scored on some ranks of one node."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "CROSS_", "TORCHELASTIC_")) or name.endswith(("RANK", "SIZE")):
            monkeypatch.delenv(name)
    offload = {"stage": 3, "offload_param": {"device": "cpu"}}
    (tmp_path / "offload.json").write_text(json.dumps({"zero_optimization": offload}))

    def score(launcher, ranks, device=CPU, **parallel):
        if "deepspeed_config" in parallel:
            parallel["deepspeed_config"] = str(tmp_path / parallel["deepspeed_config"])
        if launcher is not None:
            place = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", "WORLD_SIZE": str(ranks)}
            for name, value in (place | {"LOCAL_WORLD_SIZE": str(ranks)} | LAUNCHERS[launcher]).items():
                monkeypatch.setenv(name, value)
        data = {"output_dir": "unused", "backbone": {"path": "unused"}, "parallel": parallel}
        recipe = validate(data | {"data": {"train": [{"path": "unused"}]}}, "run")
        launch, recipe = _here(recipe, place_in_world(), device)
        return launch, recipe.parallel

    return score


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_runs_deepspeed_file_is_not_lost(scored, launcher, ranks):
    launch, _ = scored(launcher, ranks, deepspeed_config="offload.json")
    assert launch.strategy == "zero3" and launch.deepspeed["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_a_file_that_is_gone_is_not_passed_over(scored):
    with pytest.raises(RecipeError, match=r"gone\.json: not a DeepSpeed JSON file"):
        scored("deepspeed", 2, deepspeed_config="gone.json")


@pytest.mark.parametrize("ranks, shards", [(2, 2), (3, "world"), (4, 2)])
def test_shards_of_a_run_on_other_ranks(scored, ranks, shards):
    launch, parallel = scored("torchrun", ranks, backbone="fsdp2", shard_size=2, reshard_after_forward=False)
    assert (launch.strategy, parallel.shard_size, parallel.reshard_after_forward) == ("fsdp2", shards, False)


@pytest.mark.parametrize(
    "launcher, parallel, strategy",
    [
        ("deepspeed", {"backbone": "fsdp2", "shard_size": 2}, "zero3"),
        ("accelerate fsdp2", {"deepspeed_config": "offload.json"}, "fsdp2"),
        ("accelerate fsdp2", {"backbone": "replicate"}, "fsdp2"),
        ("torchrun", {"shard_size": 2}, "replicate"),  # trained under `accelerate launch --use_fsdp`
        (None, {"backbone": "fsdp2"}, "replicate"),
        (None, {"deepspeed_config": "offload.json"}, "replicate"),
    ],
)
def test_the_launcher_wins(scored, launcher, parallel, strategy):
    launch, settings = scored(launcher, 2, timeout_minutes=7, **parallel)
    assert launch.strategy == strategy and launch.deepspeed is None
    assert settings.shard_size == "world" and settings.timeout_minutes == 7


@pytest.mark.parametrize("device, offload", [(CPU, False), (GPU, True)])
def test_there_is_nothing_to_offload_from_a_cpu(scored, device, offload):
    assert scored("torchrun", 2, device, backbone="fsdp2", cpu_offload=True)[1].cpu_offload is offload

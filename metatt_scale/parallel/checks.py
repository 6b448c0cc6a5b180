"""What no engine can hold, found from the recipe, the launcher and the device before any long work."""

from __future__ import annotations

import os

import torch

from metatt_scale.backbone.quantised import check_shardable
from metatt_scale.parallel.launcher import Launch, offload_device
from metatt_scale.recipe import ParallelRecipe, Recipe, RecipeError


def check_engine(launch: Launch, recipe: Recipe, *, size: int, local_size: int, device: torch.device) -> None:
    """Refuse a backbone or settings that the job's engine cannot hold on these ranks; every rank finds the same.

    Raises:
        RecipeError: the message says which setting to change.
    """
    if launch.strategy == "replicate":
        return
    if recipe.adapter.kind == "full":
        raise RecipeError(
            f"adapter.kind is full, but the backbone would be sharded by {launch.strategy}, which holds a frozen "
            "one; set parallel.backbone: replicate and start with torchrun, or train an adapter"
        )
    check_shardable(recipe.backbone)
    if launch.strategy == "zero3":
        if recipe.classifier is not None:
            raise RecipeError(
                "there is a `classifier`, whose head is not gathered from zero3 yet; set parallel.backbone: fsdp2 or "
                "replicate, and a launcher for it"
            )
        _check_deepspeed(launch, recipe.backbone.dtype)
        return
    shard_ranks(recipe.parallel, size, local_size)
    if recipe.parallel.cpu_offload and device.type == "cpu":
        raise RecipeError(
            "parallel.cpu_offload is true, but this run computes on the CPU, whose memory the shards are in "
            "anyway; leave it out"
        )


def shard_ranks(recipe: ParallelRecipe, size: int, local_size: int) -> int:
    """Return how many ranks hold one copy of the backbone among them.

    Raises:
        RecipeError: a shard size that does not divide the ranks.
    """
    asked = recipe.shard_size
    ranks = {"world": size, "node": min(size, local_size)}[asked] if isinstance(asked, str) else asked
    if size % ranks:
        raise RecipeError(
            f"parallel.shard_size is {asked} ({ranks} ranks), which does not divide the {size} ranks of the job; "
            "give a divisor, or `world`"
        )
    return ranks


def with_fitting_shards(recipe: ParallelRecipe, size: int, local_size: int) -> ParallelRecipe:
    """Return the settings for other ranks than they were chosen for: shards over all where `shard_size` cannot be."""
    try:
        shard_ranks(recipe, size, local_size)
    except RecipeError:
        return recipe.model_copy(update={"shard_size": "world"})
    return recipe


def _check_deepspeed(launch: Launch, dtype: str) -> None:
    config = launch.deepspeed or {}
    for section, wanted in (("bf16", "bfloat16"), ("fp16", "float16")):
        asked = config.get(section, {}).get("enabled", "auto")
        if asked not in ("auto", dtype == wanted):
            raise RecipeError(
                f"{launch.deepspeed_file}: {section}.enabled is {str(asked).lower()}, but backbone.dtype is {dtype}; "
                'write "auto" there, or change backbone.dtype'
            )
    if offload_device(config) != "nvme":
        return
    path = str(config["zero_optimization"]["offload_param"].get("nvme_path"))
    if not os.path.isdir(path):  # DeepSpeed would make it, on whatever disk that is
        raise RecipeError(
            f"{launch.deepspeed_file}: zero_optimization.offload_param.nvme_path is {path!r}, which is no folder; "
            "name one on a disk that is local to every node"
        )

"""The engine that holds the backbone, chosen once per run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from metatt_scale.parallel.checks import check_engine
from metatt_scale.parallel.launcher import Launch
from metatt_scale.parallel.world import World
from metatt_scale.recipe import Recipe

if TYPE_CHECKING:
    from metatt_scale.parallel.fsdp2 import Fsdp2
    from metatt_scale.parallel.zero3 import Zero3


def make_engine(world: World, launch: Launch, recipe: Recipe) -> Fsdp2 | Zero3 | None:
    """Return what shards the backbone; None where every rank holds all of it.

    Raises:
        ValueError: the engine cannot hold this backbone, or not on these ranks.
    """
    check_engine(launch, recipe, size=world.size, local_size=world.local_size, device=world.device)
    if launch.strategy == "replicate":
        return None
    dtype = getattr(torch, recipe.backbone.dtype)
    if launch.strategy == "fsdp2":
        from metatt_scale.parallel.fsdp2 import Fsdp2

        return Fsdp2(world, recipe.parallel, dtype)
    from metatt_scale.parallel.zero3 import Zero3, zero3_config

    micro = recipe.training.micro_batch_size
    config = zero3_config(
        launch.deepspeed,
        micro_batch_size=micro,
        accumulation=math.ceil(recipe.training.batch_size / (micro * world.size)),
        dtype=dtype,
        world_size=world.size,
    )
    return Zero3(world, config, dtype, launch.deepspeed_file)

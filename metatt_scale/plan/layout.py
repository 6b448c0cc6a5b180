"""How a recipe's work and backbone are laid out over the ranks of a job."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from metatt_scale.backbone.quantised import check_shardable
from metatt_scale.parallel import offload_device, read_launch, shard_ranks
from metatt_scale.plan.memory import Work
from metatt_scale.recipe import ParallelRecipe, Recipe, RecipeError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks, who shares a copy of the backbone, and each one's part of a global batch."""

    ranks: int
    """W."""
    gpus_per_node: int
    strategy: str
    """`replicate`, `fsdp2` or `zero3`."""
    sharers: int
    """Z: ranks that hold one copy of the backbone among them; 1 where each holds its own."""
    micro_batches: int
    """Forward and backward passes of a rank per optimizer step."""
    work: Work
    """Of one of them, on the busiest rank."""
    reshard: bool
    """Gathered layers are given back after their forward."""
    offload: bool
    """The shards live in host memory, or on a disk."""
    live: int
    """Values that ZeRO-3 has gathered when it stops fetching ahead."""
    fetched: int
    """Values that ZeRO-3 fetches ahead at once."""
    small: int
    """Tensors of at most so many values stay gathered under ZeRO-3."""
    most_small: int
    """Values of all tensors that stay gathered, at most."""


_ZERO3 = {
    "live": ("stage3_max_live_parameters", 10**9),
    "fetched": ("stage3_prefetch_bucket_size", 5 * 10**7),
    "small": ("stage3_param_persistence_threshold", 10**5),
    "most_small": ("stage3_model_persistence_threshold", sys.maxsize),
}
"""Field of Layout -> key of `zero_optimization`, and DeepSpeed's default."""


def lay_out(
    recipe: Recipe, ranks: int, gpus_per_node: int, answers: int | None = None, examples: int | None = None
) -> Layout:
    """Return the layout of a recipe over W ranks.

    `parallel.backbone: auto` is what `parallel.deepspeed_config` says; without one it is taken for fsdp2 on more than
    one rank, unless the weights cannot be sharded (`assumption` tells).

    A batch of n examples is dealt in k = ceil(n / (W micro_batch_size)) rounds, each rank ceil(n / (k W)) a round
    (data/batches.py). `answers` are the positions per example that have a target; when None all but the first, of a
    classifier one.
    `examples` replaces the examples of a round.

    Raises:
        ValueError: a shard size that does not divide the ranks, weights that cannot be sharded, or a DeepSpeed file
            that cannot be read or contradicts the recipe.
    """
    parallel, training, tokens = recipe.parallel, recipe.training, recipe.data.cutoff_length
    strategy, zero = _strategy(recipe, ranks)
    if strategy != "replicate":
        check_shardable(recipe.backbone)
    rounds = math.ceil(training.batch_size / (ranks * training.micro_batch_size))
    most = 1 if recipe.classifier else tokens - 1
    return Layout(
        ranks=ranks,
        gpus_per_node=gpus_per_node,
        strategy=strategy,
        sharers=1 if strategy == "replicate" else shard_ranks(parallel, ranks, gpus_per_node),
        micro_batches=rounds,
        work=Work(
            examples=examples or math.ceil(training.batch_size / (rounds * ranks)),
            tokens=tokens,
            answers=most if answers is None else min(answers, most),
            packed=not recipe.classifier and training.packing is not False and recipe.backbone.attention != "eager",
        ),
        reshard=parallel.reshard_after_forward or strategy == "zero3",
        offload=parallel.cpu_offload or offload_device({"zero_optimization": zero}) != "none",
        **{field: _values(zero, name, default) for field, (name, default) in _ZERO3.items()},
    )


def _strategy(recipe: Recipe, ranks: int) -> tuple[str, dict[str, Any]]:
    """Return who holds the backbone, and DeepSpeed's settings of it."""
    parallel = recipe.parallel
    if _is_open(parallel):
        wanted = parallel.foreign_to("replicate") is not None  # settings of fsdp2
        return ("fsdp2" if ranks > 1 and (wanted or _can_be_sharded(recipe)) else "replicate"), {}
    launch = read_launch(parallel)
    return launch.strategy, (launch.deepspeed or {}).get("zero_optimization", {})


def assumption(recipe: Recipe) -> str | None:
    """Return in one line what a plan takes `auto` for where the launcher would decide; None where the recipe does."""
    if not _is_open(recipe.parallel):
        return None
    if _can_be_sharded(recipe):
        return (
            "parallel.backbone auto: planned as fsdp2 from 2 ranks on, which `accelerate launch --use_fsdp "
            "--fsdp_version 2` starts; plain torchrun would replicate"
        )
    return "parallel.backbone auto: planned as replicate, for these quantised weights cannot be sharded"


def _is_open(parallel: ParallelRecipe) -> bool:
    return parallel.backbone == "auto" and parallel.deepspeed_config is None


def _can_be_sharded(recipe: Recipe) -> bool:
    try:
        check_shardable(recipe.backbone)
    except RecipeError:
        return False
    return True


def _values(zero: dict[str, Any], name: str, default: int) -> int:
    value = zero.get(name, "auto")
    if value == "auto":
        return default
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise RecipeError(f'zero_optimization.{name} is {value!r}; it must be a number from 0 on, or "auto"')
    return int(value)

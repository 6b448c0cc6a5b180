"""How a recipe's work and backbone are laid out over the ranks of a job."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from metatt_scale.backbone.quantised import check_shardable
from metatt_scale.parallel import read_launch
from metatt_scale.plan.memory import Work
from metatt_scale.recipe import Recipe


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
    kept: int
    """Values that ZeRO-3 leaves gathered between uses, at most."""
    fetched: int
    """Values that ZeRO-3 fetches ahead."""


_KEPT, _FETCHED = 10**9, 5 * 10**7
"""DeepSpeed's defaults of stage3_max_live_parameters (and stage3_max_reuse_distance), stage3_prefetch_bucket_size."""


def lay_out(
    recipe: Recipe, ranks: int, gpus_per_node: int, answers: int | None = None, examples: int | None = None
) -> Layout:
    """Return the layout of a recipe over W ranks.

    `parallel.backbone: auto` is what `parallel.deepspeed_config` says; without one, fsdp2 for more than one rank.

    A batch of n examples is dealt in k = ceil(n / (W micro_batch_size)) rounds, each rank ceil(n / (k W)) a round
    (data/batches.py). `answers` are the positions per example that have a target; all but the first when None.
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
    most = tokens - 1
    return Layout(
        ranks=ranks,
        gpus_per_node=gpus_per_node,
        strategy=strategy,
        sharers=1 if strategy == "replicate" else _sharers(recipe, ranks, gpus_per_node),
        micro_batches=rounds,
        work=Work(
            examples=examples or math.ceil(training.batch_size / (rounds * ranks)),
            tokens=tokens,
            answers=most if answers is None else min(answers, most),
        ),
        reshard=parallel.reshard_after_forward or strategy == "zero3",
        offload=parallel.cpu_offload or "offload_param" in zero,
        kept=min(_values(zero, name, _KEPT) for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance")),
        fetched=_values(zero, "stage3_prefetch_bucket_size", _FETCHED),
    )


def _strategy(recipe: Recipe, ranks: int) -> tuple[str, dict[str, Any]]:
    """Return who holds the backbone, and DeepSpeed's settings of it."""
    parallel = recipe.parallel
    if parallel.backbone == "auto" and parallel.deepspeed_config is None:
        return ("fsdp2" if ranks > 1 else "replicate"), {}
    launch = read_launch(parallel)
    return launch.strategy, (launch.deepspeed or {}).get("zero_optimization", {})


def _values(zero: dict[str, Any], name: str, default: int) -> int:
    value = zero.get(name)
    return int(value) if isinstance(value, int | float) else default  # absent, or "auto"


def _sharers(recipe: Recipe, ranks: int, gpus_per_node: int) -> int:
    asked = recipe.parallel.shard_size
    size = {"world": ranks, "node": min(ranks, gpus_per_node)}[asked] if isinstance(asked, str) else asked
    if ranks % size:
        raise ValueError(
            f"parallel.shard_size is {asked} ({size} ranks), which does not divide the {ranks} ranks of this plan; "
            "give a divisor, or `world`"
        )
    return size

"""How many values the result of each kind has, by its targets: known before any of them takes memory.

Shape legend: I input width, O output width, R rank.
"""

from __future__ import annotations

import math

from metatt_scale.adapter import TargetMap
from metatt_scale.methods.loretta import core_shapes
from metatt_scale.recipe import Recipe
from metatt_scale.recipe.adapter import initial_rank


def nothing(target_map: TargetMap, recipe: Recipe) -> int:
    """Return 0: the model's own weights train."""
    return 0


def lora(target_map: TargetMap, recipe: Recipe) -> int:
    """R (I + O), and as much for the start that is subtracted."""
    factors = 2 if recipe.adapter.init in ("pissa", "olora") else 1
    return factors * target_map.lora_parameters(initial_rank(recipe.adapter))


def adalora(target_map: TargetMap, recipe: Recipe) -> int:
    """R (I + O + 1)."""
    rank = initial_rank(recipe.adapter)
    return target_map.lora_parameters(rank) + rank * len(target_map.targets)


def vera(target_map: TargetMap, recipe: Recipe) -> int:
    """R + O of every target, and the shared R (widest I + widest O)."""
    rank, targets = initial_rank(recipe.adapter), target_map.targets
    widest = max((t.d_in for t in targets), default=0) + max((t.d_out for t in targets), default=0)
    return sum(rank + target.d_out for target in targets) + rank * widest


def mtl_lora(target_map: TargetMap, recipe: Recipe) -> int:
    """I R + T R^2 + K R O + T K for T tasks and K up-projections."""
    rank, tasks, k = initial_rank(recipe.adapter), len(recipe.tasks) or 1, recipe.adapter.mtl_lora.up_projections
    return sum(t.d_in * rank + tasks * rank**2 + k * rank * t.d_out + tasks * k for t in target_map.targets)


def moe_lora(target_map: TargetMap, recipe: Recipe) -> int:
    """R (I + O) + W (T + 1) + W N for T tasks, N experts and embeddings of width W."""
    settings, tasks = recipe.adapter.moe_lora, len(recipe.tasks) or 1
    gates = len(target_map.targets) * settings.task_width * (tasks + 1 + settings.experts)
    return target_map.lora_parameters(initial_rank(recipe.adapter)) + gates


def loretta_rep(target_map: TargetMap, recipe: Recipe) -> int:
    """Two chains of I R and R O entries."""
    rank = initial_rank(recipe.adapter)
    return sum(_chain(t.d_in, rank, recipe) + _chain(rank, t.d_out, recipe) for t in target_map.targets)


def loretta_adp(target_map: TargetMap, recipe: Recipe) -> int:
    """Two chains of O W entries and biases, for bottlenecks of width W."""
    width = recipe.adapter.loretta.bottleneck
    return sum(
        _chain(t.d_out, width, recipe) + _chain(width, t.d_out, recipe) + width + t.d_out for t in target_map.targets
    )


def _chain(rows: int, columns: int, recipe: Recipe) -> int:
    return sum(math.prod(core) for core in core_shapes(rows, columns, recipe.adapter.loretta.tensor_rank))

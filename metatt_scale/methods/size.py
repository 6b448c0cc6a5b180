"""How many values a method trains, from the widths of its targets alone."""

from __future__ import annotations

from metatt_scale.adapter import TargetMap
from metatt_scale.recipe import AdapterRecipe
from metatt_scale.recipe.adapter import initial_rank


def trained_values(recipe: AdapterRecipe, target_map: TargetMap) -> int:
    """Return the count for a method that is no chain: a sum over targets.

    lora r (d_in + d_out), adalora r (d_in + d_out + 1) with r at the start, vera r + d_out.
    """
    rank = initial_rank(recipe)
    each = {
        "lora": lambda d_in, d_out: rank * (d_in + d_out),
        "adalora": lambda d_in, d_out: rank * (d_in + d_out + 1),
        "vera": lambda d_in, d_out: rank + d_out,
    }[recipe.kind]
    return sum(each(target.d_in, target.d_out) for target in target_map.targets)

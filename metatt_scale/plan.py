"""What a recipe would train, counted on the module tree without weights and without a GPU."""

from __future__ import annotations

from typing import Any

from metatt_scale.adapter import chain_spec, find_targets, head_dim_of
from metatt_scale.backbone import load_skeleton
from metatt_scale.recipe import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return the counts of a recipe (all exact, in values; `trainable_parameters` is what AdamW updates).

    Raises:
        ValueError: no configuration for the backbone, or targets that match nothing.
    """
    model = load_skeleton(recipe.backbone)
    target_map = find_targets(model, recipe.adapter.target_modules, recipe.adapter.layers)
    spec = chain_spec(recipe.adapter, target_map, head_dim_of(model))
    return {
        "trainable_parameters": spec.n_parameters,
        "adapter": recipe.adapter.kind,
        "modes": list(spec.modes),
        "sizes": list(spec.sizes),
        "ranks": list(spec.ranks),
        "adapted_modules": len(target_map.targets),
        "projections": list(target_map.projections),
        "backbone_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "lora_parameters": {str(rank): target_map.lora_parameters(rank) for rank in (8, 16)},
    }

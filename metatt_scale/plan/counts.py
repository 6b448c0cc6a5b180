"""How many values a recipe trains, of any kind of adapter, counted on the module tree without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from metatt_scale.adapter import chain_spec, head_dim_of
from metatt_scale.backbone import in_head
from metatt_scale.methods import find, make_alone
from metatt_scale.recipe import INNER_BONDS, Recipe


def counts(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """Return the exact counts, in values.

    `trainable_parameters` is what AdamW updates of the adapter; a comparison of adapters leaves out the
    `head_parameters` of a classifier, which are `frozen` or `trained` as `head` says.

    Raises:
        ValueError: targets that match nothing.
    """
    targets = find(model, recipe.adapter)
    if recipe.adapter.kind in INNER_BONDS:
        spec = chain_spec(recipe.adapter, targets, head_dim_of(model), len(recipe.tasks))
        trained = spec.n_parameters
        form = {"modes": list(spec.modes), "sizes": list(spec.sizes), "ranks": list(spec.ranks)}
    else:
        adapter = make_alone(targets, recipe, torch.float32)
        adapter.attach(model, torch.device("meta"))
        trained, form = adapter.n_trained, {"summary": adapter.summary()}
    head = [p.numel() for name, p in model.named_parameters() if recipe.classifier and in_head(model, name)]
    return {
        "trainable_parameters": trained,
        "head_parameters": sum(head),
        "head": recipe.classifier.head if recipe.classifier else None,
        "adapter": recipe.adapter.kind,
        **form,
        "adapted_modules": len(targets.targets),
        "projections": list(targets.projections),
        "backbone_parameters": sum(p.numel() for p in model.parameters()) - sum(head),
        "lora_parameters": {str(rank): targets.lora_parameters(rank) for rank in (8, 16)},
    }

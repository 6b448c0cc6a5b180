"""Backbones of tests, loaded by a short recipe."""

from metatt_scale.backbone import load_backbone
from metatt_scale.recipe import BackboneRecipe
from tests.toy import CPU

WEIGHT = "model.layers.1.self_attn.q_proj.weight"


def recipe_of(path, **changes):
    """The recipe of a backbone in float32, or with these changes."""
    return BackboneRecipe(path=str(path), **{"dtype": "float32", **changes})


def load(path, **changes):
    return load_backbone(recipe_of(path, **changes), CPU)

"""What the user asks for: schema, YAML, overrides, errors. Imports no torch."""

from metatt_scale.recipe.load import RecipeError, check, dump_recipe, load_recipe, read_mapping, validate
from metatt_scale.recipe.schema import (
    AdapterRecipe,
    BackboneRecipe,
    DataRecipe,
    DataSource,
    EvaluationRecipe,
    LoggingRecipe,
    ParallelRecipe,
    Recipe,
    TrainingRecipe,
)
from metatt_scale.recipe.sweep import SweepRecipe

__all__ = [
    "AdapterRecipe",
    "BackboneRecipe",
    "DataRecipe",
    "DataSource",
    "EvaluationRecipe",
    "LoggingRecipe",
    "ParallelRecipe",
    "Recipe",
    "RecipeError",
    "SweepRecipe",
    "TrainingRecipe",
    "check",
    "dump_recipe",
    "load_recipe",
    "read_mapping",
    "validate",
]

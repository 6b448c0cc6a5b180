"""What the user asks for: schema, YAML, overrides, errors. Imports no torch."""

from metatt_scale.recipe.load import RecipeError, dump_recipe, load_recipe, validate
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
    "dump_recipe",
    "load_recipe",
    "validate",
]

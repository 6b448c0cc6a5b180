"""What the user asks for: schema, YAML, overrides, errors. Imports no torch."""

from metatt_scale.recipe.load import RecipeError, check, dump_recipe, load_recipe, read_mapping, validate
from metatt_scale.recipe.records import ClassifierRecipe, DataRecipe, DataSource
from metatt_scale.recipe.schema import (
    AdapterRecipe,
    BackboneRecipe,
    EvaluationRecipe,
    LoggingRecipe,
    ParallelRecipe,
    Recipe,
    TrainingRecipe,
    only_chains,
    only_language_models,
)
from metatt_scale.recipe.sweep import SweepRecipe

__all__ = [
    "AdapterRecipe",
    "BackboneRecipe",
    "ClassifierRecipe",
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
    "only_chains",
    "only_language_models",
    "read_mapping",
    "validate",
]

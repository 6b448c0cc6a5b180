"""What the user asks for: schema, YAML, overrides, errors. Imports no torch."""

from metatt_scale.recipe.adapter import INNER_BONDS
from metatt_scale.recipe.load import RecipeError, check, dump_recipe, load_recipe, read_mapping, validate
from metatt_scale.recipe.records import ClassifierRecipe, DataRecipe, DataSource, Labels, TaskRecipe
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
from metatt_scale.recipe.scores import STEP_NUMBERS, label_rows, task_headline
from metatt_scale.recipe.sweep import SweepRecipe

__all__ = [
    "INNER_BONDS",
    "STEP_NUMBERS",
    "AdapterRecipe",
    "BackboneRecipe",
    "ClassifierRecipe",
    "DataRecipe",
    "DataSource",
    "EvaluationRecipe",
    "Labels",
    "LoggingRecipe",
    "ParallelRecipe",
    "Recipe",
    "RecipeError",
    "SweepRecipe",
    "TaskRecipe",
    "TrainingRecipe",
    "check",
    "dump_recipe",
    "label_rows",
    "load_recipe",
    "only_chains",
    "only_language_models",
    "read_mapping",
    "task_headline",
    "validate",
]

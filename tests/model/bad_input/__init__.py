"""Malformed input, by what is malformed: each module adds its cases to CASES."""

from tests.model.bad_input import backbones, recipes, records, runs
from tests.model.bad_input.cases import CASES

__all__ = ["CASES", "backbones", "recipes", "records", "runs"]

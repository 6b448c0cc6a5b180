"""Scores of a loaded model: lm-evaluation-harness tasks and LLM-Adapters' generated answers."""

from metatt_scale.evaluation.harness import evaluate
from metatt_scale.evaluation.scores import TaskScore, paired_difference, read_scores
from metatt_scale.evaluation.table import score_table

__all__ = [
    "TaskScore",
    "evaluate",
    "paired_difference",
    "read_scores",
    "score_table",
]

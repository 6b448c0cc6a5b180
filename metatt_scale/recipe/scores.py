"""The numbers that evaluations of a run write into metrics.jsonl, by key: all follow from its recipe."""

from __future__ import annotations

from collections.abc import Mapping

from metatt_scale.recipe.records import Labels

STEP_NUMBERS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "seconds",
    "memory_gib",
    "skipped",
)
"""Numbers of every line of metrics.jsonl, evaluation or not."""

LabelSets = Mapping[str, Labels]
"""The labels of every task of a classifier, by name (empty of the only one); none of a language model."""


def is_loss(key: str) -> bool:
    """Return whether less of a number is better."""
    return key.endswith("loss")


def task_headline(label_sets: LabelSets, task: str) -> str:
    """Return the key of the number that stands for all of one task's (of the only one, whose name is empty)."""
    return _key(task, label_sets[task].headline if label_sets else "loss")


def headline(label_sets: LabelSets) -> str:
    """Return the key of the number that stands for all: of a classifier with `tasks` the mean of theirs."""
    return task_headline(label_sets, "") if not label_sets or "" in label_sets else "eval_mean"


def evaluation_keys(label_sets: LabelSets, tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys of all numbers of an evaluation."""
    together = ("eval_loss", *(("eval_mean",) if tasks and label_sets else ()))
    own = (_key(task, score) for task in tasks or ("",) for score in ("loss", *_scores(label_sets, task)))
    return tuple(dict.fromkeys((*together, *own)))


def label_rows(label_sets: LabelSets) -> dict[str, slice]:
    """Return which outputs of the head are each task's: they stand side by side, in the order of the tasks."""
    rows, start = {}, 0
    for task, labels in label_sets.items():
        rows[task] = slice(start, start := start + (labels.labels or 0))
    return rows


def _scores(label_sets: LabelSets, task: str) -> tuple[str, ...]:
    return label_sets[task].scores if label_sets else ()


def _key(task: str, score: str) -> str:
    return f"eval_{task}_{score}" if task else f"eval_{score}"

"""What evaluations gave: which scores there are, and whether more is better."""

from __future__ import annotations

from collections.abc import Sequence

from metatt_scale.recipe.scores import is_loss
from metatt_scale.report.groups import Group

PREFIX = "eval_"
_LABELS = {
    "loss": "training loss",
    "eval_loss": "evaluation loss",
    "eval_accuracy": "accuracy",
    "eval_f1": "F1",
    "eval_matthews": "Matthews correlation",
    "eval_pearson": "Pearson correlation",
    "eval_spearman": "Spearman rank correlation",
}


def score_keys(groups: Sequence[Group]) -> list[str]:
    """Return the keys of all numbers that evaluations of any run have written, in the order of writing."""
    lines = (line for group in groups for run in group.runs for line in run.lines)
    found = dict.fromkeys(key for line in lines for key in line if key.startswith(PREFIX))
    return [key for key in found if any(group.curve(key) for group in groups)]


def label(key: str) -> str:
    """Return the name of a number on an axis, with its unit."""
    return _LABELS.get(key, key.removeprefix(PREFIX).replace("_", " "))


def readable(text: str) -> str:
    """Return text that any file can hold: names of folders and labels may have bytes that are no character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def main_score(group: Group) -> str:
    """Return what tells best how good a group is: its headline, else another score, else a loss."""
    keys = score_keys([group])
    wanted = [group.runs[0].recipe.headline, *(key for key in keys if not is_loss(key)), *keys]
    return next((key for key in wanted if key in keys), "loss")

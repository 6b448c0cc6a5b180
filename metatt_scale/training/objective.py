"""What a run minimises and is judged by: the loop sends batches, the objective knows what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from metatt_scale.adapter import Adapter
from metatt_scale.data import Batch, TokenTable, ValidationData, target_count
from metatt_scale.parallel import World
from metatt_scale.recipe import Recipe
from metatt_scale.training.classifier import Classifier, by_task
from metatt_scale.training.loss import task_weights, token_loss_sum
from metatt_scale.training.start import make_ready


class Objective(Protocol):
    """A loss that is a sum over what is counted, divided by the count of the global batch."""

    @property
    def packed(self) -> bool:
        """Whether the examples of a micro-batch stand in one row."""
        ...

    def denominator(self, table: TokenTable, indices: Any) -> int:
        """Return how many things these examples give a loss for, over all ranks."""
        ...

    def weights(self, table: TokenTable, indices: Any) -> Tensor | None:
        """Return what the losses of each task count in a global batch, (T,); None where there is one task."""
        ...

    def loss_sum(self, batch: Batch, weights_T: Tensor | None = None) -> Tensor:
        """Return the weighted loss summed over a micro-batch (scalar of at least fp32, nats)."""
        ...

    def evaluate(self, batches: Iterable[Batch], denominator: int, task: int = 0) -> dict[str, float]:
        """Return `eval_loss`, the mean over all ranks' batches, and other scores; the model is in evaluation mode.

        Where there are several tasks the batches are all of the one given.
        """
        ...

    def together(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the scores of all tasks by name as those of the run."""
        ...


def make_objective(recipe: Recipe, model: PreTrainedModel, world: World, console: Console) -> Objective:
    """Return what the recipe asks for, with the model made ready for it. All ranks call this together.

    Raises:
        ValueError: `training.packing` is true and the model cannot take packed examples.
    """
    if recipe.classifier is not None:
        return Classifier(model, world, recipe.label_sets)
    packed = make_ready(model, recipe.training.packing, world.device, console)
    return NextTokens(model, world, packed, n_tasks=len(recipe.tasks))


def evaluate_tasks(
    objective: Objective,
    adapter: Adapter,
    tasks: Sequence[str],
    validation: ValidationData,
    batches: Callable[[TokenTable, Any], Iterable[Batch]],
) -> dict[str, float]:
    """Return the scores over the validation records: of all at once, or task by task and then together.

    Args:
        objective: what is judged.
        adapter: told which task comes.
        tasks: their names; none where there is but one.
        validation: the records.
        batches: gives this rank's micro-batches of some of them.
    """
    table, indices = validation
    if not tasks:
        return objective.evaluate(batches(table, indices), objective.denominator(table, indices))
    assert table.tasks is not None
    scores = {}
    for task, name in enumerate(tasks):
        own = indices[table.tasks[indices] == task]
        with adapter.choosing(task):
            scores[name] = objective.evaluate(batches(table, own), objective.denominator(table, own), task)
    return objective.together(scores)


@dataclass(frozen=True)
class NextTokens:
    """A language model's: the cross entropy of every target token."""

    model: PreTrainedModel
    world: World
    packed: bool
    n_tasks: int = 0

    def denominator(self, table: TokenTable, indices: Any) -> int:
        """Return the number of target tokens."""
        return target_count(table, indices)

    def weights(self, table: TokenTable, indices: Any) -> Tensor | None:
        """Return the weights by target tokens, (T,); None where there are no tasks."""
        if not self.n_tasks:
            return None
        assert table.tasks is not None
        counts_T = np.bincount(table.tasks[indices], weights=table.targets[indices], minlength=self.n_tasks)
        return task_weights(counts_T, self.world.device)

    def loss_sum(self, batch: Batch, weights_T: Tensor | None = None) -> Tensor:
        """Return the loss summed over the target tokens."""
        return token_loss_sum(self.model, batch, self.world.device, weights_T)

    def together(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the joint loss, and that of every task."""
        return {"eval_loss": sum(of_task["eval_loss"] for of_task in scores.values()), **by_task(scores)}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], denominator: int, task: int = 0) -> dict[str, float]:
        """Return `eval_loss`, the mean per target token."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in batches:
            total += self.loss_sum(batch)
        return {"eval_loss": float(self.world.sum(total)) / denominator}

"""What a run minimises and is judged by: the loop sends batches, the objective knows what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from metatt_scale.data import Batch, TokenTable, target_count
from metatt_scale.parallel import World
from metatt_scale.recipe import Recipe
from metatt_scale.training.classifier import Classes, Numbers
from metatt_scale.training.loss import token_loss_sum
from metatt_scale.training.start import make_ready


class Objective(Protocol):
    """A loss that is a sum over what is counted, divided by the count of the global batch."""

    @property
    def packed(self) -> bool:
        """Whether the examples of a micro-batch stand in one row."""
        ...

    @property
    def headline(self) -> str:
        """The score that stands for all of `evaluate`'s, more of it being better; `eval_loss` where that is all."""
        ...

    def denominator(self, table: TokenTable, indices: Any) -> int:
        """Return how many things these examples give a loss for, over all ranks."""
        ...

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the loss summed over a micro-batch (scalar of at least fp32, nats)."""
        ...

    def evaluate(self, batches: Iterable[Batch], denominator: int) -> dict[str, float]:
        """Return `eval_loss`, the mean over all ranks' batches, and other scores; the model is in evaluation mode."""
        ...


def make_objective(recipe: Recipe, model: PreTrainedModel, world: World, console: Console) -> Objective:
    """Return what the recipe asks for, with the model made ready for it. All ranks call this together.

    Raises:
        ValueError: `training.packing` is true and the model cannot take packed examples.
    """
    if recipe.classifier is not None:
        headline = f"eval_{recipe.classifier.headline}"
        if recipe.classifier.is_regression:
            return Numbers(model, world, headline)
        return Classes(model, world, recipe.classifier.labels, headline)
    packed = make_ready(model, recipe.training.packing, world.device, console)
    return NextTokens(model, world, packed)


@dataclass(frozen=True)
class NextTokens:
    """A language model's: the cross entropy of every target token."""

    model: PreTrainedModel
    world: World
    packed: bool
    headline: str = field(default="eval_loss", init=False)

    def denominator(self, table: TokenTable, indices: Any) -> int:
        """Return the number of target tokens."""
        return target_count(table, indices)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the loss summed over the target tokens."""
        return token_loss_sum(self.model, batch, self.world.device)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], denominator: int) -> dict[str, float]:
        """Return `eval_loss`, the mean per target token."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in batches:
            total += self.loss_sum(batch)
        return {"eval_loss": float(self.world.sum(total)) / denominator}

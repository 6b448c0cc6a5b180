"""What a run minimises and is judged by: the loop sends batches, the objective knows what they mean.

Shape legend: B examples of a micro-batch, S tokens of the longest, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from metatt_scale.data import IGNORE, Batch, TokenTable, target_count
from metatt_scale.device import to_device
from metatt_scale.parallel import World
from metatt_scale.recipe import Recipe
from metatt_scale.training.loss import token_loss_sum
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
        return Classes(model, world, recipe.classifier.labels)
    packed = make_ready(model, recipe.training.packing, world.device, console)
    return NextTokens(model, world, packed)


@dataclass(frozen=True)
class NextTokens:
    """A language model's: the cross entropy of every target token."""

    model: PreTrainedModel
    world: World
    packed: bool

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


@dataclass(frozen=True)
class Classes:
    """A classifier's: the cross entropy of every example's class."""

    model: PreTrainedModel
    world: World
    n_classes: int
    packed: bool = field(default=False, init=False)
    """Encoders attend both ways, which packed rows are not made for (backbone/attention.py): always padded."""

    def denominator(self, table: TokenTable, indices: Any) -> int:
        """Return the number of examples."""
        return len(indices)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the loss summed over the examples; a filler adds nothing."""
        return self._loss_sum(self._logits(batch), batch)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], denominator: int) -> dict[str, float]:
        """Return `eval_loss`, the mean per example, `eval_accuracy` and `eval_f1` (see `class_scores`)."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        counts_KK = torch.zeros(self.n_classes, self.n_classes, dtype=torch.float64, device=self.world.device)
        for batch in batches:
            logits_BK = self._logits(batch)
            total += self._loss_sum(logits_BK, batch)
            classes_B = to_device(_classes(batch), self.world.device)
            known_B = classes_B != IGNORE
            pairs = (classes_B[known_B], logits_BK.argmax(1)[known_B])
            counts_KK.index_put_(pairs, counts_KK.new_ones(()), accumulate=True)
        self.world.sum(total)
        self.world.sum(counts_KK)
        return {"eval_loss": float(total) / denominator, **class_scores(counts_KK.cpu().numpy())}

    def _logits(self, batch: Batch) -> Tensor:
        """Return (B, K) in the model's type."""
        device, arguments = self.world.device, {}
        if not bool(batch.attention_mask_BS.all()):  # on the host; without a mask the fast kernels apply
            arguments["attention_mask"] = to_device(batch.attention_mask_BS, device)
        if getattr(self.model.config, "type_vocab_size", 1) > 1:  # RoBERTa does not tell sentences apart
            assert batch.segments_BS is not None
            arguments["token_type_ids"] = to_device(batch.segments_BS, device)
        return self.model(input_ids=to_device(batch.input_ids_BS, device), **arguments).logits

    def _loss_sum(self, logits_BK: Tensor, batch: Batch) -> Tensor:
        wide_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
        return F.cross_entropy(
            wide_BK, to_device(_classes(batch), self.world.device), reduction="sum", ignore_index=IGNORE
        )


def _classes(batch: Batch) -> Tensor:
    assert batch.classes_B is not None
    return batch.classes_B


def class_scores(counts_KK: np.ndarray) -> dict[str, float]:
    """Return accuracy and F1 of predictions: of class 1 where there are two (as GLUE's MRPC), else the classes' mean.

    Args:
        counts_KK: examples of class [row] that were taken for class [column].
    """
    from sklearn.metrics import accuracy_score, f1_score  # slow to import, and only classifiers need it

    truth_KK, taken_KK = np.indices(counts_KK.shape)
    truth, taken, weights = truth_KK.ravel(), taken_KK.ravel(), counts_KK.ravel()
    average = "binary" if len(counts_KK) == 2 else "macro"
    return {
        "eval_accuracy": float(accuracy_score(truth, taken, sample_weight=weights)),
        "eval_f1": float(f1_score(truth, taken, average=average, sample_weight=weights, zero_division=cast(Any, 0))),
    }

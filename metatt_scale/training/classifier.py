"""What a classifier minimises and is judged by: the class of every example, or its number.

Shape legend: B examples of a micro-batch, S tokens of the longest, K classes, N examples of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from metatt_scale.data import IGNORE, Batch, TokenTable
from metatt_scale.device import to_device
from metatt_scale.parallel import World
from metatt_scale.training.class_scores import class_scores, number_scores


def class_loss(logits_BK: Tensor, classes_B: Tensor) -> Tensor:
    """Return the cross entropy summed over the examples (nats); one whose class is `IGNORE` adds nothing."""
    return F.cross_entropy(_wide(logits_BK), classes_B, reduction="sum", ignore_index=IGNORE)


def number_loss(predicted_B: Tensor, values_B: Tensor) -> Tensor:
    """Return the squared error summed over the examples; one whose number is NaN adds nothing."""
    wide_B = _wide(predicted_B)
    errors_B = wide_B - values_B.to(wide_B.dtype)
    return torch.where(values_B.isnan(), 0.0, errors_B).square().sum()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def logits_of(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """Return the head's (B, K) outputs for padded examples, in the model's type."""
    arguments = {}
    if not bool(batch.attention_mask_BS.all()):  # on the host; without a mask the fast kernels apply
        arguments["attention_mask"] = to_device(batch.attention_mask_BS, device)
    if getattr(model.config, "type_vocab_size", 1) > 1:  # RoBERTa does not tell sentences apart
        assert batch.segments_BS is not None
        arguments["token_type_ids"] = to_device(batch.segments_BS, device)
    return model(input_ids=to_device(batch.input_ids_BS, device), **arguments).logits


@dataclass(frozen=True)
class Classes:
    """The cross entropy of every example's class."""

    model: PreTrainedModel
    world: World
    n_classes: int
    headline: str
    packed: bool = field(default=False, init=False)
    """Encoders attend both ways, which packed rows are not made for (backbone/attention.py): always padded."""

    def denominator(self, table: TokenTable, indices: Any) -> int:
        """Return the number of examples."""
        return len(indices)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the loss summed over the examples; a filler adds nothing."""
        device = self.world.device
        return class_loss(logits_of(self.model, batch, device), to_device(_there(batch.classes_B), device))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], denominator: int) -> dict[str, float]:
        """Return `eval_loss`, the mean per example, and the scores of `class_scores`."""
        device = self.world.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        counts_KK = torch.zeros(self.n_classes, self.n_classes, dtype=torch.float64, device=device)
        for batch in batches:
            logits_BK, classes_B = logits_of(self.model, batch, device), to_device(_there(batch.classes_B), device)
            total += class_loss(logits_BK, classes_B)
            known_B = classes_B != IGNORE
            pairs = (classes_B[known_B], logits_BK.argmax(1)[known_B])
            counts_KK.index_put_(pairs, counts_KK.new_ones(()), accumulate=True)
        self.world.sum(total)
        self.world.sum(counts_KK)
        return {"eval_loss": float(total) / denominator, **class_scores(counts_KK.cpu().numpy())}


@dataclass(frozen=True)
class Numbers:
    """The squared error of every example's number (regression)."""

    model: PreTrainedModel
    world: World
    headline: str
    packed: bool = field(default=False, init=False)
    """As of `Classes`."""

    def denominator(self, table: TokenTable, indices: Any) -> int:
        """Return the number of examples."""
        return len(indices)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the loss summed over the examples; a filler adds nothing."""
        device = self.world.device
        predicted_B = logits_of(self.model, batch, device).squeeze(1)
        return number_loss(predicted_B, to_device(_there(batch.values_B), device))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], denominator: int) -> dict[str, float]:
        """Return `eval_loss`, the mean squared error, and the scores of `number_scores`."""
        device = self.world.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        pairs = [torch.zeros(0, 2, dtype=torch.float64, device=device)]
        for batch in batches:
            predicted_B = logits_of(self.model, batch, device).squeeze(1)
            values_B = to_device(_there(batch.values_B), device)
            total += number_loss(predicted_B, values_B)
            pairs.append(torch.stack([predicted_B.double(), values_B.double()], 1)[~values_B.isnan()])
        self.world.sum(total)
        pairs_N2 = self.world.concatenate(torch.cat(pairs)).cpu().numpy()
        return {"eval_loss": float(total) / denominator, **number_scores(pairs_N2[:, 0], pairs_N2[:, 1])}


def _there(labels_B: Tensor | None) -> Tensor:
    assert labels_B is not None, "the records are those of another objective"
    return labels_B

"""What a classifier minimises and is judged by: the class of every example, or its number, of one task or several.

The head's last linear has columns for every task, side by side; an example's loss sees those of its own task.

Shape legend: B examples of a micro-batch, S tokens of the longest, K columns of the head, T tasks, C classes of a
task, N examples of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from metatt_scale.backbone import HeadStart
from metatt_scale.backbone.attention import padding_mask
from metatt_scale.data import IGNORE, Batch, PreparedData, TokenTable
from metatt_scale.device import to_device
from metatt_scale.parallel import World
from metatt_scale.recipe import Labels, Recipe, label_rows
from metatt_scale.training.class_scores import class_scores, number_scores
from metatt_scale.training.loss import task_weights


def class_loss(logits_BK: Tensor, classes_B: Tensor) -> Tensor:
    """Return the cross entropy of every example (nats), (B,); 0 where the class is `IGNORE`."""
    return F.cross_entropy(_wide(logits_BK), classes_B, reduction="none", ignore_index=IGNORE)


def number_loss(predicted_B: Tensor, values_B: Tensor) -> Tensor:
    """Return the squared error of every example, (B,); 0 where the number is NaN."""
    wide_B = _wide(predicted_B)
    errors_B = wide_B - values_B.to(wide_B.dtype)
    return torch.where(values_B.isnan(), 0.0, errors_B).square()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def head_start(recipe: Recipe, data: PreparedData) -> HeadStart | None:
    """Return what a classifier's new head starts with; its bias, where that is of the labels, as `label_means`."""
    if recipe.classifier is None:
        return None
    bias_K = label_means(data, recipe.label_sets) if recipe.classifier.init_bias == "labels" else None
    return HeadStart(std=recipe.classifier.init_std, bias_K=bias_K)


def label_means(data: PreparedData, label_sets: Mapping[str, Labels]) -> Tensor:
    """Return the (K,) outputs that are right on average of what an epoch trains on, tasks side by side.

    Of numbers their mean; of C classes log((n_c + 1) / (N + C)) less its own mean over the classes, which is 0 where
    all are as frequent, and finite for one that training never meets. Sources count by their weights, N being the
    number of a task's records whatever those are: a cap on what is drawn of them leaves the shares as they are.
    """
    table, places = data.table, np.concatenate(data.train.members)
    weights_N = np.repeat(data.train.weights, [len(it) for it in data.train.members])
    outputs = []
    for task, labels in enumerate(label_sets.values()):
        of_task_N = np.ones(len(places), bool) if table.tasks is None else table.tasks[places] == task
        own, weights = places[of_task_N], weights_N[of_task_N] / weights_N[of_task_N].mean()
        if labels.is_regression:
            assert table.values is not None
            outputs.append([np.average(table.values[own], weights=weights)])
            continue
        assert table.classes is not None
        counts_C = np.bincount(table.classes[own], weights, minlength=labels.labels or 0)
        logs_C = np.log(counts_C + 1)
        outputs.append(logs_C - logs_C.mean())
    return torch.from_numpy(np.concatenate(outputs))


def logits_of(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """Return the head's (B, K) outputs for padded examples, in the model's type."""
    arguments = {}
    if not bool(batch.attention_mask_BS.all()):  # on the host; without a mask the fast kernels apply
        arguments["attention_mask"] = padding_mask(model, batch.attention_mask_BS, device)
    if getattr(model.config, "type_vocab_size", 1) > 1:  # RoBERTa does not tell sentences apart
        assert batch.segments_BS is not None
        arguments["token_type_ids"] = to_device(batch.segments_BS, device)
    return model(input_ids=to_device(batch.input_ids_BS, device), **arguments).logits


@dataclass(frozen=True)
class Classifier:
    """The sum over tasks of the mean loss of their examples: cross entropy of classes, squared error of numbers."""

    model: PreTrainedModel
    world: World
    labels: Mapping[str, Labels]
    """Of every task; of one without a name where there are no tasks."""
    packed: bool = field(default=False, init=False)
    """Encoders attend both ways, which packed rows are not made for (backbone/attention.py): always padded."""

    def denominator(self, table: TokenTable, indices: Any) -> int:
        """Return the number of examples."""
        return len(indices)

    def weights(self, table: TokenTable, indices: Any) -> Tensor | None:
        """Return the weights by examples, (T,); None of one task."""
        if len(self.labels) == 1:
            return None
        assert table.tasks is not None
        return task_weights(np.bincount(table.tasks[indices], minlength=len(self.labels)), self.world.device)

    def loss_sum(self, batch: Batch, weights_T: Tensor | None = None) -> Tensor:
        """Return the loss summed over the examples, each times its task's weight; a filler adds nothing."""
        device, single = self.world.device, len(self.labels) == 1
        logits_BK, loss_B = logits_of(self.model, batch, device), None
        tasks_B = None if single or batch.tasks_BS is None else to_device(batch.tasks_BS[:, 0], device)
        if batch.classes_B is not None:
            classes_B = to_device(batch.classes_B, device)
            if tasks_B is not None:
                own_TK, first_T = (to_device(table, device) for table in self._columns)
                logits_of_own_BK = _wide(logits_BK).masked_fill(~own_TK[tasks_B], -torch.inf)
                known_B = classes_B != IGNORE
                classes_B = torch.where(known_B, classes_B + first_T[tasks_B], classes_B)
                loss_B = class_loss(logits_of_own_BK, classes_B)
            else:
                loss_B = class_loss(logits_BK, classes_B)
        if batch.values_B is not None:
            first_B1 = self._columns[1][batch.tasks_BS] if batch.tasks_BS is not None else torch.zeros(1, 1).long()
            column_B1 = to_device(first_B1.expand(len(logits_BK), 1), device)
            of_numbers_B = number_loss(logits_BK.gather(1, column_B1)[:, 0], to_device(batch.values_B, device))
            loss_B = of_numbers_B if loss_B is None else loss_B + of_numbers_B
        assert loss_B is not None, "the records are those of another objective"
        if weights_T is not None and tasks_B is not None:
            loss_B = loss_B * weights_T[tasks_B]
        return loss_B.sum()

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor]:
        """Which columns are a task's (T, K), and its first one (T,)."""
        rows = label_rows(self.labels).values()
        first_T, behind_T = torch.tensor([[own.start, own.stop] for own in rows]).T
        columns_K = torch.arange(int(behind_T[-1]))
        return (first_T[:, None] <= columns_K) & (columns_K < behind_T[:, None]), first_T

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], denominator: int, task: int = 0) -> dict[str, float]:
        """Return `eval_loss`, the mean per example, and the scores of one task whose examples alone come."""
        device, labels = self.world.device, list(self.labels.values())[task]
        first = int(self._columns[1][task])
        total = torch.zeros((), dtype=torch.float64, device=device)
        width = labels.labels or 0
        counts_CC = torch.zeros(width, width, dtype=torch.float64, device=device)
        pairs = [torch.zeros(0, 2, dtype=torch.float64, device=device)]
        for batch in batches:
            logits_BC = logits_of(self.model, batch, device)[:, first : first + width]
            if labels.is_regression:
                values_B = to_device(_there(batch.values_B), device)
                total += number_loss(logits_BC[:, 0], values_B).sum()
                pairs.append(torch.stack([logits_BC[:, 0].double(), values_B.double()], 1)[~values_B.isnan()])
                continue
            classes_B = to_device(_there(batch.classes_B), device)
            total += class_loss(logits_BC, classes_B).sum()
            known_B = classes_B != IGNORE
            places = (classes_B[known_B], logits_BC.argmax(1)[known_B])
            counts_CC.index_put_(places, counts_CC.new_ones(()), accumulate=True)
        loss = float(self.world.sum(total)) / denominator
        if labels.is_regression:
            pairs_N2 = self.world.concatenate(torch.cat(pairs)).cpu().numpy()
            return {"eval_loss": loss, **number_scores(pairs_N2[:, 0], pairs_N2[:, 1])}
        return {"eval_loss": loss, **class_scores(self.world.sum(counts_CC).cpu().numpy())}

    def together(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the joint loss, the mean headline, and the scores of all tasks as `eval_TASK_SCORE`."""
        headlines = [scores[name][f"eval_{labels.headline}"] for name, labels in self.labels.items()]
        return {
            "eval_loss": sum(of_task["eval_loss"] for of_task in scores.values()),
            "eval_mean": sum(headlines) / len(headlines),
            **by_task(scores),
        }


def by_task(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return all scores of all tasks as `eval_TASK_SCORE`."""
    return {
        f"eval_{task}_{name.removeprefix('eval_')}": score
        for task, of_task in scores.items()
        for name, score in of_task.items()
    }


def _there(labels_B: Tensor | None) -> Tensor:
    assert labels_B is not None, "the records are those of another objective"
    return labels_B

"""What trains beside a frozen model, whatever its form.

Trained values are few, of full precision, equal on all ranks and outside any engine (docs/decisions.md). The loop
knows them by name and asks for nothing else: it lets backward passes leave gradients, sums those over the ranks, and
steps.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.adapter.leaves import Leaves
from metatt_scale.adapter.placed import Placed
from metatt_scale.adapter.targets import Target, TargetMap

NO_TASK = "this adapter was trained on several tasks, and each has weights of its own; choose one by name with --task"
HEAD_PREFIX = "head."
"""Before the names of a trained head's parameters."""


class LoraPair(NamedTuple):
    """LoRA factors of one module; the delta of the weight is alpha * lora_B @ lora_A."""

    path: str
    lora_A: Tensor
    """(r x input)"""
    lora_B: Tensor
    """(output x r)"""


def _product_is_not_zero(pair: LoraPair) -> bool:
    """Return whether B A has an entry that is not zero: |B A|^2 = <B^T B, A A^T>, without the product."""
    a_RI, b_OR = pair.lora_A.double(), pair.lora_B.double()
    return bool((b_OR.mT @ b_OR * (a_RI @ a_RI.mT)).sum() != 0)


class Adapter(nn.Module, ABC):
    """The owner of all trained parameters of a run."""

    alpha = 1.0
    """Scale of what the adapter adds."""
    n_tasks = 1
    """Tasks that the adapter tells apart."""

    def __init__(self, target_map: TargetMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.target_map = target_map
        self.compute_dtype = dtype
        self.enabled = True
        self.linears: tuple[Placed, ...] = ()
        """The modules in the places of the targets, once attached."""
        self.head: Leaves | None = None
        """Parameters of the model's head by their names there, where that is trained (`train_head`)."""
        self.rows_per_step: int | None = None
        """Rows that go through a module per optimizer step, on all ranks: may decide the order of products."""

        self.row_tasks: Tensor | None = None
        """Task of every row of the micro-batch at work, int64: (B, 1) where examples are padded, (1, S) where
        they are packed. It stays until the next one comes, because checkpointing recomputes in the backward pass."""
        self.task: int | None = None
        """The task that all rows are of, where one is chosen (evaluation, export); `row_tasks` decides when None."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """The adapted modules."""
        return self.target_map.targets

    @abstractmethod
    def attach(self, model: PreTrainedModel, device: torch.device) -> None:
        """Freeze the model and take effect in it.

        Args:
            model: loaded, whole or sharded.
            device: where it computes, and parameters of the adapter's own go. An engine that offloads keeps the
                model's elsewhere.

        Raises:
            ValueError: it has an adapter already.
        """

    @abstractmethod
    def own(self) -> dict[str, nn.Parameter]:
        """Return the parameters of this kind of adapter by name, in an order that is the same on every rank."""

    def trained(self) -> dict[str, nn.Parameter]:
        """Return all parameters by name: the adapter's own, then those of a trained head."""
        return self.own() | (self.head.named(HEAD_PREFIX) if self.head is not None else {})

    @property
    def n_trained(self) -> int:
        """Number of trained values, with those of a trained head."""
        return sum(parameter.numel() for parameter in self.trained().values())

    @property
    def n_head(self) -> int:
        """Number of trained values of the head."""
        return sum(parameter.numel() for parameter in self.head.parameters()) if self.head is not None else 0

    def kept(self) -> dict[str, Tensor]:
        """Return tensors that are not trained by gradients, but without which the trained ones mean nothing."""
        return {}

    def history(self) -> dict[str, Tensor]:
        """Return what steps leave behind for later steps, besides the optimizer's moments: for checkpoints only."""
        return {}

    def result(self) -> dict[str, Tensor]:
        """Return all that the adapter's file must hold: the trained parameters and what is kept, detached."""
        return {name: value.detach() for name, value in (self.trained() | self.kept()).items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a checkpoint must hold: the result and the history, detached."""
        return self.result() | {name: value.detach() for name, value in self.history().items()}

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Replace all trained parameters, and what `kept` and `history` name where it is given."""
        with torch.no_grad():
            for name, place in self.tensors().items():
                if name in values:
                    place.copy_(values[name])

    def describe(self) -> dict[str, Any]:
        """Return what makes the adapter again, beside the recipe and its tensors, as JSON can hold it."""
        return {"alpha": self.alpha}

    @abstractmethod
    def summary(self) -> str:
        """Return the form of the adapter in a few words."""

    def lora_pairs(self) -> list[LoraPair]:
        """Return the exact LoRA factors of every target, alpha left out; of `task` where tasks differ.

        Raises:
            ValueError: there are none, or no task is chosen.
        """
        raise ValueError(
            f"there is no LoRA form of this adapter ({self.summary()}): it adds no product of two thin matrices to "
            f"a weight; export it as `{'metatt' if self.targets else 'merged'}`"
        )

    def deltas(self) -> Iterator[Tensor]:
        """Yield what is added to every target's weight, input x output, in the precision of the parameters.

        Raises:
            ValueError: it is no change of weights, or no task is chosen.
        """
        for pair in self.lora_pairs():
            yield self.alpha * (pair.lora_B @ pair.lora_A).mT

    @torch.no_grad()
    def is_zero(self) -> bool:
        """Return whether nothing is added to any target, whatever the task; False where there are no targets."""
        for task in range(self.n_tasks):
            with self.choosing(task):
                if any(_product_is_not_zero(pair) for pair in self.lora_pairs()):
                    return False
        return True

    def own_peft_form(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return settings and tensors of PEFT's own form of this kind, where as LoRA it is far larger; or None."""
        return None

    def pull_back(self) -> None:
        """Carry what all backward passes of a step left behind to the gradients of the parameters."""

    def begin(self, total_steps: int) -> None:
        """Learn how many optimizer steps the run has; called once, before the first of them.

        Raises:
            ValueError: the adapter has a schedule of its own that does not fit.
        """

    def penalise(self, share: float) -> None:
        """Leave gradients of what is added to the loss once per optimizer step, whatever the batch.

        Args:
            share: this rank's part of it, the same on all, for gradients are summed; and their scale.
        """

    def stepped(self, step: int, finite: Tensor) -> None:
        """Do what belongs behind an optimizer step, while its gradients (of all ranks, clipped) are still there.

        Args:
            step: number of steps done, this one included.
            finite: false (a scalar on the device) if the optimizer has left the step out; so must this.
        """

    @property
    def settled(self) -> bool:
        """Whether its ranks are those it ends with by itself; an evaluation before that is not the best to keep."""
        return True

    def tasks_of(self, x: Tensor) -> Tensor | int:
        """Return the task of every row of a module's input (N,), or the one task of all of them."""
        if self.chosen is not None:
            return self.chosen
        if self.row_tasks is None:
            return self.one_task()
        return self.row_tasks.expand(x.shape[:-1]).reshape(-1)

    @property
    def chosen(self) -> int | None:
        """The task that all rows are of; None where every row may be of another."""
        return 0 if self.task is None and self.n_tasks == 1 else self.task

    @contextlib.contextmanager
    def choosing(self, task: int | None) -> Iterator[None]:
        """Let all rows be of one task for a while."""
        self.task = task
        try:
            yield
        finally:
            self.task = None

    def one_task(self) -> int:
        """Return the task that all rows are of, for what can only be had for one.

        Raises:
            ValueError: there are several and none is chosen.
        """
        if self.chosen is None:
            raise ValueError(NO_TASK)
        return self.chosen

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the frozen backbone alone inside a `with` block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

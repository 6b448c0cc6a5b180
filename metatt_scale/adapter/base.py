"""What trains beside a frozen model, whatever its form.

Trained values are few, of full precision, equal on all ranks and outside any engine (docs/decisions.md). The loop
knows them by name and asks for nothing else: it lets backward passes leave gradients, sums those over the ranks, and
steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metatt_scale.adapter.targets import Target, TargetMap


class Adapter(nn.Module):
    """The owner of all trained parameters of a run."""

    def __init__(self, target_map: TargetMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.target_map = target_map
        self.compute_dtype = dtype
        self.enabled = True
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

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, in an order that is the same on every rank."""
        raise NotImplementedError

    @property
    def n_trained(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.trained().values())

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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `tensors`."""
        return {name: tuple(value.shape) for name, value in self.tensors().items()}

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Replace all trained parameters, and what `kept` and `history` name where it is given."""
        with torch.no_grad():
            for name, place in self.tensors().items():
                if name in values:
                    place.copy_(values[name])

    def describe(self) -> dict[str, Any]:
        """Return the form of the adapter, as JSON can hold it: with `tensors` enough to make it again."""
        raise NotImplementedError

    def summary(self) -> str:
        """Return the form of the adapter in a few words."""
        raise NotImplementedError

    def pull_back(self) -> None:
        """Carry what all backward passes of a step left behind to the gradients of the parameters."""

    def begin(self, total_steps: int) -> None:
        """Learn how many optimizer steps the run has; called once, before the first of them.

        Raises:
            ValueError: the adapter has a schedule of its own that does not fit.
        """

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss once per optimizer step, whatever the batch; None where nothing is.

        Every rank adds an equal part of it, for gradients are summed.
        """
        return None

    def stepped(self, step: int, finite: Tensor) -> None:
        """Do what belongs behind an optimizer step, while its gradients (of all ranks, clipped) are still there.

        Args:
            step: number of steps done, this one included.
            finite: false (a scalar on the device) if the optimizer has left the step out; so must this.
        """

    def tasks_of(self, x: Tensor) -> Tensor | int:
        """Return the task of every row of a module's input (N,), or the one task of all of them."""
        if self.task is not None:
            return self.task
        if self.row_tasks is None:
            return 0
        return self.row_tasks.expand(x.shape[:-1]).reshape(-1)

    def enable(self, enabled: bool) -> None:
        """Switch the adapter on, or off: then the frozen backbone runs alone."""
        self.enabled = enabled

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the frozen backbone alone inside a `with` block."""
        before = self.enabled
        self.enable(False)
        try:
            yield
        finally:
            self.enable(before)

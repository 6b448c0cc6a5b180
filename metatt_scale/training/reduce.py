"""What the ranks add up once per optimizer step: the gradients of the cores and, in the tail, everything decided on.

One flat fp32 buffer, one all-reduce (a sum). Losses are local sums and the gradients come from local sums over
global denominators, so nothing is averaged afterwards. What a step decides (stop, save, skip) is read from the
reduced tail and therefore the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metatt_scale.device import Arriving, to_device
from metatt_scale.ending import SIGNALS
from metatt_scale.parallel import World

TAIL = 3 + len(SIGNALS)
"""Values behind the gradients: loss, tokens, ranks that were not finite, and one count per signal."""


class PendingSums:
    """A step's sums on the device, and on their way to the host."""

    def __init__(self, tail: Tensor, gradient_norm: Tensor) -> None:
        """Start the copy; nothing waits for the device until `read`."""
        self.gradient_norm = gradient_norm
        numbers = torch.cat([tail, gradient_norm[None]])
        self.finite = torch.isfinite(numbers).all() & (numbers[2] == 0)
        """Whether loss and gradient are finite on all ranks (scalar, on the device)."""
        self._numbers = Arriving(numbers)

    def read(self) -> StepSums:
        """Return the sums on the host, waiting for the step if need be."""
        loss, tokens, nonfinite, *stops, norm = self._numbers.read().tolist()
        return StepSums(
            loss=loss,
            tokens=round(tokens),
            nonfinite_ranks=round(nonfinite),
            stop_signal=next((int(number) for number, count in zip(SIGNALS, stops, strict=True) if count), None),
            gradient_norm=norm,
        )


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """The tail of a step's all-reduce and the norm of the gradient, on the host."""

    loss: float
    """Sum of the loss over all target tokens of the global batch (nats)."""
    tokens: int
    """Tokens sent through the model by all ranks (below 2^24, so exact in fp32)."""
    nonfinite_ranks: int
    """Ranks whose own loss or gradient was not finite."""
    stop_signal: int | None
    """Signal that any rank received, or None."""
    gradient_norm: float
    """2-norm of the summed gradient."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite on all ranks."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm) and not self.nonfinite_ranks


@torch.no_grad()
def sum_step(
    world: World, gradients: Sequence[Tensor], loss_sum: Tensor, tokens: int, stop_signal: int | None
) -> PendingSums:
    """Replace every gradient by its sum over all ranks, and return the sums of the rest.

    Nothing here waits for the device.

    Args:
        world: the ranks.
        gradients: of the cores, fp32, same shapes on every rank.
        loss_sum: this rank's part of the loss (scalar).
        tokens: this rank's tokens.
        stop_signal: signal this rank has received, if any.
    """
    finite = torch.isfinite(loss_sum) & torch.stack([torch.isfinite(g).all() for g in gradients]).all()
    told = [float(stop_signal == number) for number in SIGNALS]
    tail = to_device(torch.tensor([0.0, float(tokens), 0.0, *told], dtype=gradients[0].dtype), loss_sum.device)
    tail[0], tail[2] = loss_sum, (~finite).float()
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), tail])
    world.sum(flat)
    parts = flat.split([gradient.numel() for gradient in gradients] + [len(tail)])
    for gradient, part in zip(gradients, parts[:-1], strict=True):
        gradient.copy_(part.view_as(gradient))
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts[:-1]]))
    return PendingSums(parts[-1], norm)

"""Modules of an adapter in the places of a model's linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel

from metatt_scale.adapter.targets import Target


class Placed(nn.Module):
    """What stands in the place of a linear: that linear, and, once merged, the one the adapter is in."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_layer: nn.Module | None = None


def place(
    model: PreTrainedModel, targets: Sequence[Target], wrap: Callable[[nn.Module, int], Placed]
) -> tuple[Placed, ...]:
    """Freeze the model, and put `wrap(linear, index of the target)` into the place of every target.

    Raises:
        ValueError: a target is adapted already.
    """
    model.requires_grad_(False)
    placed = []
    for index, target in enumerate(targets):
        parent_path, _, name = target.path.rpartition(".")
        parent, base = model.get_submodule(parent_path), model.get_submodule(target.path)
        if isinstance(base, Placed):
            raise ValueError(f"{target.path} is adapted already; load the backbone anew for a second adapter")
        module = wrap(base, index)
        module.train(base.training)
        setattr(parent, name, module)
        placed.append(module)
    return tuple(placed)

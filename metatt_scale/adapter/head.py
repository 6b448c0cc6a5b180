"""A classifier's head that trains: its parameters belong to the adapter, its modules borrow them.

Shape legend: I input width, O output width; N stands for any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from metatt_scale.adapter.base import Adapter
from metatt_scale.adapter.leaves import Leaves


class HeadLinear(nn.Module):
    """y = x W^T + bias with parameters of an adapter's head, cast to the type that x has."""

    def __init__(self, adapter: Adapter, path: str) -> None:
        super().__init__()
        self._owner = (adapter,)  # inside a tuple, so that nn.Module does not register it as a child
        self._path = path

    def values(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (output x input) and bias."""
        head = self._owner[0].head
        assert head is not None
        bias = f"{self._path}.bias"
        return head[f"{self._path}.weight"], head[bias] if bias in head else None

    @torch.no_grad()
    def as_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Return a plain linear of the same values."""
        weight_OI, bias_O = self.values()
        plain = nn.Linear(*reversed(weight_OI.shape), bias=bias_O is not None, device="meta")
        plain.weight = nn.Parameter(weight_OI.to(dtype, copy=True), requires_grad=False)
        if bias_O is not None:
            plain.bias = nn.Parameter(bias_O.to(dtype, copy=True), requires_grad=False)
        return plain

    def forward(self, x_NI: Tensor) -> Tensor:
        """Return (N, O)."""
        weight_OI, bias_O = self.values()
        return F.linear(x_NI, weight_OI.to(x_NI.dtype), None if bias_O is None else bias_O.to(x_NI.dtype))


def train_head(model: PreTrainedModel, adapter: Adapter, start: Mapping[str, Tensor], device: torch.device) -> None:
    """Let the adapter own these parameters of the model's head, and put linears that borrow them into their places.

    An engine may have sharded the model's own; they have no part in anything any more.

    Args:
        model: a classifier.
        adapter: attached to it.
        start: every parameter of the head by its name in the model, whole.
        device: where the model computes.

    Raises:
        ValueError: the head has a module that is not linear.
    """
    paths = dict.fromkeys(name.rpartition(".")[0] for name in start)
    for path in paths:
        if type(model.get_submodule(path)) is not nn.Linear:
            raise ValueError(
                f"classifier.head is trained, but {path} of {type(model).__name__} is a "
                f"{type(model.get_submodule(path)).__name__}, and only heads of linears can be; set classifier.head: "
                "frozen"
            )
    adapter.head = Leaves({name: value.float().clone() for name, value in start.items()}).to(device)
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, HeadLinear(adapter, path))

"""Adapters with parameters of their own for every linear they stand behind."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.adapter.base import Adapter
from metatt_scale.adapter.leaves import Leaves
from metatt_scale.adapter.placed import Placed, place
from metatt_scale.adapter.targets import TargetMap


class BesideLinear(Placed):
    """A frozen linear whose output passes through its adapter."""

    def __init__(self, base_layer: nn.Module, adapter: LinearAdapter, index: int) -> None:
        super().__init__(base_layer)
        self._owner = (adapter,)  # inside a tuple, so that nn.Module does not register it as a child
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return what the adapter makes of x and of x W^T + bias."""
        if self.merged_layer is not None:
            return self.merged_layer(x)
        y, adapter = self.base_layer(x), self._owner[0]
        return adapter.behind(x, y, self._index) if adapter.enabled else y


class LinearAdapter(Adapter):
    """The owner of the parameters; what is done with them is a subclass's affair.

    Parameters are of full precision and cast where they are used, so gradients of all micro-batches add up in full
    precision. Their names are `TARGET.NAME`.
    """

    def __init__(self, target_map: TargetMap, dtype: torch.dtype, alpha: float, leaves: Leaves) -> None:
        super().__init__(target_map, dtype)
        self.alpha = alpha
        self.leaves = leaves

    @abstractmethod
    def behind(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """Return the output of target `index` for its input x (..., d_in) and the frozen output y (..., d_out).

        y may be a view that nothing may write into.
        """

    def attach(self, model: PreTrainedModel, device: torch.device) -> None:
        """Put a module behind every target."""
        self.linears = place(model, self.targets, lambda base, index: BesideLinear(base, self, index))
        self.to(device)

    def own(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all targets, target by target."""
        return self.leaves.named()

    def leaf(self, index: int, name: str) -> nn.Parameter:
        """Return a parameter of one target."""
        return self.leaves[f"{self.targets[index].path}.{name}"]

    def cast(self, index: int, name: str) -> Tensor:
        """Return a parameter of one target in the type that the model computes in."""
        return self.leaf(index, name).to(self.compute_dtype)

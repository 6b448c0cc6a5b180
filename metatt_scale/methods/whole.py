"""Training without an adapter: the classifier's head alone, or every weight of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.adapter import Adapter, TargetMap
from metatt_scale.backbone import in_head
from metatt_scale.recipe import AdapterRecipe, Recipe


def nowhere(model: PreTrainedModel, recipe: AdapterRecipe) -> TargetMap:
    """Return no targets."""
    return TargetMap(targets=(), layers=(), projections=())


class HeadOnly(Adapter):
    """Nothing beside the head, whose parameters every kind of adapter can own."""

    def __init__(self, target_map: TargetMap, recipe: Recipe, dtype: torch.dtype) -> None:
        super().__init__(target_map, dtype)

    def attach(self, model: PreTrainedModel, device: torch.device) -> None:
        """Freeze the model."""
        model.requires_grad_(False)

    def own(self) -> dict[str, nn.Parameter]:
        """Return nothing."""
        return {}

    def deltas(self) -> Iterator[Tensor]:
        """Yield nothing: no weight but the head's has changed."""
        return iter(())

    def is_zero(self) -> bool:
        """Return False: it adds nothing to a frozen weight by its nature."""
        return False

    def summary(self) -> str:
        """Return what trains."""
        return "no adapter, the head alone"


class Full(Adapter):
    """The model's own parameters, in fp32; of a classifier without the head, which `classifier.head` is about."""

    def __init__(self, target_map: TargetMap, recipe: Recipe, dtype: torch.dtype) -> None:
        super().__init__(target_map, dtype)
        self._without_head = recipe.classifier is not None
        self._weights: dict[str, nn.Parameter] = {}  # the model's, so not registered as the adapter's

    def attach(self, model: PreTrainedModel, device: torch.device) -> None:
        """Let every weight train."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (self._without_head and in_head(model, name)))
            if parameter.requires_grad:
                self._weights[name] = parameter

    def own(self) -> dict[str, nn.Parameter]:
        """Return the model's parameters by their names there, tied ones once."""
        return self._weights

    def deltas(self) -> Iterator[Tensor]:
        """Yield nothing: the weights are merged already."""
        return iter(())

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Refuse: the frozen weights are gone."""
        raise ValueError(
            "adapter.kind is full, so this model holds no frozen backbone to compare with; score the backbone "
            "by a run of another kind, with --zero-shot"
        )
        yield

    def is_zero(self) -> bool:
        """Return False: it adds nothing to a frozen weight by its nature."""
        return False

    def summary(self) -> str:
        """Return what trains."""
        return "every weight of the model" + (" below its head" if self._without_head else "")

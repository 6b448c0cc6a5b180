"""Parameters under the names of the modules they belong to, and where they start."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Leaves(nn.Module):
    """Parameters by name; unlike those of `nn.ParameterDict` the names may hold dots."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._places = {name: place for place, name in enumerate(start)}
        self._parameters_in_order = nn.ParameterList([nn.Parameter(value) for value in start.values()])

    def __getitem__(self, name: str) -> nn.Parameter:
        """Return a parameter."""
        return self._parameters_in_order[self._places[name]]

    def __contains__(self, name: str) -> bool:
        """Return whether there is one of that name."""
        return name in self._places

    def named(self, prefix: str = "") -> dict[str, nn.Parameter]:
        """Return all by name, in the order they were given in."""
        return {prefix + name: self[name] for name in self._places}


def normal(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    """Return random fp32 numbers, a pure function of seed and name, in whatever order tensors are made."""
    return torch.randn(shape, generator=_generator(seed, name)) * std


def like_linear(shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """Return (input x output) uniform in +-1 / sqrt(input), as LoRA and torch's Linear start; pure as `normal`."""
    return (2 * torch.rand(shape, generator=_generator(seed, name)) - 1) / math.sqrt(shape[0])


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

"""What the chain looks like while it is trained: gradients core by core and slice by slice, spectra of the bonds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metatt_scale.adapter import ChainAdapter
from metatt_scale.device import Arriving
from metatt_scale.tensor import singular_values
from metatt_scale.training.sweeping import numbers

_WIDE = ("input", "output")
"""Modes whose slices are too many to be told apart."""


class SliceNorms:
    """|grad G[:, i, :]|_F / sqrt(entries) of every slice i (paper appendix B), on the device, on its way to the host.

    The paper divides by the number of non-zero entries of the core; that is all of them, but for the first step of a
    core of zeros. Wide modes get one number for the whole core.
    """

    def __init__(self, adapter: ChainAdapter) -> None:
        """Start from the gradients on the cores; nothing waits for the device until `read`."""
        norms: dict[str, Tensor] = {}
        for mode, core in zip(adapter.spec.modes, adapter.cores, strict=True):
            assert core.grad is not None
            squares = core.grad.square()
            means = squares.mean().reshape(1) if mode in _WIDE else squares.transpose(0, 1).flatten(1).mean(1)
            norms[mode] = means.sqrt()
        self._sizes = {mode: len(values) for mode, values in norms.items()}
        self._norms = Arriving(torch.cat(list(norms.values())))

    def read(self) -> dict[str, list[float]]:
        """Return the norms by mode."""
        parts = self._norms.read().split(list(self._sizes.values()))
        return {mode: numbers(part) for mode, part in zip(self._sizes, parts, strict=True)}


def spectra(cores: Sequence[Tensor]) -> list[list[float]]:
    """Return the singular values of every inner bond."""
    return [numbers(s) for s in singular_values([core.detach().to("cpu", torch.float64) for core in cores])]

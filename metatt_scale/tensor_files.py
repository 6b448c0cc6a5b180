"""Tensors from files: their names, shapes and types are checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


class TensorForm(NamedTuple):
    """What a tensor must be to be installed in the place of another."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorForm:
        """Return the form of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        """Return shape and type for a message."""
        return f"of shape {self.shape} in {str(self.dtype).removeprefix('torch.')}"


Forms = Mapping[str, TensorForm]
"""By the tensor's name."""


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorForm]:
    """Return the forms of some tensors."""
    return {name: TensorForm.of(tensor) for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; they take no more memory than the file has bytes.

    Raises:
        ValueError: no such file, or not whole.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def count_values(path: Path, without: str) -> int:
    """Return how many values a safetensors file has, by its header, without those whose names begin so.

    Raises:
        ValueError: no such file, or not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys() if not name.startswith(without)]
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    return sum(torch.Size(shape).numel() for shape in shapes)


def difference(found: Forms, wanted: Forms) -> str | None:
    """Return the first tensor that is missing, unknown or of another form than wanted; None where all are right."""
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name, 'missing')}; it must be {wanted.get(name, 'absent')}"
    return None

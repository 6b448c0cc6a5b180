"""The same bits from the same inputs: nothing to do on a CPU, other kernels on CUDA."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

_CUBLAS, _FLASH = "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"
_WORKSPACES = (":4096:8", ":16:8")
"""The values of CUBLAS_WORKSPACE_CONFIG under which PyTorch takes cuBLAS for deterministic."""


@contextlib.contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Let every kernel on a CUDA device be a deterministic one inside a `with` block; a CPU changes nothing.

    Enter it before anything is multiplied in this process: cuBLAS reads its variable when it starts. What was set
    before is set again at the end.

    Raises:
        ValueError: CUBLAS_WORKSPACE_CONFIG asks for another workspace, or an operation has no deterministic kernel.
    """
    if device.type != "cuda":
        yield
        return
    workspace = os.environ.get(_CUBLAS, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ValueError(
            f"training.resume is exact, but {_CUBLAS} is {workspace!r}, under which cuBLAS may give other bits every "
            f"time; unset it, or set it to {_WORKSPACES[0]}"
        )
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    # transformers passes the second one on to flash-attn, whose backward adds up in any order otherwise.
    with _variables({_CUBLAS: workspace, _FLASH: "1"}), _algorithms(True):
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        except RuntimeError as error:
            if "does not have a deterministic implementation" not in str(error):
                raise
            operation = str(error).partition(" does not")[0]
            raise ValueError(
                f"training.resume is exact, but {operation} has no deterministic kernel on CUDA; set "
                "training.resume: auto"
            ) from error
        finally:
            cudnn.deterministic, cudnn.benchmark = before


@contextlib.contextmanager
def any_kernels() -> Iterator[None]:
    """Allow kernels that PyTorch calls nondeterministic where what may differ is not used, inside a `with` block."""
    with _algorithms(False) if torch.are_deterministic_algorithms_enabled() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def kernels_of(device: torch.device) -> str:
    """Return in words which kernels compute on a device: runs with different ones do not have the same bits."""
    if device.type != "cuda":
        return "the CPU"
    exact = torch.are_deterministic_algorithms_enabled()
    return f"{torch.cuda.get_device_name(device)} with {'deterministic' if exact else 'the fastest'} kernels"

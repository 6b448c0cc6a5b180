"""Tensors on their way from the host to a device and back."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on the device without waiting for what the device is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu":  # out of other memory a copy would wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Arriving:
    """A tensor on its way to the host; nothing waits for the device until `read`."""

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy."""
        self._copy = tensor.to("cpu", non_blocking=True)
        self._event = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """Return the tensor on the host, waiting for it if need be."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy

"""Host tensors on their way to where a model computes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on the device without waiting for what the device is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu":  # out of other memory a copy would wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

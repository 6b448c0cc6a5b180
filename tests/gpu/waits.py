"""Where the host waits for the device: as errors, or counted. On the CPU there is nothing to wait for."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Turn every wait of the host inside a `with` block into an error.

    PyTorch reports copies out of and into pageable memory and reads of values; it does not report waiting for an
    event, which is how a step's numbers are read late (metatt_scale/device.py).
    """
    with _sync_debug_mode("error", device):
        yield


def count_waits(act: Callable[[], object], device: torch.device) -> int:
    """Run an action and return how often the host waited."""
    with warnings.catch_warnings(record=True) as caught, _sync_debug_mode("warn", device):
        warnings.simplefilter("always")
        act()
    return sum("synchronizing" in str(warning.message) for warning in caught)


@contextlib.contextmanager
def _sync_debug_mode(mode: str, device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

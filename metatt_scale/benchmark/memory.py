"""The peak of live tensor bytes during a step, above what lay there before it.

On a GPU the allocator keeps that account. On a CPU the profiler records every change of torch's allocator, scratch
inside kernels and bitsandbytes' unpacked weights included, and the peak of their running sum is the same number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def peak_bytes(act: Callable[[], object], device: torch.device) -> int:
    """Run an action and return the most bytes it held at once on the device, beyond those held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        act()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would tell stderr that it starts and stops
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        act()
    recorded: Any = profile.profiler
    events = enumerate(recorded.kineto_results.events())
    # Several changes can carry one time stamp: the order of recording decides between them.
    changes = sorted((event.start_ns(), i, event.nbytes()) for i, event in events if event.name() == "[memory]")
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all distinct storages behind some tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())

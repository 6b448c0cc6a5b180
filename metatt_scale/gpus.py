"""Which GPU a child process gets, found without importing torch and without starting CUDA.

A library in a child may take every GPU it sees (transformers' Trainer does), and children that choose by themselves
all choose the first. So each is shown one: CUDA reads CUDA_VISIBLE_DEVICES when it starts, before the child imports
torch. NVIDIA's only; on other machines nothing is found, and children see what this process sees.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

VARIABLE = "CUDA_VISIBLE_DEVICES"
_DRIVER = Path("/proc/driver/nvidia/gpus")
_SECONDS = 30
"""That nvidia-smi may take; it waits for a driver that starts."""


def visible_gpus(
    environment: Mapping[str, str], find: Callable[[], tuple[str, ...]] | None = None
) -> tuple[str, ...]:
    """Return the GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it; none where there is none.

    Args:
        environment: variables of this process. A list in CUDA_VISIBLE_DEVICES is taken as it is: indices, UUIDs of
            GPUs, UUIDs of MIG devices. It ends, as CUDA reads it, before the first entry that names none.
        find: what is there where the variable is not set; asks the driver when None.
    """
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return ()
    given = environment.get(VARIABLE)
    if given is None:
        return (find or find_gpus)()
    names: list[str] = []
    for name in map(str.strip, given.split(",")):
        if not re.match(r"\d+$|GPU-|MIG-", name):
            break
        names.append(name)
    return tuple(names)


def find_gpus() -> tuple[str, ...]:
    """Ask nvidia-smi for the GPUs of this machine, or the driver's own files where it is not installed."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode == 0:
            return parse_list(done.stdout)
    except (OSError, subprocess.TimeoutExpired):
        pass
    try:
        count = sum(1 for gpu in _DRIVER.iterdir() if gpu.is_dir())
    except OSError:
        return ()
    return tuple(map(str, range(count)))


def parse_list(text: str) -> tuple[str, ...]:
    """Return the devices that `nvidia-smi -L` lists.

    GPUs by index, as users name them: which of them CUDA calls 0 may differ, but all of them are named. Where one is
    cut into MIG devices an index is not enough: then MIG devices, and GPUs that are whole, by UUID.
    """
    gpus: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        uuid = re.search(r"UUID: ((?:GPU|MIG)-[^)\s]+)", line)
        if re.match(r"GPU \d+:", line):
            gpus.append((uuid[1] if uuid else "", []))
        elif gpus and uuid and uuid[1].startswith("MIG-"):
            gpus[-1][1].append(uuid[1])
    if not any(parts for _, parts in gpus):
        return tuple(map(str, range(len(gpus))))
    return tuple(name for gpu, parts in gpus for name in (parts or [gpu]) if name)


def least_used(gpus: Sequence[str], in_use: Sequence[str | None]) -> str | None:
    """Return the GPU for another process: that with the fewest of them, of equal ones the first; None of none.

    Args:
        gpus: from which to choose.
        in_use: one entry per process that works now.
    """
    return min(gpus, key=in_use.count, default=None)


def showing(environment: Mapping[str, str], gpu: str | None) -> dict[str, str]:
    """Return the variables of a child that is to see one GPU; unchanged where `gpu` is None."""
    return {**environment, **({} if gpu is None else {VARIABLE: gpu})}

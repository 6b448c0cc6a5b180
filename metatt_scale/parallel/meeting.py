"""How the ranks of a job find each other, and how they part.

Where this process stands is read from the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK), never from a
library's idea of it: on CPU hosts those differ, and two ranks could silently train two models.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import (
    DistError,
    DistStoreError,
    HashStore,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from metatt_scale.parallel.world import World
from metatt_scale.recipe import RecipeError

_RESTART = timedelta(minutes=10)
"""How much longer a restarted rank waits for the others than `parallel.timeout_minutes`: they notice the failure at
that time-out, NCCL's watchdog then writes its report for a minute, a rank that hangs outside of NCCL is ended by
NCCL's monitor after eight, and launchers give the ranks of a node some minutes to end."""
_PAUSE = 0.5
"""Seconds between two looks for the store of rank 0."""
_groups = itertools.count()


class Place(NamedTuple):
    """Where this process stands among those of the job."""

    rank: int
    size: int
    """Processes of the job."""
    local_size: int
    """Processes on this node."""


def place_in_world() -> Place:
    """Return this process's place as the launcher has set it; that of a single process where none has.

    Raises:
        RecipeError: a variable is missing, or is no number that it can be.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    if size > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise RecipeError(
            f"WORLD_SIZE is {size}, but RANK, LOCAL_RANK, MASTER_ADDR or MASTER_PORT is not set; {_REMEDY}"
        )
    rank = _number("RANK", 0)
    if rank >= size:
        raise RecipeError(f"RANK is {rank}, but WORLD_SIZE is {size}, so ranks end at {size - 1}; {_REMEDY}")
    # Read later, by us and by the libraries.
    _number("LOCAL_RANK", 0)
    _number("MASTER_PORT", 0, least=1 if size > 1 else 0, most=65535)
    # torchrun and accelerate set the first of these, the deepspeed launcher the second.
    local_size = _number("LOCAL_WORLD_SIZE", _number("LOCAL_SIZE", size, least=1), least=1)
    return Place(rank=rank, size=size, local_size=local_size)


_REMEDY = "start with accelerate launch, torchrun or deepspeed, which set it, or unset WORLD_SIZE for one process"


def _number(name: str, default: int, *, least: int = 0, most: int = 999_999_999) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        rule = f"from {least} to {most}" if most == 65535 else f"from {least} on"
        raise RecipeError(f"{name} is {text!r}; it must be a whole number {rule}; {_REMEDY}")
    return int(text)


def group_options(device: torch.device, size: int, *, cpu_tensors: bool) -> dict[str, Any]:
    """Return the backend of a process group, and the device that it is bound to.

    Args:
        device: this rank's.
        size: number of ranks.
        cpu_tensors: collectives on CPU tensors occur although the device is a GPU. NCCL has none of them, so gloo is
            there too, with a connection between every two ranks.
    """
    if device.type != "cuda":
        return {"backend": "gloo"}
    backend = "cpu:gloo,cuda:nccl" if cpu_tensors else "nccl"
    # Bound to its device, NCCL connects here, where its errors have one cause, and subgroups split off it. A single
    # rank has nobody to connect to, and needs no network interface then.
    return {"backend": backend, "device_id": device} if size > 1 else {"backend": backend}


@contextlib.contextmanager
def join(
    device: torch.device, timeout: timedelta, *, group: bool = False, cpu_tensors: bool = False
) -> Iterator[World]:
    """Meet the other ranks of the job, and part from them at the end of the `with` block.

    After an error in a job of several ranks the process group is left as it is: the others may wait in a collective,
    and NCCL would wait for them. Report the error, then end the process (`metatt_scale.ending.leave`).

    Args:
        device: this rank's device.
        timeout: after which a rank that waits for the others gives up.
        group: make a process group even for one process (sharding engines want one).
        cpu_tensors: as of `group_options`.

    Raises:
        RecipeError: as `place_in_world`.
        ValueError: another rank has taken this rank's GPU.
    """
    rank, size, local_size = place_in_world()
    if size == 1 and not group:
        yield World(device=device)
        return
    options = group_options(device, size, cpu_tensors=cpu_tensors)
    store = _store(rank, size, timeout)
    if device.type == "cuda":
        check_alone(store, rank, _uuid(device))
    dist.init_process_group(rank=rank, world_size=size, timeout=timeout, store=store, **options)
    try:
        yield World(rank=rank, size=size, local_size=local_size, device=device)
    except BaseException:
        if size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _uuid(device: torch.device) -> str:
    """Return what identifies a GPU among all of all machines; "" where PyTorch does not say."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def check_alone(store: Store, rank: int, gpu: str) -> None:
    """Refuse a GPU that another rank has taken, before NCCL does so in words of its own, or shares it with gloo.

    Args:
        store: shared by all ranks.
        rank: of this process.
        gpu: its GPU's UUID; nothing is compared where it is empty.

    Raises:
        ValueError: another rank was here with the same GPU.
    """
    first = int(store.compare_set(f"gpu {gpu}", "", str(rank))) if gpu else rank
    if first != rank:
        raise ValueError(
            f"ranks {first} and {rank} have taken the same GPU (UUID {gpu}); show each process a GPU of its own "
            "(srun --gpus-per-task=1, CUDA_VISIBLE_DEVICES), or show all GPUs of a node to all its processes and set "
            "LOCAL_RANK"
        )


def _store(rank: int, size: int, timeout: timedelta) -> Store:
    """Return the key-value store through which the ranks exchange their addresses, when all of them are there."""
    if size == 1:
        return HashStore()
    address, port, number = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), next(_groups)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() != "true":
        # The number is for a process that joins a second time: the store of the first may still be there.
        return PrefixStore(f"group {number}", TCPStore(address, port, size, is_master=rank == 0, timeout=timeout))
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    wait = timeout + (_RESTART if restarted else timedelta())
    agent = TCPStore(address, port, is_master=False, timeout=wait, wait_for_workers=False)
    store = meet(PrefixStore(f"group {number}", agent), address, rank, size, wait)
    store.set_timeout(timeout)
    return store


def meet(agent: Store, address: str, rank: int, size: int, wait: timedelta) -> Store:
    """Return a store of rank 0's that every rank's present process has come to, and no earlier one.

    torchrun's agents keep one store for all attempts. In it, the restarted ranks would read addresses of ranks that
    died and the order to end that NCCL's watchdog left there, and the counts of restarts, by which the agents could
    tell attempts apart, differ between nodes that notice a failure at different times. So rank 0 opens a new store
    whenever it starts, and the agents' store tells where.

    Args:
        agent: store that outlives the ranks.
        address: of rank 0's host, as the other ranks see it.
        rank: this one.
        size: number of ranks.
        wait: how long to wait for the others.

    Raises:
        DistStoreError: not all ranks have come.
    """
    end = time.monotonic() + wait.total_seconds()
    own, used = _open(agent, address) if rank == 0 else None, b""
    while (left := end - time.monotonic()) > 0:
        place = agent.get("store of rank 0")
        store = own or (None if place == used else _connect(address, place))
        if store is not None:
            used = place
            # A second process of a rank does not stay in a store where its first one has been.
            if store.add(f"came {rank}", 1) == 1:
                try:
                    store.wait([f"came {i}" for i in range(size)], timedelta(seconds=left))
                    return store
                except DistError:  # rank 0 is gone, and may come back with another store
                    if own is not None or time.monotonic() > end:
                        raise
        time.sleep(_PAUSE)
    raise DistStoreError(f"timed out after {wait.total_seconds():.0f} s waiting for the store of rank 0")


def _open(agent: Store, address: str) -> TCPStore:
    """Open a store and tell where it is; the random name tells it from that of another job on the same port."""
    store, name = TCPStore(address, 0, is_master=True, wait_for_workers=False), uuid.uuid4().hex
    store.set(name, "")
    agent.set("store of rank 0", f"{store.port} {name}")
    return store


def _connect(address: str, place: bytes) -> TCPStore | None:
    """Return the store that rank 0 has opened there; None if it is gone."""
    port, name = place.decode().split()
    try:
        socket.create_connection((address, int(port)), timeout=5).close()  # where none listens TCPStore tries on
        store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
        return store if store.check([name]) else None
    except (OSError, DistError):
        return None

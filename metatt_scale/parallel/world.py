"""The ranks of a job, and what they tell each other about the cores.

Where this process stands is read from the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK), never from a
library's idea of it: on CPU hosts those differ, and two ranks could silently train two models. Every message is
tensors and JSON, never pickled objects. A world of one process does all of this without a process group.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from metatt_scale.recipe import RecipeError

Message = tuple[Any, Mapping[str, Tensor]]
"""Something JSON can hold, and named tensors."""

_FINE, _FAILED = 0, 1
_groups = itertools.count()


class OtherRankError(RuntimeError):
    """Another rank failed and tells its own error; this one only stops."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of this process among those of the job."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Processes on this node."""

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, writes and decides for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Replace `values` by the sum over all ranks, in place, and return it: one all-reduce."""
        if dist.is_initialized() and self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Return (ranks, *shape): the `values` of every rank, which have one shape everywhere."""
        rows = values.new_zeros((self.size, *values.shape))
        rows[self.rank] = values
        return self.sum(rows)  # the same collective on every backend and version

    def concatenate(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, those of rank 0 first; each rank may have another number of them."""
        if self.size == 1:
            return rows
        counts = self.gather(torch.tensor(len(rows), device=rows.device)).tolist()
        before = sum(counts[: self.rank])
        joined = rows.new_zeros((sum(counts), *rows.shape[1:]))
        joined[before : before + len(rows)] = rows
        return self.sum(joined)

    def from_first(self, compute: Callable[[], Message]) -> Message:
        """Run `compute` on rank 0 alone and return its result on every rank (tensors on the CPU).

        A header (status, length) travels first, then one flat payload.

        Raises:
            OtherRankError: rank 0 raised; the message is its error's text. Rank 0 raises the error itself.
        """
        if self.size == 1:
            return compute()
        failure: Exception | None = None
        payload = b""
        if self.is_first:
            try:
                value, tensors = compute()
                payload = safetensors.torch.save(
                    {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"json": json.dumps(value)}
                )
            except Exception as error:
                failure, payload = error, f"{type(error).__name__}: {error}".encode()
        header = torch.tensor([_FINE if failure is None else _FAILED, len(payload)], device=self.device)
        dist.broadcast(header, 0)
        status, length = header.tolist()
        flat = torch.empty(length, dtype=torch.uint8, device=self.device)
        if self.is_first:
            flat.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(flat, 0)
        if failure is not None:
            raise failure
        received = flat.cpu().numpy().tobytes()
        if status == _FAILED:
            raise OtherRankError(f"rank 0 failed: {received.decode()}")
        return _unpack(received)

    def tensors_from_first(self, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Run `compute` on rank 0 alone and return its tensors on every rank (on the CPU); raises as `from_first`."""

        def message() -> Message:
            return None, {str(i): tensor for i, tensor in enumerate(compute())}

        _, tensors = self.from_first(message)
        return [tensors[str(i)] for i in range(len(tensors))]

    def on_first(self, act: Callable[[], Any]) -> None:
        """Run `act` on rank 0 while the others wait for it.

        Raises:
            OtherRankError: it raised there; rank 0 raises the error itself.
        """

        def compute() -> Message:
            act()
            return None, {}

        self.from_first(compute)


def _unpack(received: bytes) -> Message:
    length = int.from_bytes(received[:8], "little")
    header = json.loads(received[8 : 8 + length])
    return json.loads(header["__metadata__"]["json"]), safetensors.torch.load(received)


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
    for name in ("LOCAL_RANK", "MASTER_PORT"):  # read later, by us and by the libraries
        _number(name, 0)
    # torchrun and accelerate set the first of these, the deepspeed launcher the second.
    local_size = _number("LOCAL_WORLD_SIZE", _number("LOCAL_SIZE", size, least=1), least=1)
    return Place(rank=rank, size=size, local_size=local_size)


_REMEDY = "start with accelerate launch, torchrun or deepspeed, which set it, or unset WORLD_SIZE for one process"


def _number(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise RecipeError(f"{name} is {text!r}; it must be a whole number from {least} on; {_REMEDY}")
    return int(text)


@contextlib.contextmanager
def join(device: torch.device, timeout: timedelta, *, group: bool = False) -> Iterator[World]:
    """Meet the other ranks of the job, and leave them at the end of the `with` block.

    Args:
        device: this rank's device.
        timeout: after which a rank that waits for the others gives up.
        group: make a process group even for one process (sharding engines want one).

    Raises:
        RecipeError: as `place_in_world`.
        ValueError: another rank has taken this rank's GPU.
    """
    rank, size, local_size = place_in_world()
    if size == 1 and not group:
        yield World(device=device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = _store(rank, size, timeout)
    if device.type == "cuda":
        check_alone(store, rank, str(getattr(torch.cuda.get_device_properties(device), "uuid", "")))
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)
    try:
        yield World(rank=rank, size=size, local_size=local_size, device=device)
    finally:
        dist.destroy_process_group()


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
    """Return the key-value store through which ranks find each other.

    Under torchrun the agent serves one store for all attempts: a prefix per attempt keeps the addresses of ranks that
    died out of the next one, and a count does so for a process that joins a second time.
    """
    if size == 1:
        return HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    store = TCPStore(address, port, size, is_master=not served and rank == 0, timeout=timeout)
    return PrefixStore(f"attempt {attempt}, group {next(_groups)}", store)

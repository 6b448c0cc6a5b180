"""The ranks of a job, and what they tell each other about the cores.

Every message is tensors and JSON, never pickled objects, and all collectives are on `World.device`: on CUDA there may
be no backend for CPU tensors (meeting.py). A world of one process does all of this without a process group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[Any, Mapping[str, Tensor]]
"""Something JSON can hold, and named tensors."""

_FINE, _FAILED = 0, 1


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

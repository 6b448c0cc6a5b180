"""Are the ranks still replicas? Compared by hash, named by rank and by what differs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metatt_scale.parallel.world import World


class ReplicasDifferError(ValueError):
    """Ranks that must hold the same bits do not; raised on every rank."""


def check_same(world: World, things: Mapping[str, Sequence[Tensor] | str], what_to_do: str) -> None:
    """Compare named tensors or texts over all ranks: one hash each, one collective.

    Raises:
        ReplicasDifferError: they differ; the message names the things, and the ranks that are not with the majority.
    """
    if world.size == 1:
        return
    own = torch.tensor([_hash(thing) for thing in things.values()], dtype=torch.int64, device=world.device)
    hashes = world.gather(own).tolist()
    differing = []
    for name, column in zip(things, zip(*hashes, strict=True), strict=True):
        usual, _ = Counter(column).most_common(1)[0]
        others = [str(rank) for rank, value in enumerate(column) if value != usual]
        if others:
            differing.append(f"{name} on rank{'s' if len(others) > 1 else ''} {', '.join(others)}")
    if differing:
        raise ReplicasDifferError(f"the ranks differ: {'; '.join(differing)}; {what_to_do}")


def _hash(thing: Sequence[Tensor] | str) -> int:
    digest = hashlib.sha256()
    if isinstance(thing, str):
        digest.update(thing.encode())
    else:
        for tensor in thing:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:7], "little")  # 56 bits: a sum over one-hot rows cannot overflow

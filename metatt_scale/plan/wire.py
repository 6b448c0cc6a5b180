"""Bytes on the wire per optimizer step: the chain's one all-reduce, the backbone's gathers, LoRA under DDP.

A ring all-reduce of b bytes over W ranks makes each rank send 2 (W - 1) / W b; a ring all-gather of b bytes in all
over Z ranks (Z - 1) / Z b. Letters: see shape.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from metatt_scale.plan.layout import Layout
from metatt_scale.plan.memory import FP32
from metatt_scale.plan.shape import ModelShape, Unit
from metatt_scale.plan.weights import gather_bytes
from metatt_scale.recipe import Recipe
from metatt_scale.training.reduce import TAIL


def ring_all_reduce(size: int, ranks: int) -> float:
    """Return what each of W ranks sends to sum b bytes: 2 (W - 1) / W b."""
    return 2 * (ranks - 1) / ranks * size


def ring_all_gather(size: int, ranks: int) -> float:
    """Return what each of Z ranks sends to gather b bytes in all: (Z - 1) / Z b."""
    return (ranks - 1) / ranks * size


def chain_buffer(shape: ModelShape) -> int:
    """Return the bytes of the chain's all-reduce, one per optimizer step: 4 (P + tail)."""
    return FP32 * (shape.spec.n_parameters + TAIL)


def lora_buffer(shape: ModelShape, rank: int) -> int:
    """Return the bytes that DDP all-reduces for LoRA of rank r: fp32, 4 r (d_in + d_out) over all targets."""
    return FP32 * shape.target_map.lora_parameters(rank)


def gathers_of(unit: Unit, shape: ModelShape, layout: Layout) -> int:
    """Return how often a unit is gathered per micro-batch: for its forward, and again for its backward.

    Not for the backward where the unit is kept (reshard off), or where none runs: in the embedding and the layers
    below the first adapted one, which nothing asks for a gradient, so that none is recomputed either. But FSDP2
    fetches ahead, in the reverse of the forward's order, so the last of those layers is gathered again for nothing.
    """
    if layout.sharers == 1:
        return 0
    if not layout.reshard:
        return 1
    fsdp2 = layout.strategy == "fsdp2"
    below = [u.path for kind in ("embedding", "layer") for u in shape.units if u.kind == kind]
    layers = [u.path for u in shape.units if u.kind == "layer"]
    below = below[: below.index(layers[shape.target_map.layers[0]])]
    return 1 if unit.path in below and not (fsdp2 and unit.path == below[-1] != below[0]) else 2


@dataclass(frozen=True, kw_only=True)
class Gathers:
    """The backbone's gathers in one optimizer step."""

    count: int
    size: int
    """Bytes gathered on each rank."""
    sent: float
    """Bytes each rank sends."""


def backbone_gathers(shape: ModelShape, recipe: Recipe, layout: Layout) -> Gathers:
    """Return all gathers of a step: (micro-batches) x (sum over units of gathers x bytes).

    FSDP2 gathers a unit in one collective; ZeRO-3 module by module, `count` then counts units all the same.
    """
    count, size = 0, 0
    for unit in shape.units:
        times = layout.micro_batches * gathers_of(unit, shape, layout)
        count += times
        size += times * gather_bytes(unit, recipe.backbone, layout.sharers, layout.strategy)
    return Gathers(count=count, size=size, sent=ring_all_gather(size, layout.sharers))

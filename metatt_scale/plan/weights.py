"""Bytes of the frozen backbone: as it is stored, as each rank's share of it, and as it travels when gathered.

Letters: see shape.py. n values and m rows of one matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from metatt_scale.backbone.quantised import BLOCK
from metatt_scale.backbone.source import resolve
from metatt_scale.plan.shape import ITEM_SIZE, ModelShape, Unit, Weight
from metatt_scale.recipe import BackboneRecipe

_OUTER_BLOCK = 256
"""Scales per scale of scales (bitsandbytes)."""
_CODE, _OUTER_CODE = 16, 256
"""Entries of the fp32 tables that say what 4-bit codes and 8-bit scales stand for; every linear has its own."""


def stored_bytes(weight: Weight, recipe: BackboneRecipe) -> int:
    """Return the bytes of one tensor: n e; packed ceil(n / 2), int8 n."""
    if not weight.packed:
        return weight.numel * ITEM_SIZE[recipe.dtype]
    if recipe.quantization == "int8":
        return weight.numel
    item = ITEM_SIZE[recipe.quant_storage]
    return math.ceil(math.ceil(weight.numel / 2) / item) * item


def state_bytes(weight: Weight, recipe: BackboneRecipe) -> int:
    """Return the bytes of what unpacks a tensor, which every rank holds whole.

    4 bits, b = ceil(n / 64) blocks: 4 b + 4 * 16 (scales, code), or with double quantisation
    b + 4 * 16 + 4 * (ceil(b / 256) + 256 + 1) (8-bit scales, code, their scales, code and offset). int8: 4 m, a
    scale per row.
    """
    if not weight.packed:
        return 0
    if recipe.quantization == "int8":
        return 4 * weight.rows
    blocks = math.ceil(weight.numel / BLOCK)
    if not recipe.double_quantization:
        return 4 * blocks + 4 * _CODE
    return blocks + 4 * _CODE + 4 * (math.ceil(blocks / _OUTER_BLOCK) + _OUTER_CODE + 1)


def rows_of(weight: Weight, recipe: BackboneRecipe) -> tuple[int, int]:
    """Return (m, bytes of a row) of a tensor as it is stored; packed 4-bit weights are a column of storage values."""
    total = stored_bytes(weight, recipe)
    if weight.packed and recipe.quantization != "int8":
        item = ITEM_SIZE[recipe.quant_storage]
        return total // item, item
    return weight.rows, total // weight.rows


def shard_bytes(weight: Weight, recipe: BackboneRecipe, ranks: int, strategy: str) -> int:
    """Return the bytes of one tensor on one of Z ranks, with the padding that makes all shares equal.

    FSDP2 cuts along the first axis: ceil(m / Z) rows. ZeRO-3 cuts the flat tensor: ceil(values / Z) values.
    """
    rows, row = rows_of(weight, recipe)
    if strategy == "zero3":
        item = ITEM_SIZE[recipe.quant_storage if weight.packed else recipe.dtype]
        return math.ceil(rows * row // item / ranks) * item
    return math.ceil(rows / ranks) * row


def own_bytes(weight: Weight, recipe: BackboneRecipe, ranks: int, rank: int) -> int:
    """Return the bytes of one tensor that rank k of Z owns under FSDP2 without padding; 0 on the last of many.

    Its rows are those of [k c, (k + 1) c) below m, c = ceil(m / Z).
    """
    rows, row = rows_of(weight, recipe)
    chunk = math.ceil(rows / ranks)
    return row * max(0, min(rows, (rank + 1) * chunk) - rank * chunk)


def gather_bytes(unit: Unit, recipe: BackboneRecipe, ranks: int, strategy: str) -> int:
    """Return the bytes of a gathered unit: Z times the sum of its padded shares."""
    return ranks * sum(shard_bytes(weight, recipe, ranks, strategy) for weight in unit.weights)


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """The backbone on one rank."""

    packed: int
    """Matrices in 4 or 8 bits."""
    quant_state: int
    """What unpacks them (replicated)."""
    unquantised: int
    """Embeddings, norms, head, and all matrices without quantisation."""
    buffers: int
    """Rotary frequencies (replicated)."""

    @property
    def total(self) -> int:
        """Their sum."""
        return self.packed + self.quant_state + self.unquantised + self.buffers


def weight_bytes(
    shape: ModelShape, recipe: BackboneRecipe, *, ranks: int = 1, strategy: str = "replicate"
) -> WeightBytes:
    """Return the backbone's bytes on one of `ranks` ranks that hold a copy among them (`replicate`: all of it)."""
    weights = [weight for unit in shape.units for weight in unit.weights]
    sharers = 1 if strategy == "replicate" else ranks
    share = {w.path: shard_bytes(w, recipe, sharers, strategy) for w in weights}
    return WeightBytes(
        packed=sum(share[weight.path] for weight in weights if weight.packed),
        quant_state=sum(state_bytes(weight, recipe) for weight in weights),
        unquantised=sum(share[weight.path] for weight in weights if not weight.packed),
        buffers=shape.buffer_bytes,
    )


def loading_bytes(shape: ModelShape, recipe: BackboneRecipe) -> int:
    """Return the host memory that loading takes in one process, beside the weights that stay there.

    A unit is held unquantised, and at times its copy in another type: 2 e n of the largest. A GGUF file is unpacked
    whole, in fp32 tensor by tensor.
    """
    sizes = [sum(weight.numel for weight in unit.weights) for unit in shape.units]
    item = ITEM_SIZE[recipe.dtype]
    if resolve(recipe.path).kind == "gguf":
        return item * sum(sizes) + 2 * ITEM_SIZE["float32"] * max(sizes)
    return 2 * item * max(sizes)

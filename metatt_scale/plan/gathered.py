"""Gathered weights of one rank at their most. Letters: see shape.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from metatt_scale.plan.layout import Layout
from metatt_scale.plan.shape import ITEM_SIZE, ModelShape
from metatt_scale.plan.weights import gather_bytes, shard_bytes, stored_bytes
from metatt_scale.recipe import Recipe

_UNIT_OF = {"embedding": "embedding", "forward": "layer", "loss": "head", "head": "head", "layer": "layer"}
"""Phase of a step (peak.py) -> kind of the unit that computes in it."""


def gathered_bytes(shape: ModelShape, recipe: Recipe, layout: Layout, phase: str) -> int:
    """Return the most bytes of gathered weights that a rank holds in a phase of a step, buffers included."""
    if layout.sharers == 1:
        return 0
    if layout.strategy == "zero3":
        return _under_zero3(shape, recipe, layout, phase)
    return _under_fsdp2(shape, recipe, layout, phase)


def _under_fsdp2(shape: ModelShape, recipe: Recipe, layout: Layout, phase: str) -> int:
    """The root and two of the unit that computes: its weights, and their buffer or the next unit.

    In the forward of the layers a third: the buffer before is held until the next is there. All units, and two
    buffers in the forward, where none is given back.
    """
    sizes = [(u.kind, gather_bytes(u, recipe.backbone, layout.sharers, layout.strategy)) for u in shape.units]
    root = sum(size for kind, size in sizes if kind == "root")
    unit = max((size for kind, size in sizes if kind == _UNIT_OF[phase]), default=0)
    if not layout.reshard:
        return sum(size for _, size in sizes) + (2 * unit if phase == "forward" else 0)
    return root + (3 if phase == "forward" else 2) * unit


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """One weight as ZeRO-3 gathers it."""

    kind: str
    """Of its unit."""
    unit: str
    module: str
    size: int
    always: bool
    """It stays gathered between all uses."""


def _under_zero3(shape: ModelShape, recipe: Recipe, layout: Layout, phase: str) -> int:
    """Tensors that are always gathered, the module that computes, and what DeepSpeed fetches ahead of its use.

    P bytes of small tensors stay gathered. The other R bytes are gathered module by module; a recomputed layer keeps
    its modules until its backward is done. From the third step on the modules that follow are fetched ahead until
    `live` values are gathered, `fetched` values at a time, out of a buffer that stays until all of them were used.

    Nothing fetched ahead: P + module.
    R > live: P + live + the larger of module and one tensor, and a buffer of `fetched` values and one tensor.
    R <= live: P + R and that buffer when the embedding runs. The order of a step covers its backward too; by the end
    of the forward DeepSpeed has gone through all of it, and fetches nothing ahead in the backward: P + module.

    `stage3_max_reuse_distance` does not count: DeepSpeed 0.19 decides once per module and place in the order what is
    kept for a later use, and its first order is that of the trial forwards, which have no backward.
    """
    item, tensors = ITEM_SIZE[recipe.backbone.dtype], _tensors(shape, recipe, layout)
    always = sum(tensor.size for tensor in tensors if tensor.always)
    others = [tensor for tensor in tensors if not tensor.always]
    rest = sum(tensor.size for tensor in others)
    recomputed = phase == "layer" and recipe.backbone.gradient_checkpointing
    modules: Counter[tuple[str, str]] = Counter()
    for tensor in others:
        modules[tensor.kind, tensor.unit if recomputed else tensor.module] += tensor.size
    largest = {kind: max((n for (k, _), n in modules.items() if k == kind), default=0) for kind, _ in modules}
    module = largest.get(_UNIT_OF[phase]) or largest.get("root", 0)  # a tied head is the root's
    live, fetched = item * layout.live, item * layout.fetched
    if not live or not fetched:
        return always + module
    one = max((t.size for t in others if phase != "layer" or t.kind == "layer"), default=0)
    if rest > live:
        # The first fetch may be as large as all that may be gathered; those after it replace what was released.
        at_once = min(live, fetched) if phase == "embedding" or fetched < live else 0
        return always + min(rest, live + max(module, one)) + min(rest, at_once + one)
    buffer = min(rest, fetched + one)
    if phase == "embedding":
        return always + rest + buffer
    if phase == "forward":
        last = next(tensor.unit for tensor in reversed(tensors) if tensor.kind == "layer")
        left = sum(tensor.size for tensor in others if tensor.unit == last or tensor.kind in ("head", "root"))
        return always + left + buffer
    return always + module


def always_gathered_bytes(shape: ModelShape, recipe: Recipe, layout: Layout) -> int:
    """Return the bytes that ZeRO-3 keeps gathered between all uses: of tensors of at most `small` values.

    Packed 4-bit weights count as values of `backbone.quant_storage`.
    """
    if layout.sharers == 1 or layout.strategy != "zero3":
        return 0
    return sum(tensor.size for tensor in _tensors(shape, recipe, layout) if tensor.always)


def _tensors(shape: ModelShape, recipe: Recipe, layout: Layout) -> list[_Tensor]:
    """Return all weights, in the order of their units."""
    found, kept = [], 0
    for unit in shape.units:
        for weight in unit.weights:
            values = stored_bytes(weight, recipe.backbone) // ITEM_SIZE[recipe.backbone.dtype]
            always = values <= layout.small and kept + values <= layout.most_small
            kept += values if always else 0
            size = layout.sharers * shard_bytes(weight, recipe.backbone, layout.sharers, layout.strategy)
            module = weight.path.rpartition(".")[0]
            found.append(_Tensor(kind=unit.kind, unit=unit.path, module=module, size=size, always=always))
    return found

"""The peak of one rank's memory: what stays, plus the largest of what comes and goes. Letters: see shape.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from metatt_scale.adapter.folding import ROOM, folding_pays
from metatt_scale.plan.gathered import gathered_bytes
from metatt_scale.plan.layout import Layout
from metatt_scale.plan.memory import ActivationBytes, ChainBytes, activation_bytes, chain_bytes, head_bytes
from metatt_scale.plan.shape import ITEM_SIZE, ModelShape
from metatt_scale.plan.weights import WeightBytes, loading_bytes, weight_bytes
from metatt_scale.recipe import Recipe
from metatt_scale.training.reduce import TAIL

GIB = 1 << 30
PHASES = ("embedding", "forward", "loss", "head", "layer")
"""Moments that may decide the peak: the embedding runs, the last layer's forward, the loss, which the head gives, the
backward of the head and of a layer."""
_MOST_EXAMPLES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class MemoryBytes:
    """One rank's memory in a training step."""

    weights: WeightBytes
    weights_on_host: int
    """The part of `weights` that CPU offloading keeps in host memory."""
    host_while_loading: int
    """The most host memory of one process for weights, mapped files left out."""
    chain: ChainBytes
    activations: ActivationBytes
    gathered: int
    """Gathered weights in the phase that decides the peak."""
    phases: dict[str, int]
    """What comes and goes in each of PHASES."""

    @property
    def phase(self) -> str:
        """Where the peak is."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> int:
        """Weights + chain + what is kept of all layers + the largest phase."""
        stays = self.weights.total - self.weights_on_host + self.chain.total
        return stays + self.phases[self.phase]


def memory_bytes(shape: ModelShape, recipe: Recipe, layout: Layout) -> MemoryBytes:
    """Return the memory of the busiest rank, term by term."""
    work, item = layout.work, ITEM_SIZE[recipe.backbone.dtype]
    weights = weight_bytes(shape, recipe.backbone, ranks=layout.sharers, strategy=layout.strategy)
    activations = activation_bytes(shape, work, recipe, layout.strategy)
    rows = recipe.training.batch_size * work.tokens
    whole = weight_bytes(shape, recipe.backbone)
    room = (whole.packed + whole.unquantised) // ROOM
    folded = folding_pays(shape.spec.middle_bonds, shape.target_map.targets, rows, room, item)
    gathered = {phase: gathered_bytes(shape, recipe, layout, phase) for phase in PHASES}
    phases = {
        "embedding": item * work.rows * shape.hidden + gathered["embedding"],
        "forward": activations.kept + gathered["forward"],
        "loss": activations.kept + activations.logits + gathered["loss"],
        "head": activations.kept + head_bytes(shape, work, recipe) + gathered["head"],
        "layer": activations.kept + activations.layer + gathered["layer"],
    }
    on_host = weights.packed + weights.unquantised if layout.offload else 0
    memory = MemoryBytes(
        weights=weights,
        weights_on_host=on_host,
        host_while_loading=on_host + loading_bytes(shape, recipe.backbone),
        chain=chain_bytes(shape, recipe, TAIL, folded=folded),
        activations=activations,
        gathered=0,
        phases=phases,
    )
    return replace(memory, gathered=gathered[memory.phase])


def largest_micro_batch(shape: ModelShape, recipe: Recipe, layout: Layout, limit: int) -> int:
    """Return the most examples per forward whose peak is at most `limit` bytes; 0 where not even one fits."""

    def fits(examples: int) -> bool:
        tried = replace(layout, work=replace(layout.work, examples=examples))
        return memory_bytes(shape, recipe, tried).peak <= limit

    low, high = 0, 1
    while high < _MOST_EXAMPLES and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

"""Estimated time of an optimizer step, from FLOP and bandwidth rates; no kernel, no congestion is modelled.

Letters: see shape.py. P values of one layer's matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from metatt_scale.plan.layout import Layout
from metatt_scale.plan.shape import ModelShape
from metatt_scale.plan.wire import backbone_gathers, chain_buffer, ring_all_reduce
from metatt_scale.recipe import Recipe

SUSTAINED = 0.4
"""Part of the data sheet's rate that training of a large transformer usually reaches."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU and its links, from data sheets."""

    name: str
    tflops: float
    """Dense bf16 rate in 10^12 per second that a step reaches."""
    node_gb_per_s: float
    """10^9 bytes per second that a GPU sends to its neighbours in a node."""
    network_gb_per_s: float
    """10^9 bytes per second that a GPU sends to another node (one network port per GPU)."""
    memory_gib: float
    latency_s: float = 10e-6
    """Of one message of a collective."""


def known_hardware() -> dict[str, Hardware]:
    """Return the table of GPUs by name; rates are SUSTAINED times those of the data sheets."""
    rows = (
        ("h100-sxm", 989.0, 450.0, 50.0, 80.0),
        ("h200-sxm", 989.0, 450.0, 50.0, 141.0),
        ("a100-sxm", 312.0, 300.0, 25.0, 80.0),
        ("l40s", 362.0, 32.0, 25.0, 48.0),
        ("rtx-4090", 165.0, 32.0, 12.5, 24.0),
    )
    return {
        name: Hardware(name=name, tflops=SUSTAINED * t, node_gb_per_s=n, network_gb_per_s=w, memory_gib=m)
        for name, t, n, w, m in rows
    }


def step_flops(shape: ModelShape, recipe: Recipe, layout: Layout) -> float:
    """Return the operations of one rank in an optimizer step.

    Per row and layer a forward is 2 P + 4 S Q c (scores and their use; c = 1/2 where the kernel skips what is not
    causal, 1 for encoders) + 2 (d_in R + R R' + R' d_out) for each target. A backward, which makes gradients of
    inputs only, is once the matrices and twice the rest; recomputation is one more forward. The head: 2 D V per
    position, twice (of a classifier V are its labels, and its own dense layer is left out).
    """
    work, spec = layout.work, shape.spec
    causal = 1.0 if recipe.backbone.attention == "eager" or recipe.classifier else 0.5
    attention = 4 * work.tokens * shape.query * causal * shape.layers
    bond = max(spec.ranks)
    chain = sum(2 * (t.d_in * bond + bond**2 + bond * t.d_out) for t in shape.target_map.targets)
    matrices = 2 * shape.layer_parameters * shape.layers
    forward = matrices + attention + chain
    backward = matrices + 2 * (attention + chain)
    again = forward if recipe.backbone.gradient_checkpointing else 0
    head = 4 * shape.hidden * shape.vocabulary * work.examples * min(work.tokens, work.answers + 1)
    return layout.micro_batches * (work.rows * (forward + backward + again) + head)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Estimated seconds of one optimizer step."""

    compute: float
    gathers: float
    chain: float

    @property
    def total(self) -> float:
        """max(compute, gathers) + chain: gathers run beside the computation, the chain's sum after it."""
        return max(self.compute, self.gathers) + self.chain


def step_time(shape: ModelShape, recipe: Recipe, layout: Layout, hardware: Hardware) -> StepTime:
    """Return the estimated seconds of a step: FLOP / rate, bytes sent / bandwidth + messages x latency.

    A collective within a node runs at the node's bandwidth, one that leaves it at the network's. A gather is counted
    with log2 Z messages, the chain's all-reduce with 2 log2 W.
    """
    gathers = backbone_gathers(shape, recipe, layout)
    sent = ring_all_reduce(chain_buffer(shape), layout.ranks)
    return StepTime(
        compute=step_flops(shape, recipe, layout) / (hardware.tflops * 1e12),
        gathers=gathers.sent / _bandwidth(layout, layout.sharers, hardware)
        + gathers.count * _messages(layout.sharers) * hardware.latency_s,
        chain=sent / _bandwidth(layout, layout.ranks, hardware) + 2 * _messages(layout.ranks) * hardware.latency_s,
    )


def _bandwidth(layout: Layout, ranks: int, hardware: Hardware) -> float:
    return 1e9 * (hardware.node_gb_per_s if ranks <= layout.gpus_per_node else hardware.network_gb_per_s)


def _messages(ranks: int) -> int:
    return math.ceil(math.log2(ranks))

"""Everything `plan` says about a recipe, as plain numbers: exact counts, and estimates that name themselves so."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from metatt_scale.backbone import load_skeleton
from metatt_scale.parallel import with_fitting_shards
from metatt_scale.plan import GPUS_PER_NODE
from metatt_scale.plan.counts import counts
from metatt_scale.plan.layout import Layout, assumption, lay_out
from metatt_scale.plan.peak import GIB, MemoryBytes, largest_micro_batch, memory_bytes
from metatt_scale.plan.shape import ModelShape, read_shape
from metatt_scale.plan.timing import Hardware, known_hardware, step_time
from metatt_scale.plan.wire import backbone_gathers, chain_buffer, lora_buffer, ring_all_reduce
from metatt_scale.recipe import INNER_BONDS, Recipe

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Worlds of the scaling table."""
LORA_RANK = 8


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the estimates assume about the machine."""

    nodes: int = 1
    gpus_per_node: int = 1
    hardware: Hardware = known_hardware()["h100-sxm"]
    answers: int | None = None
    """Positions per example whose next token is a target; all but the first where None."""


def plan(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """Return what a recipe trains and what that takes; bytes are of one rank, times are estimates in seconds.

    The estimates are for chains. Of other kinds of adapters the counts are all there is.

    Raises:
        ValueError: no configuration for the backbone, targets that match nothing, or a layout that cannot be.
    """
    model = load_skeleton(recipe.backbone, recipe.head_outputs)
    exact = counts(recipe, model)
    if recipe.adapter.kind not in INNER_BONDS:
        return exact
    shape = read_shape(recipe, model)
    layout = lay_out(recipe, machine.nodes * machine.gpus_per_node, machine.gpus_per_node, machine.answers)
    nodes_of = machine.gpus_per_node if machine.gpus_per_node > 1 else GPUS_PER_NODE
    return {
        **exact,
        "assumption": assumption(recipe),
        "layout": _layout(recipe, shape, layout),
        "memory": _memory(recipe, shape, layout, machine.hardware),
        "wire": _wire(recipe, shape, layout),
        "hardware": asdict(machine.hardware),
        "scaling_gpus_per_node": nodes_of,
        "scaling": [_row(recipe, shape, ranks, replace(machine, gpus_per_node=nodes_of)) for ranks in RANKS],
    }


def _layout(recipe: Recipe, shape: ModelShape, layout: Layout) -> dict[str, Any]:
    return {
        "ranks": layout.ranks,
        "gpus_per_node": layout.gpus_per_node,
        "strategy": layout.strategy,
        "ranks_per_copy": layout.sharers,
        "values_fetched_ahead": layout.live if layout.strategy == "zero3" and layout.fetched else 0,
        "micro_batches_per_step": layout.micro_batches,
        "examples_per_micro_batch": layout.work.examples,
        "tokens_per_example": layout.work.tokens,
        "answer_tokens_per_example": layout.work.answers,
        "gradient_checkpointing": recipe.backbone.gradient_checkpointing,
        "attention": "eager" if recipe.backbone.attention == "eager" else "sdpa or flash",
        "activation_formula": shape.family,
    }


def _memory(recipe: Recipe, shape: ModelShape, layout: Layout, hardware: Hardware) -> dict[str, Any]:
    memory = memory_bytes(shape, recipe, layout)
    return {
        "weights": {**asdict(memory.weights), "total": memory.weights.total},
        "weights_on_host": memory.weights_on_host,
        "host_while_loading": memory.host_while_loading,
        "chain": {**asdict(memory.chain), "total": memory.chain.total},
        "activations": asdict(memory.activations),
        "gathered": memory.gathered,
        "peak": memory.peak,
        "peak_at": memory.phase,
        "limit": round(hardware.memory_gib * GIB),
        "largest_micro_batch": largest_micro_batch(shape, recipe, layout, round(hardware.memory_gib * GIB)),
    }


def _wire(recipe: Recipe, shape: ModelShape, layout: Layout) -> dict[str, Any]:
    """Return bytes per optimizer step; `sent` is what each rank sends in a ring."""
    gathers, lora = backbone_gathers(shape, recipe, layout), lora_buffer(shape, LORA_RANK)
    ours = chain_buffer(shape)
    return {
        "chain": {"all_reduces": 1, "bytes": ours, "sent": ring_all_reduce(ours, layout.ranks)},
        "backbone": {"all_gathers": gathers.count, "bytes": gathers.size, "sent": gathers.sent},
        "lora_under_ddp": {"rank": LORA_RANK, "bytes": lora, "sent": ring_all_reduce(lora, layout.ranks)},
        "lora_over_chain": lora / ours,
    }


def _row(recipe: Recipe, shape: ModelShape, ranks: int, machine: Machine) -> dict[str, Any]:
    """Return one world's line; a shard size that cannot be there gives way to one that can."""
    parallel = with_fitting_shards(recipe.parallel, ranks, machine.gpus_per_node)
    there = recipe.model_copy(update={"parallel": parallel})
    layout = lay_out(there, ranks, machine.gpus_per_node, machine.answers)
    memory: MemoryBytes = memory_bytes(shape, there, layout)
    time = step_time(shape, there, layout, machine.hardware)
    tokens = layout.work.tokens * recipe.training.batch_size
    return {
        "ranks": ranks,
        "strategy": layout.strategy,
        "micro_batches": layout.micro_batches,
        "examples_per_micro_batch": layout.work.examples,
        "busy_ranks": min(ranks, recipe.training.batch_size),
        "weights": memory.weights.total - memory.weights_on_host,
        "peak": memory.peak,
        "compute_s": time.compute,
        "gathers_s": time.gathers,
        "chain_s": time.chain,
        "step_s": time.total,
        "tokens_per_s": tokens / time.total,
    }


def with_overrides(hardware: Hardware, tflops: float | None, gbps: float | None, memory: float | None) -> Hardware:
    """Return the hardware with rates the user knows better: 10^12/s, 10^9 bit/s of every link, GiB."""
    if tflops is not None:
        hardware = replace(hardware, tflops=tflops)
    if gbps is not None:
        hardware = replace(hardware, node_gb_per_s=gbps / 8, network_gb_per_s=gbps / 8)
    return hardware if memory is None else replace(hardware, memory_gib=memory)

"""`--table wire`: what travels once per optimizer step, the chain's one all-reduce beside LoRA's under DDP."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metatt_scale.adapter import chain_spec
from metatt_scale.benchmark.arms import LORA_RANKS, chain_recipe
from metatt_scale.benchmark.report import Report, describe_machine, describe_targets, ratio_cells
from metatt_scale.benchmark.settings import Settings, settings_of
from metatt_scale.benchmark.timing import progress, ratios, seconds_of, turns
from metatt_scale.parallel import World, join
from metatt_scale.plan.shape import read_shape
from metatt_scale.plan.wire import ring_all_reduce
from metatt_scale.recipe import Recipe
from metatt_scale.training.reduce import TAIL

_BUCKET = 25 * 2**20
"""Bytes of a bucket of DDP."""
_FP32 = 4
_NOTES = (
    "fp32 gradients. MetaTT: one all-reduce of all cores, with losses and flags in its tail. LoRA: buckets of 25 "
    "MiB, as DDP sends them.",
    "time: of the collectives alone, the slowest rank's. DDP hides a part of it behind its backward pass.",
    "sent: bytes that each rank sends in a ring.",
)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one arm sums over all ranks per optimizer step."""

    name: str
    values: int
    """fp32 values."""

    @property
    def sizes(self) -> list[int]:
        """Values of each all-reduce."""
        if not self.name.startswith("LoRA"):
            return [self.values]
        whole, rest = divmod(self.values, _BUCKET // _FP32)
        return [_BUCKET // _FP32] * whole + [rest] * (rest > 0)


def measure(recipe: Recipe, settings: Settings, device: torch.device, show: Callable[[str], None]) -> Report:
    """Time the all-reduces between the ranks of this job; no weights are loaded.

    Raises:
        ValueError: there is one rank only, or what backbone and targets refuse.
    """
    target_map = read_shape(recipe).target_map
    arms = []
    for rank in settings.ranks:
        spec = chain_spec(chain_recipe(recipe, "metatt_4d", rank).adapter, target_map, None)
        arms.append(Traffic(name=f"MetaTT-4D r={rank}", values=spec.n_parameters + TAIL))
    arms += [Traffic(name=f"LoRA r={rank}", values=target_map.lora_parameters(rank)) for rank in LORA_RANKS]
    with join(device, timedelta(minutes=recipe.parallel.timeout_minutes)) as world:
        if world.size == 1:
            raise ValueError(
                "--table wire measures between ranks, and this is one process; start it with torchrun --standalone "
                "--nproc-per-node 2 launch/benchmark.py RECIPE --table wire (over several nodes as for training)"
            )
        seconds, backend = _time(arms, settings.repeats, world, show), dist.get_backend(None)
        local = world.local_size
    rows = [_row(arm, seconds, arms[0].name, world.size) for arm in arms]
    return Report(
        table="wire",
        title=f"all-reduces of an optimizer step: {recipe.backbone.path}, {describe_targets(recipe)}; {world.size} "
        f"ranks, {local} per node, {backend}",
        machine=describe_machine(device),
        columns=("arm", "all-reduces", "bytes", "sent", "seconds", f"/ {arms[0].name}", "range"),
        cells=tuple(_cells(row) for row in rows),
        rows=tuple(rows),
        settings=settings_of("wire", settings, recipe, ranks_of_job=world.size),
        notes=_NOTES,
    )


def _time(arms: list[Traffic], repeats: int, world: World, show: Callable[[str], None]) -> dict[str, list[float]]:
    """Return the seconds of every arm in each round that counts: the longest of all ranks."""
    buffers = {arm.name: [torch.zeros(size, device=world.device) for size in arm.sizes] for arm in arms}
    own: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for number, name in turns([arm.name for arm in arms], repeats):
        show(f"{progress(number, repeats)}: {name}")
        world.sum(torch.zeros(1, device=world.device))  # all start together
        taken = seconds_of(lambda name=name: _sum_all(buffers[name], world), world.device)
        if number >= 0:
            own[name].append(taken)
    table = torch.tensor([own[arm.name] for arm in arms], dtype=torch.float64, device=world.device)
    slowest = world.gather(table).amax(0).tolist()
    return {arm.name: times for arm, times in zip(arms, slowest, strict=True)}


def _sum_all(buffers: list[Tensor], world: World) -> None:
    for buffer in buffers:
        world.sum(buffer)


def _row(arm: Traffic, seconds: dict[str, list[float]], first: str, ranks: int) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "all_reduces": len(arm.sizes),
        "bytes": _FP32 * arm.values,
        "sent_bytes": ring_all_reduce(_FP32 * arm.values, ranks),
        "seconds": seconds[arm.name],
        "time_ratio": ratios(seconds[arm.name], seconds[first])._asdict(),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["arm"],
        str(row["all_reduces"]),
        f"{row['bytes']:,}",
        f"{row['sent_bytes']:,.0f}",
        f"{statistics.median(row['seconds']):.4g}",
        *ratio_cells(row["time_ratio"]),
    )

"""`--table sweep`: rounding one chain to half its rank, beside truncating as many LoRAs one by one.

Each is timed where it runs: the chain on the CPU, where training sweeps (training/sweeping.py), with its cores on the
way from the device and back; LoRA on the device that holds its factors.

A sweep factorises d - 1 matrices of about r x r, whatever the number of modules. LoRA has one matrix per module, and
its SVD is dense (d_out x d_in), or that of an r x r core after a QR of both factors, which gives the same.

Shape legend: I input width, O output width, R rank.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metatt_scale.adapter import ChainSpec, Target, chain_spec
from metatt_scale.benchmark.arms import chain_recipe
from metatt_scale.benchmark.report import Report, cpu_name, describe_machine, describe_targets, ratio_cells
from metatt_scale.benchmark.settings import Settings, settings_of
from metatt_scale.benchmark.timing import ratios, seconds_of, take_turns
from metatt_scale.plan.shape import read_shape
from metatt_scale.recipe import Recipe
from metatt_scale.tensor import sweep


def measure(recipe: Recipe, settings: Settings, device: torch.device, show: Callable[[str], None]) -> Report:
    """Time a sweep and its counterparts at every rank; no weights are loaded.

    Raises:
        ValueError: what backbone and targets refuse.
    """
    target_map = read_shape(recipe).target_map
    targets, acts, specs = target_map.targets, {}, {}
    for rank in settings.ranks:
        spec = specs[rank] = chain_spec(chain_recipe(recipe, "metatt_4d", rank).adapter, target_map, None)
        acts[f"MetaTT-4D r={rank}"] = _sweep(_random_cores(spec, device), _half(rank))
        acts[f"LoRA r={rank}, QR first"] = _thin(targets, rank, device)
    seconds = take_turns(acts, settings.repeats, device, show)
    dense, counts = {}, Counter((target.d_in, target.d_out) for target in targets)
    for d_in, d_out in counts:
        show(f"dense SVD: {d_in} -> {d_out}")
        dense[f"{d_in} -> {d_out}"] = seconds_of(_dense(d_in, d_out, settings.ranks[0], device), device)
    whole = sum(seconds * count for seconds, count in zip(dense.values(), counts.values(), strict=True))
    rows = []
    for rank in settings.ranks:
        chain = seconds[f"MetaTT-4D r={rank}"]
        for name in (f"MetaTT-4D r={rank}", f"LoRA r={rank}, QR first"):
            rows.append(_row(name, rank, seconds[name], chain))
        extrapolated = _row(f"LoRA r={rank}, dense SVD", rank, [whole] * len(chain), chain)
        rows.append({**extrapolated, "seconds": [whole], "measured_seconds": dense})
    widths, layers, projections, outputs = specs[settings.ranks[0]].sizes
    return Report(
        table="sweep",
        title=f"truncating to half the rank: {recipe.backbone.path}, {len(targets)} modules "
        f"({describe_targets(recipe)}), chain {widths} x {layers} x {projections} x {outputs}",
        machine=describe_machine(device),
        columns=("what", "seconds", "/ sweep", "range"),
        cells=tuple(_cells(row) for row in rows),
        rows=tuple(rows),
        settings=settings_of("sweep", settings, recipe, sizes=[widths, layers, projections, outputs]),
        notes=_notes(device),
    )


def _notes(device: torch.device) -> tuple[str, ...]:
    lora = "on the same" if device.type == "cpu" else f"on {device}"
    return (
        f"MetaTT-4D in float64 on the CPU ({cpu_name()}), as training sweeps; LoRA in float32, as usual, {lora}.",
        "Every bond is cut to half its rank (to 1 at least).",
        "dense SVD: one module of every pair of widths measured once, at the first rank, and counted as often as "
        "there are such modules (its time hardly depends on the rank).",
    )


def truncate_product(b_OR: Tensor, a_RI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the best approximation of B A of this rank; the largest SVD is R x R."""
    qb_OR, rb_RR = torch.linalg.qr(b_OR)
    qa_IR, ra_RR = torch.linalg.qr(a_RI.mT)
    u, s, vh = torch.linalg.svd(rb_RR @ ra_RR.mT, full_matrices=False)
    return qb_OR @ (u[:, :rank] * s[:rank]), vh[:rank] @ qa_IR.mT


def truncate_dense(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the best approximation of a dense matrix of this rank."""
    u, s, vh = torch.linalg.svd(w_OI, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def _half(rank: int) -> int:
    return max(1, rank // 2)


def _random_cores(spec: ChainSpec, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in spec.shapes]


def _sweep(cores: list[Tensor], rank: int) -> Callable[[], list[Tensor]]:
    """Round a chain as training does, with all that moves."""

    def act() -> list[Tensor]:
        swept = sweep([core.to("cpu", torch.float64) for core in cores], max_ranks=rank)
        return [new.to(old) for new, old in zip(swept.cores, cores, strict=True)]

    return act


def _pair(d_in: int, d_out: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    b_OR, a_RI = (torch.randn(shape, generator=generator) for shape in ((d_out, rank), (rank, d_in)))
    return b_OR.to(device), a_RI.to(device)


def _thin(targets: tuple[Target, ...], rank: int, device: torch.device) -> Callable[[], object]:
    """Truncate every module's LoRA; those of equal widths share their numbers, which time does not depend on."""
    sizes = [(target.d_in, target.d_out) for target in targets]
    pairs = {size: _pair(*size, rank, device) for size in set(sizes)}

    def act() -> None:
        for size in sizes:
            truncate_product(*pairs[size], _half(rank))

    return act


def _dense(d_in: int, d_out: int, rank: int, device: torch.device) -> Callable[[], object]:
    b_OR, a_RI = _pair(d_in, d_out, rank, device)
    return lambda: truncate_dense(b_OR @ a_RI, _half(rank))


def _row(name: str, rank: int, seconds: list[float], sweep: list[float]) -> dict[str, Any]:
    return {"arm": name, "rank": rank, "seconds": seconds, "time_ratio": ratios(seconds, sweep)._asdict()}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return row["arm"], f"{statistics.median(row['seconds']):.4g}", *ratio_cells(row["time_ratio"])

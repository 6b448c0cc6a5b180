"""`--table steps`: time and peak memory of a training step, adapter by adapter, beside the frozen model's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from metatt_scale.backbone import check_positions, load_backbone
from metatt_scale.benchmark.arms import FROZEN, TASKS, Arm, Build, Work, builders, random_batch, twin
from metatt_scale.benchmark.memory import peak_bytes
from metatt_scale.benchmark.report import (
    Report,
    describe_backbone,
    describe_machine,
    describe_targets,
    ratio_cells,
)
from metatt_scale.benchmark.settings import Settings, settings_of
from metatt_scale.benchmark.timing import ratios, take_turns
from metatt_scale.methods.peft_methods import import_peft
from metatt_scale.recipe import Recipe
from metatt_scale.training.checks import check_causal
from metatt_scale.training.start import try_head

_MIB = 2**20
_NOTES = (
    f"MetaTT-(4+1)D: {TASKS} tasks, the examples of a padded batch taking turns (packed rows cost more).",
    "frozen: forward, and backward to the first decoder layer's input. Loss on the last eighth of each example.",
    "time: everything of a step but the optimizer's own update, for all alike; MetaTT's folding and pulling back "
    "are in it. PEFT's adapters are in fp32, its default, unless their name says otherwise.",
    "memory: the most bytes held during a step beyond the frozen weights (trained values, gradients, activations; no "
    "optimizer state), from a pass that is not timed.",
)


def measure(recipe: Recipe, settings: Settings, device: torch.device, show: Callable[[str], None]) -> Report:
    """Time a step of every arm, in turns, on one frozen backbone.

    Raises:
        ValueError: PEFT is not installed, a model that cannot be trained on such examples, or what backbone and
            targets refuse.
    """
    import_peft()
    show("loading the backbone")
    model = load_backbone(recipe.backbone, device, recipe.seed).train()
    check_room(model, settings)
    try_head(model, device)  # as training does; all arms have it
    work = Work(recipe=recipe, batch=random_batch(model, settings.examples, settings.length), device=device)
    arms = build_arms(model, work, builders(recipe, settings.ranks), show)
    rows = measure_arms(arms, settings.repeats, device, show)
    return Report(
        table="steps",
        title=f"a training step of {settings.examples} x {settings.length} tokens: {describe_backbone(recipe)}; "
        f"adapted: {describe_targets(recipe)}",
        machine=describe_machine(device),
        columns=("arm", "trained", "seconds", "/ frozen", "range", "MiB", "MiB / frozen", "MiB over"),
        cells=tuple(_cells(row) for row in rows),
        rows=tuple(rows),
        settings=settings_of("steps", settings, recipe),
        notes=_NOTES,
    )


def build_arms(
    model: PreTrainedModel, work: Work, build: Mapping[str, Build], show: Callable[[str], None]
) -> dict[str, Arm]:
    """Put every arm on a module tree of its own over the model's tensors."""
    arms = {}
    for name, make in build.items():
        show(f"adapting: {name}")
        arms[name] = make(name, twin(model), work)
    return arms


def measure_arms(
    arms: Mapping[str, Arm], repeats: int, device: torch.device, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time the steps of arms, the frozen model among them, in turns, then take each one's memory; a row for each.

    Times are in seconds, memory in bytes beyond the frozen weights.
    """
    seconds = take_turns({name: arm.step for name, arm in arms.items()}, repeats, device, show)
    peaks = {}
    for name, arm in arms.items():
        show(f"memory: {name}")
        peaks[name] = arm.own_bytes + peak_bytes(arm.step, device)
    return [_row(arm, seconds, peaks) for arm in arms.values()]


def check_room(model: PreTrainedModel, settings: Settings) -> None:
    """Refuse an encoder, and examples longer than the positions that a model has learned, as training does.

    Raises:
        ValueError: it is one of these.
    """
    check_causal(model)
    check_positions(model, settings.length, f"--length is {settings.length}", "set --length to {positions} or less")


def _row(arm: Arm, seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "trained": arm.trained,
        "seconds": seconds[arm.name],
        "time_ratio": ratios(seconds[arm.name], seconds[FROZEN])._asdict(),
        "peak_bytes": peaks[arm.name],
        "own_bytes": arm.own_bytes,
        "memory_ratio": peaks[arm.name] / peaks[FROZEN],
        "bytes_over_frozen": peaks[arm.name] - peaks[FROZEN],
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["arm"],
        f"{row['trained']:,}",
        f"{statistics.median(row['seconds']):.4g}",
        *ratio_cells(row["time_ratio"]),
        f"{row['peak_bytes'] / _MIB:,.1f}",
        f"{row['memory_ratio']:.3f}",
        f"{row['bytes_over_frozen'] / _MIB:+,.1f}",
    )

"""`--table end_to_end`: tokens per second on real records, whole training loops side by side."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metatt_scale.backbone import load_backbone, load_tokenizer, pick_device
from metatt_scale.benchmark.arms import LORA_RANKS, twin
from metatt_scale.benchmark.report import Report, describe_backbone, describe_machine, describe_targets, ratio_cells
from metatt_scale.benchmark.settings import Settings
from metatt_scale.benchmark.timing import progress, ratios, seconds_of, turns
from metatt_scale.benchmark.trainers import Contestant, Job, has_trl, ours, peft_trainer, trl_trainer
from metatt_scale.benchmark.turns import LoopInTurns
from metatt_scale.data import prepare
from metatt_scale.recipe import Recipe
from metatt_scale.training.checks import check_trainable

_RANK = LORA_RANKS[0]
_WARM_UP_BLOCKS = 1
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")


def measure(recipe: Recipe, settings: Settings, show: Callable[[str], None]) -> Report:
    """Let training loops take turns on one frozen backbone, so many optimizer steps each, on the same records.

    Raises:
        ValueError: PEFT is not installed, or what backbone, targets and records refuse.
    """
    recipe = adjusted(recipe, settings)
    device, tokenizer = pick_device(), load_tokenizer(recipe.backbone)
    show("tokenising")
    data = prepare(recipe.data, tokenizer, recipe.seed)  # type: ignore[arg-type]
    show("loading the backbone")
    model = load_backbone(recipe.backbone, device, recipe.seed)
    check_trainable(model, data)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            recipe=recipe,
            data=data,
            tokenizer=tokenizer,
            device=device,
            block_steps=settings.block_steps,
            folder=Path(folder),
        )
        contestants = [ours(twin(model), job), peft_trainer(twin(model), job, _RANK)]
        if has_trl():
            contestants.append(trl_trainer(twin(model), job, _RANK))
        seconds = _run(contestants, settings.repeats, job, show)
    first = _WARM_UP_BLOCKS * settings.block_steps
    starts = [first + block * settings.block_steps for block in range(settings.repeats)]
    rows = []
    for contestant in contestants:
        tokens = [contestant.tokens(start, start + settings.block_steps) for start in starts]
        rows.append({"arm": contestant.name, "trained": contestant.trained, "tokens": tokens})
        rows[-1]["seconds"] = seconds[contestant.name]
        rows[-1]["tokens_per_second"] = [n / s for n, s in zip(tokens, seconds[contestant.name], strict=True)]
    for row in rows:
        row["rate_ratio"] = ratios(row["tokens_per_second"], rows[1]["tokens_per_second"])._asdict()
    return Report(
        table="end_to_end",
        title=f"training on {', '.join(source.path for source in recipe.data.train)}: {describe_backbone(recipe)}; "
        f"adapted: {describe_targets(recipe)}; {recipe.training.batch_size} examples a step",
        machine=describe_machine(device, _PACKAGES),
        columns=("loop", "trained", "tokens/s", "/ Trainer", "range"),
        cells=tuple(_cells(row) for row in rows),
        rows=tuple(rows),
        settings={**asdict(settings), "recipe": recipe.model_dump(mode="json"), "records": data.digest},
        notes=_notes(settings),
    )


def adjusted(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with the loss on answers only, as many steps as are measured, and no other work between."""
    steps = (_WARM_UP_BLOCKS + settings.repeats) * settings.block_steps
    training = {"max_steps": steps, "eval_every": "never", "save_every": "never", "keep": "last"}
    training["early_stopping_patience"] = None
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"train_on_inputs": False}),
            "training": recipe.training.model_copy(update=training),
            "logging": recipe.logging.model_copy(update={"trackers": ()}),
        }
    )


def _run(
    contestants: list[Contestant], repeats: int, job: Job, show: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the seconds of every loop's blocks that count."""
    loops = {contestant.name: LoopInTurns(contestant.loop, job.device) for contestant in contestants}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number, name in turns(list(loops), repeats, _WARM_UP_BLOCKS):
        show(f"{progress(number, repeats)}: {name}")
        taken = seconds_of(loops[name].advance, job.device)
        if number >= 0:
            seconds[name].append(taken)
    for loop in loops.values():
        loop.close()
    return seconds


def _notes(settings: Settings) -> tuple[str, ...]:
    absent = () if has_trl() else ("TRL is not installed, so its SFTTrainer is left out (`pip install trl`).",)
    return (
        f"real tokens per second of the training loop, optimizer included, in turns of {settings.block_steps} steps; "
        "checkpoints and evaluation are off, loss on answers only (data.train_on_inputs: false).",
        "Trainer: the same tokenised records, batches grouped by length and padded to their longest, mixed precision "
        "as backbone.dtype says.",
        *absent,
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    rate = statistics.median(row["tokens_per_second"])
    return row["arm"], f"{row['trained']:,}", f"{rate:,.1f}", *ratio_cells(row["rate_ratio"])

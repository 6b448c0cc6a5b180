"""`--table end_to_end`: tokens per second on real records, whole training loops side by side."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metatt_scale.backbone import load_backbone, load_tokenizer
from metatt_scale.benchmark.arms import LORA_RANKS
from metatt_scale.benchmark.report import Report, describe_backbone, describe_machine, describe_targets, ratio_cells
from metatt_scale.benchmark.settings import Settings, settings_of
from metatt_scale.benchmark.timing import progress, ratios, seconds_of, turns
from metatt_scale.benchmark.trainers import Job, has_trl, ours, peft_trainer, trl_trainer
from metatt_scale.benchmark.turns import LoopInTurns, Pause
from metatt_scale.data import prepare
from metatt_scale.methods.peft_methods import import_peft
from metatt_scale.recipe import Recipe
from metatt_scale.training.checks import check_trainable

_RANK = LORA_RANKS[0]
_WARM_UP_BLOCKS = 1
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")


def measure(recipe: Recipe, settings: Settings, device: torch.device, show: Callable[[str], None]) -> Report:
    """Let training loops take turns, so many optimizer steps each, on the same records and backbone.

    Raises:
        ValueError: PEFT is not installed, or what backbone, targets and records refuse.
    """
    import_peft()
    recipe = adjusted(recipe, settings)
    show("tokenising")
    data = prepare(recipe.data, load_tokenizer(recipe.backbone), recipe.seed)  # type: ignore[arg-type]
    names = ["ours", "trainer", *(["trl"] if has_trl() else [])]
    rows = _run(names, recipe, settings, device, show)
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
        settings=settings_of("end_to_end", settings, recipe, records=data.digest),
        notes=_notes(settings),
    )


def adjusted(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with the loss on answers only, as many steps as are measured, and no other work between.

    Sweeps are other work too, and after them the chain would have other ranks than the row's name says.
    """
    steps = (_WARM_UP_BLOCKS + settings.repeats) * settings.block_steps
    training = {"max_steps": steps, "eval_every": "never", "save_every": "never", "keep": "last"}
    training["early_stopping_patience"] = None
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"train_on_inputs": False}),
            "training": recipe.training.model_copy(update=training),
            "logging": recipe.logging.model_copy(update={"trackers": ()}),
            "sweep": None,
        }
    )


def _run(
    names: list[str], recipe: Recipe, settings: Settings, device: torch.device, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Let the loops take turns; return a row for each, with the seconds and tokens of its blocks that count."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    loops, there = {}, device if device.type == "cpu" else torch.device(device.type, 0)  # a loop sees one GPU
    for name in names:
        show(f"starting {name}")
        loops[name] = LoopInTurns(contend, name, recipe, there, settings.block_steps)
    host = torch.device("cpu")  # each loop waits for its own device before it pauses
    for number, name in turns(names, settings.repeats, _WARM_UP_BLOCKS):
        show(f"{progress(number, settings.repeats)}: {name}")
        taken = seconds_of(loops[name].advance, host)
        if number >= 0:
            seconds[name].append(taken)
    rows = []
    for name, loop in loops.items():
        tokens = loop.close()[_WARM_UP_BLOCKS : _WARM_UP_BLOCKS + settings.repeats]
        rates = [n / s for n, s in zip(tokens, seconds[name], strict=True)]
        rows.append({**loop.facts, "tokens": tokens, "seconds": seconds[name], "tokens_per_second": rates})
    return rows


def contend(
    ready: Callable[[dict[str, Any]], None], pause: Pause, name: str, recipe: Recipe, device: torch.device, block: int
) -> list[int]:
    """Be one loop, in a process of its own; return the real tokens of each of its blocks of steps."""
    tokenizer = load_tokenizer(recipe.backbone)
    data = prepare(recipe.data, tokenizer, recipe.seed)  # type: ignore[arg-type]
    model = load_backbone(recipe.backbone, device, recipe.seed)
    check_trainable(model, data)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            recipe=recipe, data=data, tokenizer=tokenizer, device=device, block_steps=block, folder=Path(folder)
        )
        match name:
            case "ours":
                contestant = ours(model, job)
            case "trainer":
                contestant = peft_trainer(model, job, _RANK)
            case _:
                contestant = trl_trainer(model, job, _RANK)

        def wait() -> bool:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return pause()

        ready({"arm": contestant.name, "trained": contestant.trained})
        contestant.loop(wait)
        assert recipe.training.max_steps is not None
        return [contestant.tokens(start, start + block) for start in range(0, recipe.training.max_steps, block)]


def _notes(settings: Settings) -> tuple[str, ...]:
    absent = () if has_trl() else ("TRL is not installed, so its SFTTrainer is left out (`pip install trl`).",)
    return (
        f"real tokens per second of the training loop, optimizer included, in turns of {settings.block_steps} steps; "
        "checkpoints, evaluation and sweeps are off, loss on answers only (data.train_on_inputs: false).",
        "Trainer: the same tokenised records, batches grouped by length and padded to their longest, mixed precision "
        "as backbone.dtype says.",
        *absent,
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    rate = statistics.median(row["tokens_per_second"])
    return row["arm"], f"{row['trained']:,}", f"{rate:,.1f}", *ratio_cells(row["rate_ratio"])

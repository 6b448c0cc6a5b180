"""From a recipe to a trained adapter in its run directory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metatt_scale import __version__
from metatt_scale.adapter import ChainAdapter, inject, save_adapter
from metatt_scale.backbone import identity, load_backbone, load_tokenizer, pick_device
from metatt_scale.data import prepare
from metatt_scale.files import new_folder, write_text
from metatt_scale.recipe import Recipe, dump_recipe
from metatt_scale.training import checkpoint
from metatt_scale.training.checks import (
    check_launch,
    check_result,
    check_resume,
    check_trainable,
    check_writable,
    only_run,
)
from metatt_scale.training.loop import Trainer
from metatt_scale.training.metrics import check_trackers


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What `train` leaves in memory beside the files in the run directory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: ChainAdapter
    folder: Path


def train(recipe: Recipe, console: Console) -> TrainedRun:
    """Run a recipe: load, adapt, train (or go on where a killed run stopped), write `adapter/`.

    Raises:
        ValueError: anything the user can mend, in one message.
        TrainingStopped: a signal arrived and the state is saved.
    """
    folder = Path(recipe.output_dir).expanduser()
    check_launch()
    check_writable(folder)
    check_trackers(recipe)
    with only_run(folder):
        check_resume(folder, recipe)
        trainer, tokenizer = _assemble(recipe, folder, console)
        _resume(trainer, console)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        trainer.train()
        if recipe.training.keep == "best" and trainer.best_cores:
            trainer.adapter.set_cores(trainer.best_cores)
        check_result(trainer.adapter, trainer.progress)
        with new_folder(folder / "adapter", replace=True) as temporary:
            save_adapter(temporary, trainer.adapter, describe(recipe, trainer))
    console.print(f"adapter: {folder / 'adapter'}", highlight=False, soft_wrap=True)
    return TrainedRun(model=trainer.model, tokenizer=tokenizer, adapter=trainer.adapter, folder=folder)


def _assemble(recipe: Recipe, folder: Path, console: Console) -> tuple[Trainer, PreTrainedTokenizerBase]:
    """Load tokenizer, data and backbone, put the chain behind the backbone, and build the trainer."""
    device = pick_device()
    tokenizer = load_tokenizer(recipe.backbone)
    with console.status("tokenising") as status:

        def show(done: int, total: int) -> None:
            status.update(f"tokenising {done:,} of {total:,} records")

        data = prepare(recipe.data, tokenizer, recipe.seed, show)  # type: ignore[arg-type]
    _report_data(data.counts, console)
    with console.status("loading the backbone"):
        model = load_backbone(recipe.backbone, device, recipe.seed)
    check_trainable(model, data)
    adapter = inject(model, recipe.adapter, recipe.seed)
    _report_adapter(adapter, console)
    trainer = Trainer(
        recipe=recipe,
        model=model,
        adapter=adapter,
        data=data,
        inputs=hashlib.sha256(f"{data.digest} {identity(recipe.backbone)}".encode()).hexdigest(),
        pad_token_id=_pad_id(tokenizer),
        device=device,
        folder=folder,
        console=console,
    )
    return trainer, tokenizer


def _resume(trainer: Trainer, console: Console) -> None:
    """Continue from the newest valid checkpoint where there is one and the recipe allows it."""
    recipe, root = trainer.recipe, trainer.folder / "checkpoints"
    path, snapshot, damaged = checkpoint.newest_valid(root, recipe, trainer.adapter.spec.shapes)
    for message in damaged:
        console.print(f"passed over a damaged checkpoint: {message}", style="yellow", highlight=False, soft_wrap=True)
    if snapshot is None:
        if damaged:
            raise ValueError(
                f"{root}: none of the {len(damaged)} checkpoints is whole ({damaged[0]}); nothing was changed. "
                "Choose another output_dir to start afresh"
            )
        return
    if snapshot.inputs != trainer.inputs:
        raise ValueError(
            f"{path}: the records or the backbone's weights are not those it was made with, though the recipe is; "
            "use another output_dir, or bring them back"
        )
    here = (1, torch.get_num_threads())
    if (snapshot.world_size, snapshot.threads) != here:
        message = (
            f"{path}: written with {snapshot.world_size} rank(s) of {snapshot.threads} thread(s), this run has "
            f"{here[0]} of {here[1]}; the result will agree only to rounding"
        )
        if recipe.training.resume == "exact":
            raise ValueError(f"{message} (training.resume is exact: set OMP_NUM_THREADS={snapshot.threads})")
        console.print(message, style="yellow", highlight=False, soft_wrap=True)
    checkpoint.restore(snapshot, trainer.adapter, trainer.optimizer)
    trainer.progress = snapshot.progress
    trainer.best_cores = [core.to(trainer.device) for core in snapshot.best_cores]
    console.print(f"resuming after step {snapshot.progress.step} from {path}", highlight=False, soft_wrap=True)


def describe(recipe: Recipe, trainer: Trainer) -> dict[str, Any]:
    """Return what the adapter folder says about its origin."""
    progress = trainer.progress
    best = recipe.training.keep == "best" and progress.best_step is not None
    return {
        "base_model": recipe.backbone.path,
        "kind": recipe.adapter.kind,
        "step": progress.best_step if best else progress.step,
        "best_loss": progress.best_loss,
        "target_tokens": progress.target_tokens,
        "records": [source.path for source in recipe.data.train],
        "recipe": recipe.model_dump(mode="json"),
        "metatt_scale": __version__,
    }


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) else 0  # right padding is never attended to, any id serves


def _report_data(counts: dict[str, Any], console: Console) -> None:
    for source in (*counts["train"], *counts["validation"]):
        bad = f", {source['skipped']} bad records skipped" if source.get("skipped") else ""
        cut = f", {source['truncated']} cut at the cutoff length" if source.get("truncated") else ""
        cut += f", {source['dropped']} without an answer dropped" if source.get("dropped") else ""
        text = f"data: {source['path']}: {source['examples']} examples{bad}{cut}"
        console.print(text, highlight=False, soft_wrap=True)


def _report_adapter(adapter: ChainAdapter, console: Console) -> None:
    spec = adapter.spec
    sizes = " x ".join(f"{mode} {size}" for mode, size in zip(spec.modes, spec.sizes, strict=True))
    console.print(
        f"training {spec.n_parameters:,} parameters (chain {sizes}; ranks {', '.join(map(str, spec.ranks))}) behind "
        f"{len(adapter.targets)} frozen linears; LoRA r=8 on the same would train "
        f"{adapter.target_map.lora_parameters(8):,}",
        highlight=False,
        soft_wrap=True,
    )

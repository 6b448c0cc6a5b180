"""What is refused before the long work starts, and not after it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from metatt_scale.adapter import Adapter
from metatt_scale.backbone import check_positions, check_tokens
from metatt_scale.data import PreparedData
from metatt_scale.ending import DivergedError
from metatt_scale.methods import check_start
from metatt_scale.recipe import Recipe
from metatt_scale.training.checkpoint import RunState, list_checkpoints
from metatt_scale.training.sweep_plan import plan_sweeps

RECIPE_FILE, METRICS_FILE = "recipe.yaml", "metrics.jsonl"
RECIPE_HEAD = "# The settings of the run in this folder, written by `metatt-scale train`\n"


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder whose files this run would replace without going on from them.

    What a run leaves before its first checkpoint is no loss: the same recipe gives it again.
    """
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        _check_no_loss(folder)
        check_start(recipe)
    if recipe.training.resume == "never" and found:
        raise ValueError(
            f"{folder / 'checkpoints'} holds checkpoints ({found[-1].name}) and training.resume is never; choose "
            "another output_dir, remove the folder, or set training.resume: auto"
        )


def _check_no_loss(folder: Path) -> None:
    """Refuse results whose checkpoints are gone, and files that no run has written."""
    remedy = "choose another output_dir, or move it away; nothing was changed"
    for name in ("adapter", "results.json", "exports"):
        if (folder / name).exists():
            raise ValueError(f"{folder} holds {name}, but no checkpoint that this run could go on from; {remedy}")
    settings = folder / RECIPE_FILE
    if settings.exists() and not settings.read_bytes().startswith(RECIPE_HEAD.encode()):
        raise ValueError(f"{settings} is not of a run's making, and would be replaced; {remedy}")
    if (folder / METRICS_FILE).exists() and not settings.exists():
        raise ValueError(f"{folder / METRICS_FILE} belongs to no run ({RECIPE_FILE} is missing); {remedy}")


def check_length(recipe: Recipe, data: PreparedData) -> None:
    """Refuse a run that ends before its ranks have changed as asked; known before anything large is loaded."""
    per_epoch = data.train.steps_per_epoch(recipe.training.batch_size)
    total = recipe.training.steps(per_epoch)
    plan_sweeps(recipe, per_epoch, total)
    if recipe.adapter.kind == "adalora":
        recipe.adapter.adalora.check_length(total)


def check_scores(recipe: Recipe, data: PreparedData) -> None:
    """Refuse to choose by a correlation of fewer than two numbers, which is none."""
    if recipe.training.best_by != "metric" or data.validation is None:
        return
    table, indices = data.validation
    for place, (task, labels) in enumerate(recipe.label_sets.items()):
        count = len(indices) if table.tasks is None else int((table.tasks[indices] == place).sum())
        if labels.is_regression and count < 2:
            whose = f"task {task!r} has" if task else "there is"
            raise ValueError(
                f"training.best_by is metric, but {whose} {count} validation record, which has no correlation; "
                "give at least two, or choose by loss"
            )


def check_result(adapter: Adapter, progress: RunState, *, is_best: bool = False) -> None:
    """Refuse to hand over an adapter that learned nothing or is not finite.

    Args:
        adapter: at the end of a run.
        progress: of that run.
        is_best: its values are those of the best evaluation, and not the last ones.

    Raises:
        DivergedError: values, or the last evaluation of them, are not finite.
        ValueError: it adds nothing to the model, or has the values that it started from.
    """
    if progress.target_tokens == 0:
        raise DivergedError(
            f"all {progress.step} steps were skipped because loss or gradient was not finite; lower "
            "training.learning_rate or adapter.alpha and use another output_dir"
        )
    if (name := not_finite(adapter)) is not None:
        raise DivergedError(
            f"training ended with parameters that are not finite ({name}); lower training.learning_rate or "
            "training.weight_decay and use another output_dir"
        )
    if not (is_best or progress.last_evaluation_finite):
        best = (
            "" if progress.best_step is None else f" (training.keep: best would take those of {progress.best_step})"
        )
        raise DivergedError(
            f"the loss of the last evaluation, after step {progress.step}, is not finite, so its values are not "
            f"handed over{best}; lower training.learning_rate or adapter.alpha and use another output_dir"
        )
    if adapter.is_zero() or values_digest(adapter) == progress.start_values:
        raise ValueError(
            f"after {progress.step} steps the adapter "
            f"{'adds nothing to the model' if adapter.is_zero() else 'has the values it started from'}: nothing was "
            "learned; raise training.learning_rate, train for more steps, and use another output_dir"
        )


def not_finite(adapter: Adapter) -> str | None:
    """Return the name of a trained parameter that holds NaN or infinity; None where all are finite."""
    trained = adapter.trained()
    finite = torch.stack([torch.isfinite(value).all() for value in trained.values()]).tolist()  # waits only once
    return next((name for name, is_finite in zip(trained, finite, strict=True) if not is_finite), None)


@torch.no_grad()
def values_digest(adapter: Adapter) -> str:
    """Return a hash of what the adapter trains, of its head only where it trains nothing else."""
    digest = hashlib.sha256()
    for name, value in (adapter.own() or adapter.trained()).items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def why_not_finite(progress: RunState, folder: Path, what: str) -> DivergedError:
    """Return what is to be said where values of the adapter are not finite any more."""
    found = list_checkpoints(folder / "checkpoints")
    where = f"the last good values are in {found[-1]}" if found else "no checkpoint was written before"
    return DivergedError(
        f"stopped at step {progress.step}: {what}; {where}; lower training.learning_rate, training.weight_decay or "
        "adapter.alpha, or raise training.eps"
    )


def why_hopeless(progress: RunState, folder: Path) -> DivergedError:
    """Return what is to be said where no step succeeds any more."""
    return DivergedError(
        f"stopped at step {progress.step}: loss or gradient was not finite {progress.skipped_in_a_row} times in a "
        f"row (training.max_nonfinite_steps); the last good values are in {folder}/checkpoints; lower "
        "training.learning_rate or adapter.alpha, or look at the records of these steps"
    )


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the run directory, so that two runs never write into it at once; a killed run lets go by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder}: another run is writing there; wait for it, or choose another output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()
        if os.listdir(folder) == [".lock"]:  # refused before it wrote anything: leave no trace
            (folder / ".lock").unlink()
            folder.rmdir()


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made, before the long work and not after it."""
    for wanted in (folder / "checkpoints", folder / "adapter"):
        there = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "is a folder that may not be written to" if there.is_dir() else "is a file"
            raise ValueError(f"output_dir {str(folder)!r}: {there} {why}; choose another output_dir")


def check_trainable(model: PreTrainedModel, data: PreparedData) -> None:
    """Refuse a model that is not causal (unless it is a classifier), and records it has no embeddings for."""
    if not data.table.labelled:
        check_causal(model)
    tables = [data.table] if data.validation is None else [data.table, data.validation.table]
    check_tokens(model, max(int(table.tokens.max()) for table in tables))
    longest = max(int(table.lengths.max()) for table in tables)
    remedy = "set data.cutoff_length to {positions} or less"
    check_positions(model, longest, f"the longest record has {longest} tokens", remedy)


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose loss is not that of predicting the next token."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"backbone.path: {type(model).__name__} is not a causal language model that this toolkit can train (an "
            "encoder needs a `classifier`)"
        )

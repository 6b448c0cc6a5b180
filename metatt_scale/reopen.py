"""A finished run, or an adapter folder, back in memory on its backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metatt_scale.adapter import Adapter, adapter_folder, read_description
from metatt_scale.backbone import Engine, check_unchanged, identity, is_other, load_backbone, load_tokenizer
from metatt_scale.methods import reload_adapter
from metatt_scale.recipe import Recipe, validate
from metatt_scale.training import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """A model with its adapter attached, and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter
    recipe: Recipe
    description: dict[str, Any]
    folder: Path
    """The adapter folder."""
    weights: str
    """Identity of the backbone's weights, as they were loaded."""

    @classmethod
    def of_run(cls, run: TrainedRun, recipe: Recipe) -> Reopened:
        """Return the run that has just been trained, without loading anything again."""
        folder = adapter_folder(run.folder)
        return cls(
            model=run.model,
            tokenizer=run.tokenizer,
            adapter=run.adapter,
            recipe=recipe,
            description=read_description(folder),
            folder=folder,
            weights=run.weights,
        )

    @property
    def run(self) -> Path:
        """The run directory (the adapter folder itself where it stands alone)."""
        return run_folder(self.folder)


def run_folder(folder: Path) -> Path:
    """Return the run directory an adapter folder belongs to."""
    return folder.parent if folder.name == "adapter" and (folder.parent / "recipe.yaml").exists() else folder


def read_recipe(folder: Path, backbone: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Recipe]:
    """Return an adapter's description and its recipe, with the given keys of its `backbone` section replaced.

    An adapter may come from anyone, so its own word for `trust_remote_code` does not count.
    """
    description = read_description(folder)
    data = validate(description["recipe"], f"{folder}/metatt.json").model_dump(mode="json")
    data["backbone"] |= {"trust_remote_code": False, **(backbone or {})}
    return description, validate(data, f"{folder}/metatt.json with {dict(backbone or {})}")


def task_index(recipe: Recipe, name: str | None) -> int | None:
    """Return the place of a task in the recipe's `tasks`; None where no name is given.

    Raises:
        ValueError: the recipe has no task of this name.
    """
    if name is None:
        return None
    if name not in recipe.tasks:
        known = f"its tasks are {', '.join(recipe.tasks)}" if recipe.tasks else "it was trained without `tasks`"
        raise ValueError(f"--task is {name}, which the run does not know; {known}")
    return list(recipe.tasks).index(name)


def fingerprint(recipe: Recipe, weights: str, adapter_sha256: str | None, task: int | None = None) -> str:
    """Return a hash of everything that decides the outputs of a backbone, with or without an adapter.

    Args:
        recipe: the run's.
        weights: identity of the backbone's weights.
        adapter_sha256: hash of the adapter's; None of the frozen backbone.
        task: place of the task whose weights are meant.
    """
    decides: dict[str, Any] = {"backbone": recipe.backbone.model_dump(mode="json"), "seed": recipe.seed}
    for key in ("path", "gradient_checkpointing", "trust_remote_code"):
        decides["backbone"].pop(key)
    decides |= {"weights": weights, "adapter": adapter_sha256}
    if task is not None:
        decides["task"] = task
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def reopen(
    path: str | Path,
    console: Console,
    device: torch.device,
    backbone: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
) -> Reopened:
    """Load backbone, tokenizer and adapter of a run.

    Args:
        path: run directory or adapter folder.
        console: where the wait is shown.
        device: where this process computes.
        backbone: keys of the recipe's `backbone` section to replace, for example its `path` on this machine.
        engine: what shards the backbone over the ranks; this process holds all of it when absent.
    """
    folder = adapter_folder(path)
    description, recipe = read_recipe(folder, backbone)
    weights = identity(recipe.backbone, lambda text: console.print(text, highlight=False, soft_wrap=True))
    with console.status(f"loading {escape(recipe.backbone.path)}"):
        tokenizer = load_tokenizer(recipe.backbone)
        model = load_backbone(recipe.backbone, device, recipe.seed, engine, recipe.head_outputs)
    check_unchanged(recipe.backbone, weights)
    adapter = reload_adapter(folder, model, recipe, device)
    known = description.get("base_model_weights")
    if isinstance(known, str) and is_other(recipe.backbone, known):
        text = f"{recipe.backbone.path} has other weights than the model this adapter was trained on, {known}"
        console.print(text, style="yellow", highlight=False, soft_wrap=True)
    return Reopened(
        model=model,
        tokenizer=tokenizer,
        adapter=adapter,
        recipe=recipe,
        description=description,
        folder=folder,
        weights=weights,
    )

"""Sequential learning: the chain, and the head it was trained under, of another run as the start of this one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from metatt_scale.adapter import (
    ChainAdapter,
    adapter_folder,
    grown_cores,
    read_adapter,
    read_description,
    read_head,
    trained_head,
)
from metatt_scale.backbone import head_tensors, last_linear
from metatt_scale.recipe import INNER_BONDS, Recipe, label_rows, validate


def known_tasks(recipe: Recipe) -> tuple[str, ...]:
    """Return the tasks of the run that a recipe goes on from; () where it goes on from none, or that had none."""
    if recipe.adapter.start_from is None:
        return ()
    return tuple(_recipe_of(adapter_folder(recipe.adapter.start_from)).tasks)


def go_on(model: PreTrainedModel, recipe: Recipe, adapter: ChainAdapter) -> str | None:
    """Give a new chain, and a classifier's head, the values of `adapter.start_from`.

    Returns:
        The identity of the weights that it was trained on, where it knows that.

    Raises:
        ValueError: no such adapter, or one of another form.
    """
    with _naming(recipe):
        folder, before = _before(recipe)
        old = read_adapter(folder)
        if old.targets != adapter.targets:
            raise ValueError("it stands behind other modules; take its `adapter.target_modules` and backbone")
        cores = grown_cores(old.spec, list(old.cores), list(before.tasks), adapter.spec, list(recipe.tasks))
        adapter.set_cores([core.detach().to(place) for core, place in zip(cores, adapter.cores, strict=True)])
        if recipe.classifier is not None:
            _take_head(model, recipe, adapter, _head_of(folder), before)
        return read_description(folder).get("base_model_weights")


def check_start(recipe: Recipe) -> None:
    """Refuse a start from another run as far as the two recipes tell, which takes no time.

    Raises:
        ValueError: there is no such adapter, or it is of another form.
    """
    if recipe.adapter.start_from is not None:
        with _naming(recipe):
            _before(recipe)


def _before(recipe: Recipe) -> tuple[Path, Recipe]:
    """Return the folder of the adapter that a recipe goes on with, and its recipe."""
    assert recipe.adapter.start_from is not None
    folder = adapter_folder(recipe.adapter.start_from)
    before = _recipe_of(folder)
    if before.adapter.kind not in INNER_BONDS:
        raise ValueError(f"it is of kind {before.adapter.kind}; a run goes on from {', '.join(INNER_BONDS)}")
    if recipe.classifier is not None and bool(before.tasks) != bool(recipe.tasks):
        raise ValueError(
            "one of the two runs has `tasks` and the other does not, so the labels of its head cannot be matched; "
            "give both `tasks`, even if there is only one"
        )
    if before.adapter.alpha != recipe.adapter.alpha:
        raise ValueError(f"its alpha is {before.adapter.alpha}, this recipe's {recipe.adapter.alpha}; take the same")
    return folder, before


@contextlib.contextmanager
def _naming(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"adapter.start_from {recipe.adapter.start_from!r}: {error}") from None


def _recipe_of(folder: Path) -> Recipe:
    return validate(read_description(folder)["recipe"], f"{folder}/metatt.json")


def _head_of(folder: Path) -> Mapping[str, Tensor]:
    trained = trained_head(folder)
    head = trained.named("") if trained is not None else read_head(folder)
    if head is None:
        raise ValueError("it is no classifier's")
    return head


@torch.no_grad()
def _take_head(
    model: PreTrainedModel, recipe: Recipe, adapter: ChainAdapter, old: Mapping[str, Tensor], before: Recipe
) -> None:
    """Copy what the old head has for the tasks of both runs; a new task keeps the start of its rows."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    own = head_tensors(model) if adapter.head is None else adapter.head.named("")
    ours, theirs, last = label_rows(recipe.label_sets), label_rows(before.label_sets), last_linear(old)
    _check_head({name: tuple(value.shape) for name, value in own.items()}, old, last, before)
    for name, value in old.items():
        place = parameters[name] if adapter.head is None else own[name]
        if hasattr(place, "full_tensor") or hasattr(place, "ds_id"):
            raise ValueError("a classifier goes on with parallel.backbone: replicate only")
        if name.rpartition(".")[0] != last:  # all tasks share it
            place.copy_(value)
            continue
        for task in theirs.keys() & ours.keys():
            if len(value[theirs[task]]) != len(place[ours[task]]):
                counts = f"{len(value[theirs[task]])} there and {len(place[ours[task]])} here"
                raise ValueError(f"{f'task {task!r}' if task else 'the head'} has other labels: {counts}")
            place[ours[task]] = value[theirs[task]].to(place)


def _check_head(own: Mapping[str, tuple[int, ...]], old: Mapping[str, Tensor], last: str, before: Recipe) -> None:
    """Refuse a head of other parameters, or not as its recipe says; of the last linear the labels may differ."""
    for name in {**own, **old}:
        found = tuple(old[name].shape) if name in old else None
        wanted = own.get(name)
        if wanted is not None and name.rpartition(".")[0] == last:
            wanted = (before.head_outputs or wanted[0], *wanted[1:])
        if found is None or found != wanted or not old[name].is_floating_point():
            raise ValueError(f"its head has {name} of shape {found}, this model's {wanted}; take its backbone")

"""All data of a run, from the recipe to tables and orders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metatt_scale.data.batches import Indices, Mixture, split
from metatt_scale.data.cache import tokenize_source
from metatt_scale.data.sampling import passes
from metatt_scale.data.tokens import Progress, TokenTable, concatenate
from metatt_scale.recipe import DataRecipe, DataSource, TaskRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ValidationData(NamedTuple):
    """Examples for the evaluation loss."""

    table: TokenTable
    indices: Indices


@dataclass(frozen=True, eq=False)
class PreparedData:
    """What a run trains on and is judged by."""

    table: TokenTable
    """Examples of all training sources, one source after the other."""
    train: Mixture
    """Which of `table` are trained on, and how often."""
    validation: ValidationData | None
    """Own sources, or a part of `table` that is not trained on; None where the recipe names neither."""
    digest: str
    """SHA-256 of all tokens and targets: a resumed run must see the same."""
    counts: dict[str, Any]
    """For the log: `train` and `validation`, a list with the counts of each source; `train_examples`,
    `examples_per_epoch` and `validation_examples`."""

    @property
    def contents(self) -> dict[str, str]:
        """Hash of the content of each source, by its title: of a file that of its bytes."""
        return {part["path"]: part["content"] for part in (*self.counts["train"], *self.counts["validation"])}


def prepare(
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    progress: Progress | None = None,
    classes: int | None = None,
    tasks: Mapping[str, TaskRecipe] | None = None,
) -> PreparedData:
    """Read, tokenise (once, cached) and split what the recipe names.

    Every rank may call this: processes that share a cache folder tokenise once. `progress` is called with (records
    done, records in all) of the source at work, and not at all for a source that is in the cache. `classes` is the
    number of classes in the sentences format, 1 where labels are numbers; with `tasks` each has its own.

    Raises:
        ValueError: a source, a record, the tokenizer or `validation_size` is not usable.
    """

    def tokenize(sources: Sequence[DataSource]) -> tuple[list[TokenTable], list[dict[str, Any]]]:
        return _tokenize_all(sources, recipe, tokenizer, progress, classes, tasks or {})

    tables, train_counts = tokenize(recipe.train)
    table = concatenate(tables)
    kept, held_out = split(len(table), recipe.validation_size, seed)
    ends = np.cumsum([len(part) for part in tables])
    members = np.split(kept, np.searchsorted(kept, ends[:-1]))
    mixture = Mixture(tuple(members), passes(recipe, [len(part) for part in members]))
    validation, validation_counts = None, []
    if recipe.validation:
        tables, validation_counts = tokenize(recipe.validation)
        joined = concatenate(tables)
        validation = ValidationData(joined, np.arange(len(joined), dtype=np.int64))
    elif recipe.validation_size:
        validation = ValidationData(table, held_out)
    _check_every_task(tasks or {}, table, kept, validation)
    counts = {
        "train": train_counts,
        "validation": validation_counts,
        "train_examples": len(kept),
        "examples_per_epoch": len(mixture),
        "validation_examples": 0 if validation is None else len(validation.indices),
    }
    judged = [] if validation is None else [validation.table]
    return PreparedData(table, mixture, validation, _digest(table, *judged), counts)


def _check_every_task(
    tasks: Mapping[str, TaskRecipe], table: TokenTable, kept: Indices, validation: ValidationData | None
) -> None:
    """Refuse a task without an example to learn from, or to be judged by: its mean would be 0 / 0."""
    parts = [("train on", table, kept)]
    if validation is not None:
        parts.append(("be judged by", validation.table, validation.indices))
    for what, held, indices in parts if tasks else ():
        assert held.tasks is not None
        counts = np.bincount(held.tasks[indices], minlength=len(tasks))
        for name, count in zip(tasks, counts, strict=True):
            if not count:
                raise ValueError(
                    f"task {name!r} has no example to {what}; change `data.validation_size`, or name its files under "
                    "`data.train` and `data.validation`"
                )


def _digest(*tables: TokenTable) -> str:
    digest = hashlib.sha256()
    for table in tables:
        for array in table.arrays().values():
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _tokenize_all(
    sources: Sequence[DataSource],
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress | None,
    classes: int | None,
    tasks: Mapping[str, TaskRecipe],
) -> tuple[list[TokenTable], list[dict[str, Any]]]:
    tables, counts = [], []
    for source in sources:
        own, labels = recipe, classes
        if source.task is not None:
            own, labels = recipe.of_task(tasks[source.task]), tasks[source.task].labels
        table, count, content = tokenize_source(source, own, tokenizer, progress, labels)
        if source.task is not None:
            table = replace(table, tasks=np.full(len(table), list(tasks).index(source.task), np.int16))
        tables.append(table)
        counts.append({"path": source.title, **count, "content": content})
    return tables, counts

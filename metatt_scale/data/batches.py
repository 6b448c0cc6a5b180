"""The order of the examples, and the share of each rank.

The global order is a pure function of (seed, step): a resumed run needs the step alone, and every rank of any
world size knows each global batch without asking the others.

Shape letters: B examples of a micro-batch, S tokens of its longest example, rounded up. Packed, all of them stand in
one row: B is 1 and S is the sum of their lengths, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from metatt_scale.data.tokens import IGNORE, TokenTable
from metatt_scale.shapes import round_up

Indices = NDArray[np.int64]

# First word of each random key. Never 0, and never at the end: SeedSequence pads a short key with zeros, so [7] and
# [7, 0] would be the same stream.
_SHUFFLE, _FRACTION, _SPLIT = 1, 2, 3
_FILLER_TOKENS = 8
_WIDTH_STEP = 8


class Batch(NamedTuple):
    """Examples that go through the model at once: one a row, padded on the right; or all packed into one row."""

    input_ids_BS: torch.Tensor
    """int64 tokens."""
    attention_mask_BS: torch.Tensor
    """int64, 1 where there is a token and 0 where there is padding."""
    labels_BS: torch.Tensor
    """int64, the token at the same position where it is to be predicted (not shifted), else `IGNORE`."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each example, in the order of the row, where the examples are packed; None where they are padded.
    The row may be longer than their sum: the tokens behind the last example belong to none."""
    segments_BS: torch.Tensor | None = None
    """int64, 1 where a token is of the second sentence of a pair; of labelled examples only."""
    classes_B: torch.Tensor | None = None
    """int64, the class of each example, `IGNORE` where it adds nothing; of examples with classes only."""
    values_B: torch.Tensor | None = None
    """float32, the number of each example, NaN where it adds nothing; of examples with numbers only."""
    tasks_BS: torch.Tensor | None = None
    """int64, the task of each example, (B, 1), or of each token of a packed row, (1, S), where there are several."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sources and how often each is passed through in an epoch."""

    members: tuple[Indices, ...]
    """For each source the indices of its examples in the token table."""
    weights: tuple[float, ...]
    """Passes per epoch of each source."""

    def __post_init__(self) -> None:
        assert len(self.members) == len(self.weights) > 0
        for members, weight, count in zip(self.members, self.weights, self.counts, strict=True):
            if count < 1:
                raise ValueError(
                    f"a data source with {len(members)} training examples and weight {weight} gives no example to an "
                    "epoch; raise its `weight`, take less of it by data.validation_size, or leave the source out"
                )

    @property
    def counts(self) -> tuple[int, ...]:
        """Examples of each source in an epoch, the same in every epoch."""
        return tuple(round(weight * len(members)) for members, weight in zip(self.members, self.weights, strict=True))

    def __len__(self) -> int:
        """Examples in an epoch."""
        return sum(self.counts)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Global batches in an epoch; the last one may be smaller."""
        return math.ceil(len(self) / batch_size)

    def epoch_order(self, seed: int, epoch: int) -> Indices:
        """Return the (len(self),) example indices of an epoch, a pure function of (seed, epoch).

        Each source is passed through floor(weight) times, and a part drawn afresh fills it up to its count.
        """
        drawn = []
        for source, (members, count) in enumerate(zip(self.members, self.counts, strict=True)):
            passes, rest = divmod(count, len(members))
            drawn += [members] * passes
            drawn.append(members[_permutation(len(members), _FRACTION, seed, epoch, source)[:rest]])
        indices = np.concatenate(drawn)
        return indices[_permutation(len(indices), _SHUFFLE, seed, epoch)]


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """The endless sequence of global batches of a run, indexed by optimizer step."""

    mixture: Mixture
    seed: int
    batch_size: int
    """Examples of one optimizer step over all ranks."""
    _latest: dict[int, Indices] = field(default_factory=dict, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.mixture.steps_per_epoch(self.batch_size)

    def global_batch(self, step: int) -> tuple[int, Indices]:
        """Return the epoch and the example indices of optimizer step `step` (from 0)."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = self._latest.get(epoch)
        if order is None:
            self._latest.clear()
            order = self._latest[epoch] = self.mixture.epoch_order(self.seed, epoch)
        return epoch, order[batch * self.batch_size : (batch + 1) * self.batch_size]


def target_count(table: TokenTable, indices: Indices) -> int:
    """Return the number of tokens to be predicted in these examples: the denominator of their mean loss."""
    return int(table.targets[indices].sum())


def split(table_size: int, validation_size: int, seed: int) -> tuple[Indices, Indices]:
    """Split off `validation_size` examples drawn at random.

    Returns:
        Ascending training and validation indices, disjoint, together all; a pure function of the arguments.

    Raises:
        ValueError: no training example would be left.
    """
    if not 0 <= validation_size < table_size:
        raise ValueError(
            f"`data.validation_size` is {validation_size} of {table_size} examples, which leaves nothing to "
            f"train on; choose a number below {table_size}"
        )
    shuffled = _permutation(table_size, _SPLIT, seed)
    return np.sort(shuffled[validation_size:]), np.sort(shuffled[:validation_size])


def deal(
    lengths: NDArray[np.int64], indices: Indices, *, micro_batch_size: int, rank: int, world_size: int
) -> list[Indices]:
    """Return the examples of each micro-batch of one rank; empty ones where the rank must only keep step.

    Engines run collectives in every forward, so each rank gets the same number of micro-batches,
    k = ceil(n / (world_size * micro_batch_size)). The examples are ordered by length (stable, the longest first, so
    that a lack of memory shows at once) and cut into k * world_size nearly equal parts: little padding, and in each
    round the ranks work on parts of like length.
    """
    if not 0 <= rank < world_size or micro_batch_size < 1:
        raise ValueError(
            f"rank {rank} of {world_size} with micro-batches of {micro_batch_size}: ranks run from 0 to "
            "world_size - 1 and micro-batches hold at least one example"
        )
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    rounds = math.ceil(len(indices) / (world_size * micro_batch_size))
    if rounds == 0:
        return []
    return np.array_split(ordered, rounds * world_size)[rank::world_size]


def micro_batches(
    table: TokenTable,
    indices: Indices,
    *,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    pad_token_id: int,
    packed: bool = False,
) -> Iterator[Batch]:
    """Yield the micro-batches of one rank for these examples, as many as on every other rank.

    Over all ranks they hold each example of `indices` exactly once, and the same ones whether they are packed or
    padded. A rank with too few examples gets fillers: one short example without labels, which adds nothing to loss or
    gradient.
    """
    parts = deal(table.lengths, indices, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
    for part in parts:
        if not len(part):
            yield _filler(table, int(indices[0]), pad_token_id, packed)
        else:
            yield pack(table, part, pad_token_id) if packed else collate(table, part, pad_token_id)


def collate(table: TokenTable, indices: Sequence[int] | Indices, pad_token_id: int) -> Batch:
    """Pad examples on the right to the width that the longest of them asks for.

    Widths are multiples of 8, the same few again and again: kernels that are made for one shape are found again,
    and tensor cores' tiles are full. None is above the longest example of all, which the model is known to take.
    """
    longest = int(table.lengths[indices].max())
    width = min(-(-longest // _WIDTH_STEP) * _WIDTH_STEP, int(table.lengths.max()))
    shape = (len(indices), width)
    input_ids_BS = np.full(shape, pad_token_id, np.int64)
    attention_mask_BS = np.zeros(shape, np.int64)
    labels_BS = np.full(shape, IGNORE, np.int64)
    for row, index in enumerate(indices):
        tokens, flags = table.example(int(index))
        input_ids_BS[row, : len(tokens)] = tokens
        attention_mask_BS[row, : len(tokens)] = 1
        labels_BS[row, : len(tokens)][flags] = tokens[flags]
    batch = Batch(torch.from_numpy(input_ids_BS), torch.from_numpy(attention_mask_BS), torch.from_numpy(labels_BS))
    rows = np.asarray(indices)
    if table.labelled:
        batch = batch._replace(segments_BS=_segments(table, indices, shape))
    if table.classes is not None:
        batch = batch._replace(classes_B=torch.from_numpy(table.classes[rows].astype(np.int64)))
    if table.values is not None:
        batch = batch._replace(values_B=torch.from_numpy(table.values[rows]))
    if table.tasks is not None:
        batch = batch._replace(tasks_BS=torch.from_numpy(table.tasks[rows].astype(np.int64))[:, None])
    return batch


def _segments(table: TokenTable, indices: Sequence[int] | Indices, shape: tuple[int, int]) -> torch.Tensor:
    assert table.segments is not None
    segments_BS = np.zeros(shape, np.int64)
    for row, index in enumerate(indices):
        part = table.segments[table.offsets[index] : table.offsets[index + 1]]
        segments_BS[row, : len(part)] = part
    return torch.from_numpy(segments_BS)


def pack(table: TokenTable, indices: Sequence[int] | Indices, pad_token_id: int) -> Batch:
    """Put examples one after the other into one row, and fill it up to one of few widths (`round_up`).

    The sum of the lengths is hardly ever the same twice. The tokens that fill a row up are no example's: they have no
    labels and no mask, and no example attends to them.
    """
    examples = [table.example(int(index)) for index in indices]
    input_ids_S = np.concatenate([tokens for tokens, _ in examples])
    labels_S = np.where(np.concatenate([flags for _, flags in examples]), input_ids_S, IGNORE)
    lengths = tuple(len(tokens) for tokens, _ in examples)
    # What stands before the first token of an example is another example: nothing to predict it from.
    labels_S[np.cumsum((0, *lengths[:-1]))] = IGNORE
    tasks_S = None
    if table.tasks is not None:
        tasks_S = np.repeat(table.tasks[np.asarray(indices)].astype(np.int64), lengths)
    return _filled_up(input_ids_S, labels_S, lengths, tasks_S, pad_token_id)


def _filled_up(
    input_ids_S: Indices, labels_S: Indices, lengths: tuple[int, ...], tasks_S: Indices | None, pad_token_id: int
) -> Batch:
    rest = round_up(len(input_ids_S)) - len(input_ids_S)

    def row(values_S: Indices, value: int) -> torch.Tensor:
        return torch.from_numpy(np.pad(values_S, (0, rest), constant_values=value))[None]

    return Batch(
        row(input_ids_S, pad_token_id),
        row(np.ones_like(input_ids_S), 0),
        row(labels_S, IGNORE),
        lengths,
        tasks_BS=None if tasks_S is None else row(tasks_S, 0),  # of any task: they add nothing to its gradient
    )


def _filler(table: TokenTable, index: int, pad_token_id: int, packed: bool) -> Batch:
    if table.labelled:
        batch = collate(table, [index], 0)
        return batch._replace(
            classes_B=None if batch.classes_B is None else torch.full_like(batch.classes_B, IGNORE),
            values_B=None if batch.values_B is None else torch.full_like(batch.values_B, math.nan),
        )
    input_ids_S = table.example(index)[0][:_FILLER_TOKENS]
    labels_S = np.full_like(input_ids_S, IGNORE)
    # Of any task: it adds nothing to its gradient.
    if packed:
        tasks_S = None if table.tasks is None else np.zeros_like(input_ids_S)
        return _filled_up(input_ids_S, labels_S, (len(input_ids_S),), tasks_S, pad_token_id)
    tasks_BS = None if table.tasks is None else torch.zeros(1, 1, dtype=torch.int64)
    input_ids_BS = torch.from_numpy(input_ids_S)[None]
    return Batch(input_ids_BS, torch.ones_like(input_ids_BS), torch.from_numpy(labels_S)[None], tasks_BS=tasks_BS)


def _permutation(n: int, *key: int) -> Indices:
    """Return a permutation of range(n) that depends on the key alone.

    Sorting raw words of the Philox counter generator, whose stream is fixed by its definition; numpy may change how
    `Generator.permutation` uses them, and a run must resume alike after an upgrade.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)

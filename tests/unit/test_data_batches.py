from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from metatt_scale.data import (
    IGNORE,
    BatchOrder,
    Mixture,
    TokenTable,
    concatenate,
    micro_batches,
    pack,
    split,
    target_count,
)
from metatt_scale.shapes import round_up

PAD = 999


def make_table(lengths, seed=0):
    """Examples of random tokens; the first token of example i is i, so that batches can be read back."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = random.integers(100, 900, offsets[-1]).astype(np.int32)
    flags = random.integers(0, 2, offsets[-1]).astype(np.uint8)
    tokens[offsets[:-1]] = np.arange(len(lengths))
    flags[offsets[:-1]] = 0
    flags[offsets[1:] - 1] = 1
    return TokenTable(tokens, flags, offsets)


def mixture(*sizes_and_weights):
    sizes = [size for size, _ in sizes_and_weights]
    ends = np.cumsum(sizes)
    return Mixture(
        tuple(np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)),
        tuple(weight for _, weight in sizes_and_weights),
    )


def test_table_lengths_targets_and_examples():
    table = make_table([3, 7, 2])
    assert len(table) == 3
    assert table.lengths.tolist() == [3, 7, 2]
    for i in range(3):
        tokens, flags = table.example(i)
        assert tokens.dtype == np.int64 and flags.dtype == np.bool_
        assert tokens[0] == i and len(tokens) == table.lengths[i]
        assert flags.sum() == table.targets[i] > 0


def test_concatenated_tables_hold_the_same_examples():
    parts = [make_table([3, 2], 1), make_table([4], 2), make_table([2, 5], 3)]
    joined = concatenate(parts)
    expected = [part.example(i) for part in parts for i in range(len(part))]
    assert len(joined) == 5
    for i, (tokens, flags) in enumerate(expected):
        assert (joined.example(i)[0] == tokens).all() and (joined.example(i)[1] == flags).all()
    assert concatenate(parts[:1]) is parts[0]


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    mixed = mixture((50, 1.0), (30, 0.5))
    order = mixed.epoch_order(7, 3)
    mixed.epoch_order(8, 0)
    assert (mixture((50, 1.0), (30, 0.5)).epoch_order(7, 3) == order).all()
    assert (mixed.epoch_order(7, 4) != order).any()
    assert (mixed.epoch_order(8, 3) != order).any()


def test_the_order_does_not_change_between_versions():
    # Recorded. A resumed run relies on it: when this fails, old checkpoints go on with other batches.
    assert mixture((8, 1.0)).epoch_order(42, 1).tolist() == RECORDED


RECORDED = [2, 0, 7, 6, 5, 1, 3, 4]


def test_weight_one_takes_every_example_once():
    order = mixture((40, 1.0), (17, 1.0)).epoch_order(0, 0)
    assert sorted(order) == list(range(57))
    assert order.tolist() != sorted(order)


def test_weights_give_whole_passes_and_fresh_fractions():
    mixed = mixture((20, 2.0), (31, 0.5), (10, 1.3))
    assert len(mixed) == 40 + round(15.5) + 13
    halves = []
    for epoch in range(2):
        times = Counter(mixed.epoch_order(5, epoch).tolist())
        assert sum(times.values()) == len(mixed)
        assert all(times[i] == 2 for i in range(20))
        half = {i for i in range(20, 51) if times[i]}
        assert len(half) == 16 and all(times[i] == 1 for i in half)
        assert sorted(times[i] for i in range(51, 61)) == [1] * 7 + [2] * 3
        halves.append(half)
    assert halves[0] != halves[1]


def test_a_source_that_gives_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"10 training examples and weight 0\.01"):
        mixture((50, 1.0), (10, 0.01))


def test_global_batches_cover_each_epoch_and_can_be_entered_anywhere():
    mixed = mixture((25, 1.0))
    order = BatchOrder(mixed, seed=3, batch_size=8)
    assert order.steps_per_epoch == mixed.steps_per_epoch(8) == 4
    batches = [order.global_batch(step) for step in range(8)]
    assert [epoch for epoch, _ in batches] == [0] * 4 + [1] * 4
    assert [len(indices) for _, indices in batches] == [8, 8, 8, 1] * 2
    for epoch in range(2):
        joined = np.concatenate([indices for at, indices in batches if at == epoch])
        assert (joined == mixed.epoch_order(3, epoch)).all()
    for step in (6, 1, 7, 3):  # out of order, and by an object that has seen nothing
        for other in (order, BatchOrder(mixed, seed=3, batch_size=8)):
            assert (other.global_batch(step)[1] == batches[step][1]).all()


def test_a_batch_is_padded_on_the_right_with_unshifted_labels():
    table = make_table([3, 6])
    (batch,) = micro_batches(table, np.array([0, 1]), micro_batch_size=4, rank=0, world_size=1, pad_token_id=PAD)
    assert all(part.shape == (2, 6) and part.dtype == torch.int64 for part in batch[:3]) and batch.lengths is None
    for row, i in enumerate([1, 0]):  # the longest first
        tokens, flags = table.example(i)
        n = len(tokens)
        assert batch.input_ids_BS[row].tolist() == [*tokens, *[PAD] * (6 - n)]
        assert batch.attention_mask_BS[row].tolist() == [1] * n + [0] * (6 - n)
        labels = [int(t) if flag else IGNORE for t, flag in zip(tokens, flags, strict=True)]
        assert batch.labels_BS[row].tolist() == labels + [IGNORE] * (6 - n)


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 19), (19, 19)])
def test_widths_are_few_and_none_is_above_the_longest_example(longest, width):
    """Of 19 tokens here: what is longer, a model of so many positions might not take."""
    table = make_table([longest, 1, 19])
    (batch,) = micro_batches(table, np.arange(2), micro_batch_size=2, rank=0, world_size=1, pad_token_id=PAD)
    assert batch.input_ids_BS.shape == (2, width)
    assert batch.attention_mask_BS.sum(1).tolist() == [longest, 1]


def test_a_packed_batch_is_one_row_of_the_same_examples():
    table = make_table([3, 6, 2])
    table.flags[3] = 1  # as no tokeniser would have it: the first token of an example, which nothing predicts
    settings = {"micro_batch_size": 4, "rank": 0, "world_size": 1, "pad_token_id": PAD}
    (batch,) = micro_batches(table, np.arange(3), **settings, packed=True)
    assert all(part.shape == (1, 16) and part.dtype == torch.int64 for part in batch[:3])
    assert batch.lengths == (6, 3, 2) and batch.attention_mask_BS.tolist() == [[1] * 11 + [0] * 5]
    assert (batch.input_ids_BS[0, 11:] == PAD).all() and (batch.labels_BS[0, 11:] == IGNORE).all()
    ids, labels = batch.input_ids_BS[0, :11].split(batch.lengths), batch.labels_BS[0, :11].split(batch.lengths)
    for i, own_ids, own_labels in zip((1, 0, 2), ids, labels, strict=True):
        tokens, flags = table.example(i)
        assert own_ids.tolist() == tokens.tolist() and own_labels[0] == IGNORE
        assert own_labels[1:].tolist() == np.where(flags, tokens, IGNORE)[1:].tolist()


@pytest.mark.parametrize("world_size, n", [(1, 7), (3, 8), (4, 9)])
def test_packed_and_padded_batches_hold_the_same_examples(world_size, n):
    table = make_table(np.random.default_rng(1).integers(2, 40, 12))
    for rank in range(world_size):
        settings = {"micro_batch_size": 2, "rank": rank, "world_size": world_size, "pad_token_id": PAD}
        packed = micro_batches(table, np.arange(n), **settings, packed=True)
        padded = micro_batches(table, np.arange(n), **settings)
        for one, other in zip(packed, padded, strict=True):
            there = other.attention_mask_BS.bool()
            assert one.lengths == tuple(there.sum(1).tolist())
            here = one.attention_mask_BS.bool()
            assert torch.equal(one.input_ids_BS[here], other.input_ids_BS[there])
            assert torch.equal(one.labels_BS[here], other.labels_BS[there])


@pytest.mark.parametrize("lengths, width", [((1,), 16), ((7, 9), 16), ((7, 9, 1), 32), ((300, 230), 544)])
def test_packed_rows_are_filled_up(lengths, width):
    table = replace(make_table(lengths), tasks=np.full(len(lengths), 2, np.int8))
    row, rest = pack(table, range(len(lengths)), PAD), width - sum(lengths)
    assert row.attention_mask_BS.tolist() == [[1] * sum(lengths) + [0] * rest]
    assert row.tasks_BS is not None and row.tasks_BS.tolist() == [[2] * sum(lengths) + [0] * rest]
    assert row.input_ids_BS.shape == row.labels_BS.shape == (1, width)


def test_sizes_are_few_and_at_most_a_sixteenth_more():
    sizes = {count: round_up(count) for count in range(1, 5000)}
    assert all(0 <= size - count < max(16, count / 16) for count, size in sizes.items())
    assert all(round_up(size) == size for size in sizes.values()) and round_up(0) == 0
    for low in (256, 512, 1024, 2048):
        assert len({size for count, size in sizes.items() if low < count <= 2 * low}) == 16
    assert [sizes[n] for n in (1, 16, 17, 512, 513, 1025, 2049)] == [16, 16, 32, 512, 544, 1088, 2176]


@pytest.mark.parametrize("n", [1, 3, 8, 9, 31, 32])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_sees_the_same_global_batch(world_size, n):
    table = make_table(np.random.default_rng(1).integers(2, 40, 60))
    indices = np.random.default_rng(n).permutation(60)[:n]
    ranks = [
        list(micro_batches(table, indices, micro_batch_size=4, rank=rank, world_size=world_size, pad_token_id=PAD))
        for rank in range(world_size)
    ]
    # Equal counts, or a collective inside the forward would wait for ever; and no more rounds than needed.
    assert {len(batches) for batches in ranks} == {-(-n // (4 * world_size))}
    seen, targets = [], 0
    for batch in (batch for batches in ranks for batch in batches):
        assert 1 <= len(batch.input_ids_BS) <= 4
        targets += int((batch.labels_BS != IGNORE).sum())
        if (batch.labels_BS == IGNORE).all():  # a filler
            assert batch.input_ids_BS.shape[1] <= 8 and batch.attention_mask_BS.all()
            continue
        seen += batch.input_ids_BS[:, 0].tolist()
    assert sorted(seen) == sorted(indices)
    assert targets == target_count(table, indices) == table.targets[indices].sum()


def test_sorting_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(2, 200, 64)
    table = make_table(lengths)
    batches = micro_batches(table, np.arange(64), micro_batch_size=8, rank=0, world_size=1, pad_token_id=PAD)
    padded = sum(batch.input_ids_BS.numel() for batch in batches)
    assert padded < 1.15 * lengths.sum()


def test_a_batch_larger_than_needed_is_spread_over_all_ranks():
    table = make_table([5] * 8)
    for rank in range(4):
        (batch,) = micro_batches(table, np.arange(8), micro_batch_size=8, rank=rank, world_size=4, pad_token_id=PAD)
        assert len(batch.input_ids_BS) == 2


def test_micro_batches_are_dealt_alike():
    table = make_table(np.random.default_rng(2).integers(2, 30, 50))
    indices = np.arange(5, 48)
    seen, counts = [], set()
    for rank in range(3):
        batches = list(micro_batches(table, indices, micro_batch_size=4, rank=rank, world_size=3, pad_token_id=PAD))
        counts.add(len(batches))
        seen += [
            i for batch in batches if (batch.labels_BS != IGNORE).any() for i in batch.input_ids_BS[:, 0].tolist()
        ]
    assert counts == {4} and sorted(seen) == indices.tolist()


def test_a_wrong_rank_is_an_error():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        next(micro_batches(make_table([3]), np.arange(1), micro_batch_size=1, rank=2, world_size=2, pad_token_id=PAD))


def test_the_validation_split_is_disjoint_and_pure():
    train, held_out = split(100, 30, seed=4)
    assert len(held_out) == 30 and sorted([*train, *held_out]) == list(range(100))
    assert (np.diff(train) > 0).all() and held_out.tolist() != list(range(30))
    assert (split(100, 30, seed=4)[1] == held_out).all()
    assert (split(100, 30, seed=5)[1] != held_out).any()
    assert len(split(10, 0, seed=0)[1]) == 0


@pytest.mark.parametrize("size", [10, 11])
def test_a_split_must_leave_training_data(size):
    with pytest.raises(ValueError, match=f"validation_size` is {size} of 10"):
        split(10, size, seed=0)

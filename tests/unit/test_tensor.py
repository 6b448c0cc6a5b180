"""The chain as mathematics, in float64 against dense tensors."""

import math

import pytest
import torch

from metatt_scale.tensor import (
    canonicalise,
    check_chain,
    inner,
    largest_ranks,
    materialise,
    mode_sizes,
    move_centre,
    norm,
    ranks,
    round_chain,
    singular_values,
    subtract,
)

TOLERANCE = 1e-12

CASES = [
    ((7, 3, 2, 6), (4, 5, 3)),
    ((5, 4, 3), (2, 6)),
    ((6, 3, 2, 4, 3), (3, 4, 5, 2)),
    ((4, 2, 3, 2, 3, 4), (2, 3, 4, 3, 2)),
    ((2, 2, 2), (9, 9)),  # ranks beyond what the modes can hold
]


def random_chain(sizes, rank_list, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bonds = [1, *rank_list, 1]
    shapes = zip(bonds[:-1], sizes, bonds[1:], strict=True)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("sizes, rank_list", CASES)
def test_dense_norm_and_inner(sizes, rank_list):
    a, b = random_chain(sizes, rank_list), random_chain(sizes, rank_list, seed=1)
    dense_a, dense_b = materialise(a), materialise(b)
    assert dense_a.shape == sizes == mode_sizes(a)
    assert ranks(a) == rank_list
    entry = a[0][:, 1, :]
    for core in a[1:]:
        entry = entry @ core[:, 1, :]
    scale = dense_a.norm()
    assert abs(entry.item() - dense_a[(1,) * len(sizes)].item()) < TOLERANCE * scale
    assert abs(norm(a) - scale) < TOLERANCE * scale
    assert abs(inner(a, b) - (dense_a * dense_b).sum()) < TOLERANCE * scale * dense_b.norm()
    assert (materialise(subtract(a, b)) - (dense_a - dense_b)).norm() < TOLERANCE * scale


def test_norm_of_nearly_equal_chains_keeps_its_digits():
    a = random_chain((7, 3, 2, 6), (4, 5, 3))
    b = [*a[:-1], a[-1] * (1 + 1e-10)]
    expected = 1e-10 * materialise(a).norm()
    assert abs(norm(subtract(a, b)) / expected - 1) < 1e-4  # sqrt(<T,T>) would be pure rounding noise here


@pytest.mark.parametrize("sizes, rank_list", CASES)
def test_canonical_forms(sizes, rank_list):
    a = random_chain(sizes, rank_list)
    dense = materialise(a)
    for centre in range(len(sizes)):
        gauge = canonicalise(a, centre)
        assert (materialise(gauge) - dense).norm() < TOLERANCE * dense.norm()
        for k, core in enumerate(gauge):
            if k < centre:
                unfolding = core.flatten(0, 1)
                gram = unfolding.mT @ unfolding
            elif k > centre:
                unfolding = core.flatten(1, 2)
                gram = unfolding @ unfolding.mT
            else:
                continue
            assert (gram - torch.eye(len(gram), dtype=torch.float64)).norm() < TOLERANCE * 10
        assert abs(gauge[centre].norm() - dense.norm()) < TOLERANCE * dense.norm()
        moved = move_centre(gauge, centre, 0)
        assert (materialise(moved) - dense).norm() < TOLERANCE * dense.norm()
        assert abs(moved[0].norm() - dense.norm()) < TOLERANCE * dense.norm()


@pytest.mark.parametrize("sizes, rank_list", CASES)
def test_singular_values_are_those_of_the_unfoldings(sizes, rank_list):
    a = random_chain(sizes, rank_list)
    dense = materialise(a)
    for k, spectrum in enumerate(singular_values(a)):
        expected = torch.linalg.svdvals(dense.reshape(math.prod(sizes[: k + 1]), -1))
        n = min(len(spectrum), len(expected))
        assert (spectrum[:n] - expected[:n]).norm() < TOLERANCE * dense.norm()
        assert spectrum[n:].norm() + expected[n:].norm() < TOLERANCE * dense.norm()


@pytest.mark.parametrize("sizes, rank_list", CASES)
@pytest.mark.parametrize("cap", [1, 2, 3, 50])
def test_rounding_error_is_the_predicted_one(sizes, rank_list, cap):
    a = random_chain(sizes, rank_list)
    rounded = round_chain(a, max_ranks=cap)
    measured = norm(subtract(a, rounded.cores)).item()
    scale = norm(a).item()
    assert abs(measured - rounded.predicted_error) < TOLERANCE * scale * 10
    limits = [min(cap, most) for most in largest_ranks(sizes)]
    assert all(r <= limit for r, limit in zip(ranks(rounded.cores), limits, strict=True))
    check_chain(rounded.cores)


@pytest.mark.parametrize("bound", [1e-3, 0.1, 0.5])
def test_rounding_keeps_to_its_bound(bound):
    a = random_chain((7, 3, 2, 6), (4, 5, 3))
    rounded = round_chain(a, max_rel_error=bound)
    assert norm(subtract(a, rounded.cores)) <= bound * norm(a) * (1 + 1e-12)


def test_rounding_finds_the_true_rank():
    a = random_chain((7, 3, 4, 6), (2, 2, 2))
    padded = subtract(a, [*a[:-1], a[-1] * 0.25])  # ranks 4, 4, 4 of which half are redundant
    assert ranks(padded) == (4, 4, 4)
    rounded = round_chain(padded, max_rel_error=1e-10)
    assert ranks(rounded.cores) == (2, 2, 2)
    assert norm(subtract(padded, rounded.cores)) < 1e-10 * norm(padded)


def test_rounding_keeps_dtype_and_handles_zero():
    zero = [torch.zeros(1, 5, 3), torch.randn(3, 4, 3), torch.randn(3, 6, 1)]
    rounded = round_chain(zero, max_rel_error=0.1)
    assert ranks(rounded.cores) == (1, 1)
    assert rounded.predicted_error == 0 and rounded.cores[0].dtype == torch.float32
    assert materialise(rounded.cores).norm() == 0


@pytest.mark.parametrize(
    "cores, message",
    [
        ([], "at least one core"),
        ([torch.ones(1, 2)], "left bond, mode, right bond"),
        ([torch.ones(1, 2, 3), torch.ones(4, 2, 1)], "bond 0 does not fit"),
        ([torch.ones(2, 2, 3), torch.ones(3, 2, 1)], "outer bonds are 2 and 1"),
    ],
)
def test_not_a_chain(cores, message):
    with pytest.raises(ValueError, match=message):
        check_chain(cores)


def test_rounding_refuses_what_it_cannot_do():
    a = random_chain((4, 3, 4), (2, 2))
    with pytest.raises(ValueError, match="at least 1"):
        round_chain(a, max_ranks=0)
    with pytest.raises(ValueError, match="2 inner bonds"):
        round_chain(a, max_ranks=[1, 2, 3])
    with pytest.raises(ValueError, match="at least 0"):
        round_chain(a, max_rel_error=-1)
    a[1][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        round_chain(a, max_ranks=1)
    with pytest.raises(ValueError, match="centres 0 to 2"):
        canonicalise(a, 3)

"""The chain as mathematics, in float64 against dense tensors."""

import math

import pytest
import torch

from metatt_scale.tensor import (
    canonicalise,
    check_chain,
    inner,
    materialise,
    mode_sizes,
    norm,
    ranks,
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


@pytest.mark.parametrize("sizes, rank_list", CASES)
def test_singular_values_are_those_of_the_unfoldings(sizes, rank_list):
    a = random_chain(sizes, rank_list)
    dense = materialise(a)
    for k, spectrum in enumerate(singular_values(a)):
        expected = torch.linalg.svdvals(dense.reshape(math.prod(sizes[: k + 1]), -1))
        n = min(len(spectrum), len(expected))
        assert (spectrum[:n] - expected[:n]).norm() < TOLERANCE * dense.norm()
        assert spectrum[n:].norm() + expected[n:].norm() < TOLERANCE * dense.norm()


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


def test_no_such_centre():
    with pytest.raises(ValueError, match="centres 0 to 2"):
        canonicalise(random_chain((4, 3, 4), (2, 2)), 3)

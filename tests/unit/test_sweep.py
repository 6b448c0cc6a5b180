"""Sweeps in float64: errors against what was predicted, gauges, wider bonds, and where gradients go."""

import pytest
import torch

from metatt_scale.tensor import (
    balance,
    canonicalise,
    check_chain,
    enrich,
    feasible_ranks,
    gauge_change,
    materialise,
    norm,
    ranks,
    singular_values,
    subtract,
    sweep,
    transport_gradient,
    transport_variance,
)
from tests.unit.test_tensor import CASES, TOLERANCE, random_chain

EYE = torch.eye


def distance(a, b):
    return norm(subtract(a, b)).item()


def block_left_of(cores, bond):
    """The first cores, up to an inner bond (from 0, or from the end as -1), as a matrix (modes, bond)."""
    block, *others = cores[: len(cores) + bond if bond < 0 else bond + 1]
    for core in others:
        block = torch.tensordot(block, core, 1)
    return block.flatten(0, -2)


def is_right_canonical(cores):
    rows = [core.flatten(1, 2) for core in cores[1:]]
    return all((row @ row.mT - EYE(len(row), dtype=row.dtype)).norm() < 10 * TOLERANCE for row in rows)


@pytest.mark.parametrize("sizes, rank_list", CASES)
@pytest.mark.parametrize("cap", [1, 2, 3, 50])
def test_error_of_the_canonical_sweep_is_the_predicted_one(sizes, rank_list, cap):
    a = random_chain(sizes, rank_list)
    swept = sweep(a, max_ranks=cap)
    assert abs(distance(a, swept.cores) - swept.predicted_error) < TOLERANCE * norm(a).item()
    check_chain(swept.cores)
    limits = feasible_ranks(sizes, [min(cap, rank) for rank in rank_list])
    assert ranks(swept.cores) == limits == tuple(len(cut.kept) for cut in swept.cuts)
    assert is_right_canonical(swept.cores), "the gauge after a sweep"


@pytest.mark.parametrize("sizes, rank_list", CASES)
@pytest.mark.parametrize("cap", [1, 2, 3, 50])
def test_algorithm_1_as_printed(sizes, rank_list, cap):
    """Against the algorithm word for word, with dense SVDs of merged cores; its prediction is not its error."""
    a = random_chain(sizes, rank_list)
    swept = sweep(a, max_ranks=cap, canonical=False)
    expected = list(a)
    for k in range(len(a) - 1):
        merged = torch.tensordot(expected[k], expected[k + 1], 1)
        u, s, vh = torch.linalg.svd(merged.flatten(0, 1).flatten(1, 2), full_matrices=False)
        r = min(cap, expected[k].shape[2], len(s))
        expected[k] = u[:, :r].reshape(*merged.shape[:2], r)
        expected[k + 1] = (s[:r, None] * vh[:r]).reshape(r, *merged.shape[2:])
    scale = norm(a).item()
    assert distance(swept.cores, expected) < 100 * TOLERANCE * scale
    assert is_right_canonical(swept.cores)
    if cap == 50:
        assert distance(swept.cores, a) < 100 * TOLERANCE * scale, "nothing was cut"


def test_only_the_canonical_sweep_knows_its_error():
    """A gauge that hides the norm in a core far from the cut, as training may: there algorithm 1 cuts blindly."""
    a = random_chain((7, 3, 2, 6), (4, 5, 3))
    scales = torch.tensor([1e-2, 1.0, 1e2, 1.0], dtype=torch.float64)
    skewed = [a[0] * scales, a[1] / scales[:, None, None], *a[2:]]
    printed, canonical = (sweep(skewed, max_ranks=2, canonical=c) for c in (False, True))
    assert distance(canonical.cores, a) == pytest.approx(canonical.predicted_error, rel=1e-10)
    assert distance(printed.cores, a) != pytest.approx(printed.predicted_error, rel=0.01)


def test_bonds_hold_the_singular_values():
    a = random_chain((7, 3, 2, 6), (4, 5, 3))
    swept = sweep(a, max_ranks=(3, 4, 2))
    for k, spectrum in enumerate(singular_values(swept.cores)):
        left = block_left_of(swept.cores, k)
        gram = left.mT @ left
        assert (gram - gram.diagonal().diag()).norm() < TOLERANCE * gram.norm()
        assert (gram.diagonal().sqrt() - spectrum).norm() < 1e-10 * spectrum.norm()


@pytest.mark.parametrize("weight", [1e-6, 0.01, 0.25])
def test_a_bound_on_the_discarded_weight(weight):
    a = random_chain((7, 3, 2, 6), (4, 5, 3))
    swept = sweep(a, max_discarded_weight=weight)
    first = swept.cuts[0]
    assert all(cut.discarded_weight <= weight * cut.singular_values.square().sum() for cut in swept.cuts)
    assert first.discarded_weight + first.singular_values[len(first.kept) - 1] ** 2 > weight * norm(a) ** 2
    assert ranks(sweep(a, max_discarded_weight=0.99, min_rank=2).cores) == (2, 2, 2)
    assert ranks(sweep(a, max_discarded_weight=1e-9, max_ranks=(2, 3, 1)).cores) == (2, 2, 1)  # 2 = 1 x mode 2


def test_the_true_rank_is_found():
    a = random_chain((7, 3, 4, 6), (2, 2, 2))
    padded = subtract(a, [*a[:-1], a[-1] * 0.25])  # ranks 4, 4, 4 of which half are redundant
    assert ranks(padded) == (4, 4, 4)
    swept = sweep(padded, max_discarded_weight=1e-20)
    assert ranks(swept.cores) == (2, 2, 2) and distance(padded, swept.cores) < 1e-10 * norm(padded)
    for canonical in (True, False):  # a rank asked for is kept, though nothing is on it
        kept = sweep(padded, max_ranks=3, canonical=canonical)
        assert ranks(kept.cores) == (3, 3, 3) and distance(padded, kept.cores) < 1e-10 * norm(padded)


@pytest.mark.parametrize("canonical", [True, False])
def test_zero_chains_keep_type_and_ranks(canonical):
    zero = [torch.zeros(1, 5, 3), torch.randn(3, 4, 3), torch.randn(3, 6, 1)]
    swept = sweep(zero, max_discarded_weight=0.1, max_ranks=2, canonical=canonical)
    assert (swept.cores[1].norm(dim=(0, 2)) > 0.1).all(), "no slice of the start is lost"
    assert ranks(swept.cores) == (2, 2) and swept.predicted_error == 0
    assert swept.cores[0].dtype == torch.float32 and materialise(swept.cores).norm() == 0
    assert all(torch.isfinite(core).all() for core in [*swept.cores, *balance(swept.cores)])


def test_scores_decide_what_is_kept():
    """A direction that is small but matters survives; its weight is counted right."""
    a = random_chain((7, 3, 2, 6), (4, 5, 3))
    seen = []

    def scores(bond, s, vh):
        assert (vh @ vh.mT - EYE(len(vh), dtype=torch.float64)).norm() < 1e-10
        seen.append((bond, len(s)))
        return s.flip(0)  # the smallest first

    swept = sweep(a, max_ranks=2, scores=scores)
    assert seen == [(0, 4), (1, 5), (2, 3)]
    assert swept.cuts[0].kept.tolist() == [2, 3]
    assert distance(a, swept.cores) == pytest.approx(swept.predicted_error, rel=1e-12)


def test_refusals():
    a = random_chain((4, 3, 4), (2, 2))
    with pytest.raises(ValueError, match="at least 1"):
        sweep(a, max_ranks=0)
    with pytest.raises(ValueError, match="2 inner bonds"):
        sweep(a, max_ranks=[1, 2, 3])
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        sweep(a, max_discarded_weight=1.0)
    with pytest.raises(ValueError, match="keeps at least 1"):
        sweep(a, min_rank=0)
    a[1][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        sweep(a, max_ranks=1)


@pytest.mark.parametrize("sizes, rank_list", CASES)
def test_balanced_and_wider_chains_are_the_same_tensor(sizes, rank_list):
    a = random_chain(sizes, rank_list)
    swept, scale = sweep(a).cores, norm(a).item()
    level = balance(swept)
    assert distance(level, a) < 100 * TOLERANCE * scale
    for k, spectrum in enumerate(singular_values(level)):  # U sqrt(s) on the left, sqrt(s) V^T on the right
        for block in (block_left_of(level, k), block_left_of([c.permute(2, 1, 0) for c in level[::-1]], -1 - k)):
            assert (block.mT @ block - spectrum.diag()).norm() < 1e-8 * spectrum[0]
    wanted = [r + 2 for r in ranks(swept)]
    for start in (swept, level):
        wide = enrich(start, wanted, torch.Generator().manual_seed(1))
        assert distance(wide, a) < 100 * TOLERANCE * scale
        assert ranks(wide) == feasible_ranks(sizes, wanted)
    assert is_right_canonical(enrich(swept, wanted, torch.Generator().manual_seed(1)))
    once, again = (enrich(swept, wanted, torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


def test_new_directions_get_gradients():
    a = [torch.zeros(1, 5, 2, dtype=torch.float64), *random_chain((5, 4, 6), (2, 2))[1:]]
    wide = [core.requires_grad_() for core in enrich(sweep(a).cores, (4, 4), torch.Generator().manual_seed(0))]
    (materialise(wide) - random_tensor((5, 4, 6))).square().sum().backward()
    gradient = wide[0].grad
    assert gradient is not None and gradient.flatten(0, 1).norm(dim=0).min() > 0.1


def random_tensor(sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_feasible_ranks():
    assert feasible_ranks((7, 3, 2, 6), (100, 100, 100)) == (7, 12, 6)
    assert feasible_ranks((2, 2, 2), (9, 9)) == (2, 2)
    assert feasible_ranks((64, 30, 2, 64), (8, 8, 8)) == (8, 8, 8)


@pytest.mark.parametrize("sizes, rank_list", CASES[:4])
@pytest.mark.parametrize("gauge", ["swept", "balanced", "left"])
def test_transported_gradients_are_those_of_the_new_chain(sizes, rank_list, gauge):
    """Where nothing is cut, the gradient of any loss in the new cores is the old one, carried over."""
    limits = feasible_ranks(sizes, rank_list)
    a = random_chain(sizes, limits)
    new = {"swept": sweep(a).cores, "balanced": balance(sweep(a).cores), "left": canonicalise(a, len(a) - 1)}[gauge]
    target = random_tensor(sizes)

    def gradients(chain):
        chain = [core.clone().requires_grad_() for core in chain]
        (materialise(chain) - target).square().sum().backward()
        return [core.grad if core.grad is not None else core for core in chain]

    change = gauge_change(a, new)
    for x, y in zip(change.x, change.y, strict=True):
        assert (x @ y - EYE(len(x), dtype=torch.float64)).norm() < 1e-9
    for k, (old, expected) in enumerate(zip(gradients(a), gradients(new), strict=True)):
        assert (transport_gradient(change, k, old) - expected).norm() < 1e-9 * expected.norm()


def test_transport_keeps_variances_positive_and_their_scale():
    """Against the mean square of many transported random gradients with independent entries."""
    a = random_chain((7, 3, 2, 6), (4, 5, 3))
    change = gauge_change(a, sweep(a, max_ranks=3).cores)
    generator = torch.Generator().manual_seed(0)
    variance = torch.rand(a[1].shape, generator=generator, dtype=torch.float64) + 0.1
    draws = torch.randn(4000, *a[1].shape, generator=generator, dtype=torch.float64) * variance.sqrt()
    expected = torch.stack([transport_gradient(change, 1, draw) for draw in draws]).square().mean(0)
    assert (transport_variance(change, 1, variance) / expected - 1).abs().max() < 0.15


@pytest.mark.parametrize("gauge", ["swept", "balanced"])
def test_new_directions_get_the_mean_variance(gauge):
    """In the cores of float32 that training has: rounding makes old and new directions overlap a little."""
    a = [core.float().double() for core in random_chain((7, 3, 2, 6), (2, 2, 2))]
    start = {"swept": sweep(a).cores, "balanced": balance(sweep(a).cores)}[gauge]
    wide = [core.float().double() for core in enrich(start, (5, 4, 3), torch.Generator().manual_seed(0))]
    change = gauge_change(a, wide)
    generator = torch.Generator().manual_seed(1)
    for k, (old, new) in enumerate(zip(start, wide, strict=True)):
        variance = torch.rand(a[k].shape, generator=generator, dtype=torch.float64) + 0.1
        moved = transport_variance(change, k, variance)
        known = moved[: old.shape[0], :, : old.shape[2]]
        fresh = torch.ones(new.shape, dtype=torch.bool)
        fresh[: old.shape[0], :, : old.shape[2]] = False
        assert moved.shape == new.shape and (known > 0).all()
        assert ((moved[fresh] / known.mean() - 1).abs() < 1e-12).all()
        if gauge == "swept":  # balanced cores are no isometries: their new rows are not new altogether
            momentum = transport_gradient(change, k, variance)
            assert momentum[fresh].abs().max() < 1e-6 * momentum.abs().max()


def test_variances_of_a_chain_of_zeros_keep_their_mean():
    a = [torch.zeros(1, 5, 2, dtype=torch.float64), *random_chain((5, 4, 6), (2, 2))[1:]]
    change = gauge_change(a, sweep(a, max_ranks=1).cores)
    assert (transport_variance(change, 1, torch.full_like(a[1], 0.5)) == 0.5).all()


def test_scores_want_a_canonical_chain():
    with pytest.raises(ValueError, match="orthonormal"):
        sweep(random_chain((4, 3, 4), (2, 2)), max_ranks=1, scores=lambda _bond, s, _vh: s, canonical=False)

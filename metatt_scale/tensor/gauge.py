"""What a sweep does to the bonds: other gauges, wider bonds, and where gradients go.

Between two chains of (nearly) the same tensor there are a matrix X_k and a matrix Y_k on every bond with

    G'_k[n] = Y_{k-1} G_k[n] X_k,     X_k Y_k = 1 on what both chains hold.

X is the change of basis of everything left of the bond, Y that of everything right of it. A gradient, and with it the
first moment of AdamW, goes the other way (`transport`).

Shape legend: P left bond, N mode, Q right bond, K a bond; a prime marks the new chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metatt_scale.tensor.cores import Chain, check_finite, mode_sizes, ranks

_RELATIVE_CUTOFF = 1e-7
"""Singular values of a block below this part of its largest are zero: fp32 cores hold nothing finer."""


def balance(cores: Chain) -> list[Tensor]:
    """Return the same tensor with its norm shared out: on every bond sqrt(s) goes to either side.

    Args:
        cores: a chain as `sweep` leaves it, right-canonical with orthogonal columns on every bond.
    """
    result = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        # Columns of the core on the left are orthogonal only once everything left of it is an isometry: their lengths
        # are taken from the tensor, by the environment of the bond.
        roots_K = _bond_weights(cores, k).sqrt()
        result[k] = roots_K[:, None, None] * result[k]
        result[k - 1] = result[k - 1] / roots_K
    return result


def _bond_weights(cores: Chain, k: int) -> Tensor:
    """Return the singular values on the bond left of core k of a chain as `sweep` leaves it, none of them zero."""
    left_PP = torch.ones(1, 1, dtype=cores[0].dtype, device=cores[0].device)
    for core_PNQ in cores[:k]:
        half = torch.tensordot(left_PP, core_PNQ, 1)
        left_PP = core_PNQ.flatten(0, 1).mT @ half.flatten(0, 1)
    weights_K = left_PP.diagonal().clamp_min(0).sqrt()
    largest = float(weights_K.max())
    return weights_K.clamp_min(largest * _RELATIVE_CUTOFF) if largest else torch.ones_like(weights_K)


def feasible_ranks(sizes: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Return the widest bonds within `wanted` that are of use: none wider than the mode and bond on either side."""
    bonds = [1, *wanted, 1]
    for k in range(1, len(bonds) - 1):
        bonds[k] = min(bonds[k], bonds[k - 1] * sizes[k - 1])
    for k in range(len(bonds) - 2, 0, -1):
        bonds[k] = min(bonds[k], bonds[k + 1] * sizes[k])
    return tuple(bonds[1:-1])


def enrich(cores: Chain, wanted: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Widen bonds to `wanted` ranks without changing the tensor; bonds that are as wide already stay.

    The core right of a bond gets new rows, random and orthogonal to those it has and as long as their mean; the core
    left of it gets as many columns of zeros. So the gradient of those columns is not zero, and training decides.
    (Many-body physics starts small and widens; DMRG does it by density-matrix perturbation.)

    Args:
        cores: right-canonical, as `sweep` leaves it, or balanced.
        wanted: a rank per inner bond.
        generator: of the new directions, on the CPU.
    """
    result = list(cores)
    targets = feasible_ranks(mode_sizes(cores), [max(pair) for pair in zip(wanted, ranks(cores), strict=True)])
    for k in range(len(cores) - 1, 0, -1):
        core_PNQ, left = result[k], result[k - 1]
        missing = targets[k - 1] - core_PNQ.shape[0]
        if missing <= 0:
            continue
        rows = core_PNQ.flatten(1, 2)
        length = rows.norm(dim=1).mean() or rows.new_ones(())
        fresh = torch.randn(missing, rows.shape[1], generator=generator, dtype=rows.dtype).to(rows.device)
        basis = torch.linalg.qr(rows.mT).Q
        for _ in range(2):  # twice is enough: the second pass removes what rounding left
            fresh = fresh - fresh @ basis @ basis.mT
        fresh = torch.linalg.qr(fresh.mT).Q.mT * length
        result[k] = torch.cat([core_PNQ, fresh.view(missing, *core_PNQ.shape[1:])])
        result[k - 1] = torch.cat([left, left.new_zeros(*left.shape[:2], missing)], dim=2)
    return result


@dataclass(frozen=True, kw_only=True)
class GaugeChange:
    """X and Y of every bond, the outer ones (1 x 1) included."""

    x: tuple[Tensor, ...]
    """(K, K') per bond."""
    y: tuple[Tensor, ...]
    """(K', K) per bond."""

    def new_directions(self, bond: int) -> Tensor:
        """Return which directions of a bond (the outer ones counted) the old chain lacks, (K',)."""
        lengths = self.x[bond].norm(dim=0)
        return lengths <= _RELATIVE_CUTOFF * lengths.max()


def gauge_change(old: Chain, new: Chain) -> GaugeChange:
    """Return X and Y with G'_k ~ Y_{k-1} G_k X_k: least squares of the blocks left and right of every bond.

    Directions that the old chain lacks (`enrich`) get zeros in X, and in Y what rounding leaves. In O(d n r^3).
    """
    x = _left_changes(old, new)
    mirrored = ([core.permute(2, 1, 0) for core in reversed(chain)] for chain in (old, new))
    y = [change.mT for change in reversed(_left_changes(*mirrored))]
    return GaugeChange(x=tuple(x), y=tuple(y))


def _left_changes(old: Chain, new: Chain) -> list[Tensor]:
    """Return X per bond: the least squares solution of (old left block) X = (new left block).

    With (old left block) = Q R, X = R^+ (Q^T new); Q is never formed, it is carried from core to core.
    """
    one = torch.ones(1, 1, dtype=old[0].dtype, device=old[0].device)
    changes, r_KQ, mixed_KQ = [one], one, one
    for old_PNQ, new_PNQ in zip(old, new, strict=True):
        carried = torch.tensordot(r_KQ, old_PNQ, 1)
        q, r_KQ = torch.linalg.qr(carried.flatten(0, 1))
        mixed_KQ = q.mT @ torch.tensordot(mixed_KQ, new_PNQ, 1).flatten(0, 1)
        check_finite([r_KQ, mixed_KQ], "a bond of the chain")
        changes.append(torch.linalg.pinv(r_KQ, rtol=_RELATIVE_CUTOFF) @ mixed_KQ)
    changes[-1] = one
    return changes


def transport_gradient(change: GaugeChange, k: int, gradient_PNQ: Tensor) -> Tensor:
    """Return the gradient of core k of the new chain: X_{k-1}^T grad Y_k^T for every slice (the chain rule)."""
    half = torch.tensordot(change.x[k].mT, gradient_PNQ, 1)
    return torch.tensordot(half, change.y[k + 1].mT, 1)


def transport_variance(change: GaugeChange, k: int, variance_PNQ: Tensor) -> Tensor:
    """Return the second moment of core k of the new chain, if the entries of the old gradient are uncorrelated.

    A sum of uncorrelated terms has the sum of their second moments: the squares of the matrices of
    `transport_gradient` carry it, so it cannot turn negative. AdamW keeps no correlations that could do better.
    New directions, which no gradient has met, get the mean of the others: hardly any would mean huge steps.
    """
    half = torch.tensordot(change.x[k].mT.square(), variance_PNQ, 1)
    moved = torch.tensordot(half, change.y[k + 1].mT.square(), 1)
    new_PQ = change.new_directions(k)[:, None] | change.new_directions(k + 1)
    known = moved.transpose(1, 2)[~new_PQ]
    mean = known.mean() if len(known) else variance_PNQ.mean()
    return torch.where(new_PQ[:, None], mean, moved)

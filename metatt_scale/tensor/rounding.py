"""TT-rounding: the nearest-by-truncation chain of smaller ranks, with an error that is known, not guessed.

Shape legend: P left bond, N mode, Q right bond, K kept rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metatt_scale.tensor.canonical import canonicalise
from metatt_scale.tensor.cores import Chain, check_chain, norm


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """What happened at one bond."""

    singular_values: Tensor
    """Spectrum before the cut, largest first."""
    kept_rank: int
    """Singular values kept."""
    discarded_weight: float
    """Sum of the squares of those discarded (absolute: divide by the squared norm for a relative one)."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A rounded chain and its account."""

    cores: list[Tensor]
    """Left-canonical: the last core carries the norm."""
    bonds: tuple[Truncation, ...]
    """One entry per inner bond, left to right."""

    @property
    def predicted_error(self) -> float:
        """Frobenius norm of (rounded - original): the cuts are orthogonal, so their weights add up exactly."""
        return math.sqrt(sum(bond.discarded_weight for bond in self.bonds))


def kept_rank(singular_values: Tensor, max_rank: int | None, max_discarded_weight: float) -> int:
    """Return the smallest rank whose discarded weight stays within the bound, capped at `max_rank`, at least 1."""
    tail = singular_values.square().flip(0).cumsum(0).flip(0)  # tail[k]: weight discarded when k are kept
    within = int((tail > max_discarded_weight).sum())
    cap = len(singular_values) if max_rank is None else max_rank
    return max(1, min(within, cap))


def round_chain(cores: Chain, *, max_ranks: int | Sequence[int] | None = None, max_rel_error: float = 0.0) -> Rounded:
    """Round a chain to smaller ranks (TT-rounding, Oseledets 2011, algorithm 2).

    The chain is made right-canonical, then truncated left to right, always at the orthogonality centre: there
    the discarded singular values are the error. A QR before each SVD keeps every SVD at r x r. Computed in
    float64, returned in the dtype of the input.

    Args:
        cores: the chain.
        max_ranks: cap of every bond, or one per inner bond; `None` caps nothing.
        max_rel_error: bound on |rounded - original| / |original| (Frobenius), shared evenly by the bonds. With 0,
            only a cap cuts.

    Raises:
        ValueError: not a chain, a rank below 1, a negative bound, or entries that are not finite.
    """
    check_chain(cores)
    caps = _caps(max_ranks, len(cores) - 1)
    if not 0 <= max_rel_error < math.inf:
        raise ValueError(f"max_rel_error is {max_rel_error}; give a number of at least 0")
    if not all(bool(torch.isfinite(core).all()) for core in cores):
        raise ValueError("the chain holds values that are not finite; a chain with NaN or infinity cannot be rounded")
    dtype = cores[0].dtype
    moving = canonicalise([core.to(torch.float64) for core in cores], 0)
    budget = (max_rel_error * float(norm(moving))) ** 2 / max(1, len(caps))
    bonds = []
    for k, cap in enumerate(caps):
        p, n, _ = moving[k].shape
        q_PNxK, r_KQ = torch.linalg.qr(moving[k].flatten(0, 1))
        u, s, vh = torch.linalg.svd(r_KQ, full_matrices=False)
        kept = kept_rank(s, cap, budget)
        bonds.append(Truncation(singular_values=s, kept_rank=kept, discarded_weight=float(s[kept:].square().sum())))
        moving[k] = (q_PNxK @ u[:, :kept]).view(p, n, kept)
        moving[k + 1] = torch.tensordot(s[:kept, None] * vh[:kept], moving[k + 1], 1)  # (K, Q) x (Q, N', Q')
    return Rounded(cores=[core.to(dtype) for core in moving], bonds=tuple(bonds))


def _caps(max_ranks: int | Sequence[int] | None, n_bonds: int) -> tuple[int | None, ...]:
    caps = (max_ranks,) * n_bonds if max_ranks is None or isinstance(max_ranks, int) else tuple(max_ranks)
    if len(caps) != n_bonds:
        raise ValueError(f"max_ranks has {len(caps)} entries; the chain has {n_bonds} inner bonds")
    if any(cap is not None and cap < 1 for cap in caps):
        raise ValueError(f"max_ranks is {max_ranks}; every rank must be at least 1")
    return caps

"""The DMRG-inspired sweep: a chain of smaller ranks, with an account of what was cut off.

Paper algorithm 1 is a two-site rounding sweep: merge two neighbours, cut by a truncated SVD, split, go on to the
right, and then back to the left. It solves no local problem (`training.local` does), so "DMRG" names where the idea
comes from. Where the chain is right-canonical before the first cut, every cut is made at the orthogonality centre:
then the sweep is TT-rounding (Oseledets 2011, algorithm 2), and the discarded singular values are the error. On a
chain as training leaves it they are not, and the weights of the cuts say little about the error.

Shape legend: P left bond, N mode, Q right bond, K the bond that is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metatt_scale.tensor.canonical import canonicalise, svd
from metatt_scale.tensor.cores import Chain, check_chain, check_finite

_TINY = 1e-300

Scores = Callable[[int, Tensor, Tensor], Tensor]
"""(bond, singular values (K,), right singular vectors as rows (K, K') in the coordinates of that bond) -> what each
singular value is worth (K,), at least 0."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What happened at one bond."""

    singular_values: Tensor
    """Spectrum before the cut, largest first."""
    kept: Tensor
    """Indices of those that were kept, ascending: the largest ones, unless scores decided otherwise."""
    discarded_weight: float
    """Sum of the squares of the others (absolute: divide by the squared norm for a relative one)."""


@dataclass(frozen=True, kw_only=True)
class Swept:
    """A chain after a sweep."""

    cores: list[Tensor]
    """In right-canonical gauge: all cores but the first are right isometries, the first one carries the norm, and its
    columns are orthogonal: the bonds have the basis of the singular vectors."""
    cuts: tuple[Cut, ...]
    """One per inner bond, left to right."""

    @property
    def predicted_error(self) -> float:
        """Norm of (swept - original) if all cuts were made at the centre: sqrt(sum of the discarded weights)."""
        return math.sqrt(sum(cut.discarded_weight for cut in self.cuts))


def sweep(
    cores: Chain,
    *,
    max_ranks: int | Sequence[int] | None = None,
    min_rank: int = 1,
    max_discarded_weight: float | None = None,
    scores: Scores | None = None,
    canonical: bool = True,
) -> Swept:
    """Cut every bond once from left to right, and return right to left (paper algorithm 1).

    A QR of each core comes before its SVD, so that no SVD is larger than K x K. Computed in float64, returned in the
    type of the input. A bond is never left wider than its neighbours make useful, whatever the rank asked for. In a
    chain that is zero, as before training, no direction is worth more: caps keep the leading ones of its other cores.

    Args:
        cores: the chain.
        max_ranks: cap of every bond, or one per inner bond; None caps nothing.
        min_rank: singular values kept at least, as far as there are so many.
        max_discarded_weight: cut as much as this part of a bond's weight allows, the sum of the squares of its
            singular values (of `scores` where given), in [0, 1). None: only the cap cuts.
        scores: what singular values are worth, instead of their squares.
        canonical: bring the chain to right-canonical form first, so that errors are known. Without, this is the
            algorithm as printed.

    Raises:
        ValueError: no chain, a rank below 1, a bound outside [0, 1), or `scores` without `canonical`; of the class
            NotFiniteError where the chain, or a product of its cores, is not finite.
    """
    _check(cores, min_rank, max_discarded_weight)
    _check_scores(scores, canonical)
    caps, dtype = _caps(max_ranks, len(cores) - 1), cores[0].dtype
    moving = [core.to(torch.float64) for core in cores]
    at_centre = canonicalise(moving, 0)
    if not at_centre[0].any():
        return _cut_zero(at_centre, caps, dtype)
    if canonical:
        moving = at_centre
    cuts = []
    for k, cap in enumerate(caps):
        p, n, _ = moving[k].shape
        u_PNxK, s_K, rows_KQ = _svd_of_pair(moving, k, right_is_isometry=canonical)
        worth_K = s_K.square() if scores is None else scores(k, s_K, rows_KQ / s_K[:, None].clamp_min(_TINY))
        kept = _choose(worth_K, cap, min_rank, max_discarded_weight)
        cuts.append(_account(s_K, kept))
        moving[k] = u_PNxK[:, kept].view(p, n, -1)
        moving[k + 1] = torch.tensordot(rows_KQ[kept], moving[k + 1], 1)
    _return(moving)
    return Swept(cores=[core.to(dtype) for core in moving], cuts=tuple(cuts))


def _cut_zero(cores: list[Tensor], caps: Sequence[int | None], dtype: torch.dtype) -> Swept:
    """Cut a right-canonical chain of zeros: SVDs would replace all its cores by arbitrary ones."""
    cuts = []
    for k, cap in enumerate(caps):
        s_K = cores[k].new_zeros(cores[k].shape[2])
        cuts.append(_account(s_K, torch.arange(min(len(s_K), cap or len(s_K)))))
        cores[k], cores[k + 1] = cores[k][:, :, cuts[-1].kept], cores[k + 1][cuts[-1].kept]
    return Swept(cores=[core.to(dtype) for core in canonicalise(cores, 0)], cuts=tuple(cuts))


def cut_pair(
    theta_PNNQ: Tensor, *, max_rank: int | None, min_rank: int, max_discarded_weight: float | None
) -> tuple[Tensor, Tensor, Cut]:
    """Split two merged cores: U is the left one, s V^T the right one. The rules are those of `sweep`."""
    p, n, m, q = theta_PNNQ.shape
    u, s_K, vh = svd(theta_PNNQ.reshape(p * n, m * q))
    kept = _choose(s_K.square(), max_rank, min_rank, max_discarded_weight)
    left, right = u[:, kept].view(p, n, -1), (s_K[kept, None] * vh[kept]).view(-1, m, q)
    return left, right, _account(s_K, kept)


def _svd_of_pair(cores: Sequence[Tensor], k: int, *, right_is_isometry: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (P N, K) and s of cores k and k + 1 merged, and the rows (K, Q) that make core k + 1 to s V^T.

    The merged matrix is Q_k (R_k L) Q_{k+1} with isometries Q, so its SVD is that of R_k L, at most K x K; and
    s V^T = U^T (merged) = (u^T R_k) G_{k+1} needs no inverse of what may be singular.
    """
    q_PNxK, r_KQ = torch.linalg.qr(cores[k].flatten(0, 1))
    pair = r_KQ
    if not right_is_isometry:
        pair = r_KQ @ torch.linalg.qr(cores[k + 1].flatten(1, 2).mT, mode="r").R.mT
    u, s_K, _ = svd(pair)
    return q_PNxK @ u, s_K, u.mT @ r_KQ


def _return(cores: list[Tensor]) -> None:
    """Sweep from right to left over a chain whose left cores are isometries, in place of the list.

    Nothing is cut any more: the ranks are the targets already. G_{k-1} <- U S, G_k <- V^T.
    """
    for k in range(len(cores) - 1, 0, -1):
        _, n, q = cores[k].shape
        q_NQxK, r_KP = torch.linalg.qr(cores[k].flatten(1, 2).mT)
        u, s, vh = svd(r_KP.mT)
        cores[k] = (vh @ q_NQxK.mT).reshape(-1, n, q)
        cores[k - 1] = torch.tensordot(cores[k - 1], u * s, 1)


def _choose(worth_K: Tensor, cap: int | None, min_rank: int, max_discarded_weight: float | None) -> Tensor:
    """Return the indices of the singular values to keep, ascending."""
    order = worth_K.argsort(descending=True, stable=True)
    count = len(worth_K) if cap is None else min(cap, len(worth_K))
    if max_discarded_weight is not None:
        # tail[i]: worth of what is discarded when i are kept
        tail = worth_K[order].flip(0).cumsum(0).flip(0)
        count = min(count, max(min_rank, int((tail > max_discarded_weight * tail[0]).sum())))
    return order[:count].sort().values


def _account(s_K: Tensor, kept: Tensor) -> Cut:
    gone = torch.ones_like(s_K, dtype=torch.bool)
    gone[kept] = False
    return Cut(singular_values=s_K, kept=kept, discarded_weight=float(s_K[gone].square().sum()))


def _caps(max_ranks: int | Sequence[int] | None, n_bonds: int) -> tuple[int | None, ...]:
    caps = (max_ranks,) * n_bonds if max_ranks is None or isinstance(max_ranks, int) else tuple(max_ranks)
    if len(caps) != n_bonds:
        raise ValueError(f"max_ranks has {len(caps)} entries; the chain has {n_bonds} inner bonds")
    if any(cap is not None and cap < 1 for cap in caps):
        raise ValueError(f"max_ranks is {max_ranks}; every rank must be at least 1")
    return caps


def _check(cores: Chain, min_rank: int, max_discarded_weight: float | None) -> None:
    check_chain(cores)
    check_finite(cores, "the chain")
    if min_rank < 1:
        raise ValueError(f"min_rank is {min_rank}; a bond keeps at least 1 singular value")
    if max_discarded_weight is not None and not 0 <= max_discarded_weight < 1:
        raise ValueError(
            f"max_discarded_weight is {max_discarded_weight}; give the part of a bond's weight that may go, in [0, 1)"
        )


def _check_scores(scores: Scores | None, canonical: bool) -> None:
    if scores is not None and not canonical:
        raise ValueError("scores need singular vectors that are orthonormal; leave `canonical` true")

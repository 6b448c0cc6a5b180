"""The chain: a list of cores, and what can be asked of it without changing it.

A tensor train of order d stores a tensor of shape (n_1, ..., n_d) as d cores (paper eq. 1)

    T[i_1, ..., i_d] = G_1[i_1] G_2[i_2] ... G_d[i_d]

Shape legend: P left bond, N mode, Q right bond (`core_PNQ`). The outer bonds of the chain are 1, so there
are d - 1 inner bonds; their sizes are the TT-ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Chain = Sequence[Tensor]


class NotFiniteError(ValueError):
    """Numbers that are not finite, where a decomposition needs finite ones."""


def check_finite(tensors: Sequence[Tensor], what: str) -> None:
    """Refuse NaN and infinity: of a matrix that holds any there is no decomposition.

    Raises:
        NotFiniteError: names what they are of.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NotFiniteError(f"{what} holds values that are not finite; there is no decomposition of it")


def check_chain(cores: Chain) -> None:
    """Refuse a list of tensors that is not a chain.

    Raises:
        ValueError: a core is not 3-way, neighbours disagree on their bond, or an outer bond is not 1.
    """
    if not cores:
        raise ValueError("a chain needs at least one core, got none")
    for k, core_PNQ in enumerate(cores):
        if core_PNQ.ndim != 3:
            raise ValueError(f"core {k} has shape {tuple(core_PNQ.shape)}; a core is (left bond, mode, right bond)")
    for k, (left, right) in enumerate(itertools.pairwise(cores)):
        if left.shape[2] != right.shape[0]:
            raise ValueError(
                f"bond {k} does not fit: core {k} has shape {tuple(left.shape)}, core {k + 1} {tuple(right.shape)}; "
                "the right bond of one must equal the left bond of the next"
            )
    if cores[0].shape[0] != 1 or cores[-1].shape[2] != 1:
        raise ValueError(f"outer bonds are {cores[0].shape[0]} and {cores[-1].shape[2]}; both must be 1")


def ranks(cores: Chain) -> tuple[int, ...]:
    """Return the TT-ranks: the sizes of the d - 1 inner bonds, left to right."""
    return tuple(core_PNQ.shape[2] for core_PNQ in cores[:-1])


def mode_sizes(cores: Chain) -> tuple[int, ...]:
    """Return the sizes of the d modes."""
    return tuple(core_PNQ.shape[1] for core_PNQ in cores)


def materialise(cores: Chain) -> Tensor:
    """Return the dense tensor (n_1, ..., n_d). Its size is the product of the modes: for tests and small chains."""
    result = cores[0]  # (1, n_1, q)
    for core_PNQ in cores[1:]:
        result = torch.tensordot(result, core_PNQ, 1)  # (..., q) x (q, n, q') -> (..., n, q')
    return result.squeeze(0).squeeze(-1)


def inner(a: Chain, b: Chain) -> Tensor:
    """Return <A, B>, the sum over all entries of A times B, in O(d n r^3) without a dense tensor.

    Raises:
        ValueError: the chains have different mode sizes.
    """
    if mode_sizes(a) != mode_sizes(b):
        raise ValueError(f"inner product of modes {mode_sizes(a)} and {mode_sizes(b)}; they must be equal")
    left_PP = torch.ones(1, 1, dtype=a[0].dtype, device=a[0].device)  # environment: (bond of a, bond of b)
    for a_PNQ, b_PNQ in zip(a, b, strict=True):
        half = torch.tensordot(left_PP, b_PNQ, 1)  # (P_a, N, Q_b)
        left_PP = a_PNQ.flatten(0, 1).mT @ half.flatten(0, 1)  # (Q_a, Q_b)
    return left_PP.squeeze()


def norm(cores: Chain) -> Tensor:
    """Return the Frobenius norm of the tensor.

    It is the norm of the last core once the others are isometries; sqrt(<T, T>) would lose half the digits of
    a small difference.
    """
    carried_QQ: Tensor | None = None
    for core_PNQ in cores:
        if carried_QQ is not None:
            core_PNQ = torch.tensordot(carried_QQ, core_PNQ, 1)
        carried_QQ = torch.linalg.qr(core_PNQ.flatten(0, 1), mode="r").R
    assert carried_QQ is not None
    return torch.linalg.matrix_norm(carried_QQ)


def subtract(a: Chain, b: Chain) -> list[Tensor]:
    """Return the chain of A - B; its ranks are the sums of the ranks."""
    if mode_sizes(a) != mode_sizes(b):
        raise ValueError(f"difference of chains with modes {mode_sizes(a)} and {mode_sizes(b)}; they must be equal")
    if len(a) == 1:
        return [a[0] - b[0]]
    result = []
    for k, (a_PNQ, b_PNQ) in enumerate(zip(a, b, strict=True)):
        if k == 0:
            result.append(torch.cat([a_PNQ, -b_PNQ], dim=2))
        elif k == len(a) - 1:
            result.append(torch.cat([a_PNQ, b_PNQ], dim=0))
        else:
            (p, n, q), (p2, _, q2) = a_PNQ.shape, b_PNQ.shape
            block = a_PNQ.new_zeros(p + p2, n, q + q2)
            block[:p, :, :q], block[p:, :, q:] = a_PNQ, b_PNQ
            result.append(block)
    return result

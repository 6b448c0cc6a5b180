"""Gauges of the chain: isometries left and right of an orthogonality centre.

A chain does not change when G, G^-1 is put on a bond. The mixed canonical gauge uses this freedom: every core
left of the centre is a left isometry (its unfolding (P N) x Q has orthonormal columns), every core right of it
a right isometry (P x (N Q) has orthonormal rows). The centre then carries the norm, and its singular values on
a bond are those of the whole tensor across that bond.

Shape legend: P left bond, N mode, Q right bond, K the smaller side of a QR.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatt_scale.tensor.cores import Chain, check_finite


def shift_right(cores: list[Tensor], k: int) -> None:
    """Make core k a left isometry and push the rest into core k + 1, in place of the list."""
    p, n, _ = cores[k].shape
    q_PNxK, r_KQ = _unique_qr(cores[k].flatten(0, 1))
    cores[k] = q_PNxK.view(p, n, -1)
    cores[k + 1] = torch.tensordot(r_KQ, cores[k + 1], 1)  # (K, Q) x (Q, N', Q')


def shift_left(cores: list[Tensor], k: int) -> None:
    """Make core k a right isometry and push the rest into core k - 1, in place of the list."""
    _, n, q = cores[k].shape
    q_NQxK, r_KP = _unique_qr(cores[k].flatten(1, 2).mT)
    cores[k] = q_NQxK.mT.reshape(-1, n, q)
    cores[k - 1] = torch.tensordot(cores[k - 1], r_KP.mT, 1)  # (P', N', P) x (P, K)


def _unique_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the QR whose R has no negative diagonal, so that a core that is an isometry already stays as it is."""
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return q * signs, signs[:, None] * r


def canonicalise(cores: Chain, centre: int) -> list[Tensor]:
    """Return the same tensor with its orthogonality centre at core `centre` (0 is right-, d - 1 left-canonical).

    Raises:
        ValueError: no such core.
    """
    if not 0 <= centre < len(cores):
        raise ValueError(f"centre is {centre}; a chain of {len(cores)} cores has centres 0 to {len(cores) - 1}")
    result = list(cores)
    for k in range(centre):
        shift_right(result, k)
    for k in range(len(result) - 1, centre, -1):
        shift_left(result, k)
    return result


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of a matrix: U, s, V^T.

    Raises:
        NotFiniteError: it holds NaN or infinity, where LAPACK's routines fail or never end.
    """
    check_finite([matrix], "a bond of the chain")
    return torch.linalg.svd(matrix, full_matrices=False)


def singular_values(cores: Chain) -> list[Tensor]:
    """Return the singular values of the tensor across each inner bond, largest first.

    The spectrum of bond k is that of the matrix with the first k + 1 modes as rows. The largest SVD is r x r.

    Raises:
        NotFiniteError: the chain holds NaN or infinity, or products of its cores are too large.
    """
    moving = canonicalise(cores, 0)
    spectra = []
    for k in range(len(moving) - 1):
        r_KQ = torch.linalg.qr(moving[k].flatten(0, 1), mode="r").R
        check_finite([r_KQ], "a bond of the chain")
        spectra.append(torch.linalg.svdvals(r_KQ))
        shift_right(moving, k)
    return spectra

"""How large the deltas in use are, all together.

A chain holds a delta for every index of its modes, as wide as the widest module. Where modules differ in width, or
not every layer has every projection, part of it is never used, and the norm of the chain is only an upper bound.

Shape legend: I input width, O output width, P and Q bonds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metatt_scale.adapter.modes import ChainSpec, factors
from metatt_scale.adapter.targets import Target


def norm_in_use(
    spec: ChainSpec, cores: Sequence[Tensor], targets: Sequence[Target], task: int | None = None
) -> float:
    """Return sqrt(sum over modules of |A[:d_in] C B[:, :d_out]|^2), the Frobenius norm of all deltas without alpha.

    With A = Q_A R_A and B^T = Q_B R_B each term is |R_A C R_B^T|: no module's delta is made.
    """
    a_LMIP, c_LMPQ, b_LMQO = factors(spec, cores, task=task)
    seen: dict[tuple[int, ...], Tensor] = {}

    def small(side: int, table: Tensor, target: Target, width: int) -> Tensor:
        key = (side, min(target.layer, len(table) - 1), min(target.projection, table.shape[1] - 1), width)
        if key not in seen:
            matrix = table[key[1], key[2]]
            tall = matrix[:width] if side == 0 else matrix[:, :width].mT
            seen[key] = torch.linalg.qr(tall, mode="r").R
        return seen[key]

    squares = []
    for target in targets:
        c_PQ = c_LMPQ[min(target.layer, len(c_LMPQ) - 1), min(target.projection, c_LMPQ.shape[1] - 1)]
        left, right = small(0, a_LMIP, target, target.d_in), small(1, b_LMQO, target, target.d_out)
        squares.append(torch.linalg.matrix_norm(left @ c_PQ @ right.mT).square().sum())
    return float(torch.stack(squares).sum().sqrt())

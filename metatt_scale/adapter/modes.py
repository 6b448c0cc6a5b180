"""One description of every adapter of the family: the modes along the chain, their sizes, the ranks.

The chain stores all deltas at once: entry (input i, layer l, projection m, output o) is delta W[l, m][i, o]
(paper eq. 2), with the output split into (head, head width) in 5D (eq. 3). For one layer and projection the
chain is three matrices,

    delta W[l, m] = A  C[l, m]  B        A: input x r,  C: r x r',  B: r' x output

where A holds the cores up to the input mode, B those from the output (or head) mode on, C what is between. In
the usual order A = G1, C[l, m] = G2[l] G3[m] and B = G4 (5D: G4[h] G5 side by side over h). In other orders A
or B carries a layer or projection index of its own; the same three factors serve every order. A task core (eq. 6)
gives C a task index, C[l, m, t] = G2[l] G3[t] G4[m]; the task stands between input and output.

Two relatives are descriptions of the same kind. LoTR (Bershatsky et al. 2024) has one middle core for layer and
projection together, the mode `site` = layer * M + projection. LoRTA (Hounie et al. 2024) is the CP form over 5D's
modes: a chain whose middle slices are diagonal, stored as (bond, mode).

Shape legend: L layers, M projections, T tasks, I input width, O output width, H heads, J head width; P, Q
bonds, N a mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = {
    "metatt_4d": ("input", "layer", "projection", "output"),
    "metatt_5d": ("input", "layer", "projection", "head", "output"),
    "metatt_4p1d": ("input", "layer", "task", "projection", "output"),
    "metatt_5p1d": ("input", "layer", "task", "projection", "head", "output"),
    "lotr": ("input", "site", "output"),
    "lorta": ("input", "layer", "projection", "head", "output"),
}
"""Modes of each kind in the paper's order."""

# Axes of a contracted block of cores between its two outer bonds; every mode has its place (`site` fills two).
_AXES = ("layer", "projection", "task", "input", "head", "output")


class Factors(NamedTuple):
    """The three factors of all deltas. Axes of size 1 stand for "the same for every index"."""

    a_LMIP: Tensor
    c_LMPQ: Tensor
    """(L, M, T, P, Q) where the chain has a task core and no task is chosen."""
    b_LMQO: Tensor


@dataclass(frozen=True, kw_only=True)
class ChainSpec:
    """Modes in chain order with their sizes, and one rank per inner bond."""

    modes: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    diagonal: bool = False
    """The slices of middle cores are diagonal, and stored as (bond, mode)."""
    projections: int = 1
    """M, where the mode `site` stands for layer and projection."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape (left bond, mode, right bond) of each core as it is stored; (bond, mode) of a diagonal one."""
        bonds = (1, *self.ranks, 1)
        full = tuple(zip(bonds[:-1], self.sizes, bonds[1:], strict=True))
        return (full[0], *(shape[:2] for shape in full[1:-1]), full[-1]) if self.diagonal else full

    @property
    def n_tasks(self) -> int | None:
        """Size of the task mode; None where the chain has none."""
        return self.sizes[self.modes.index("task")] if "task" in self.modes else None

    @property
    def n_parameters(self) -> int:
        """Number of trained values: 2 D r + (L + M) r^2 for 4D with one width D and one rank r."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def middle_bonds(self) -> tuple[int, int]:
        """The bonds left and right of C, the product of the middle cores."""
        modes, bonds = self._forward_order()
        start, end = _cut(modes)
        return bonds[start - 1], bonds[end - 1]

    def _forward_order(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        if _is_reversed(self.modes):
            return self.modes[::-1], self.ranks[::-1]
        return self.modes, self.ranks


def check_order(modes: Sequence[str], kind: str) -> tuple[str, ...]:
    """Return the order of modes if it is a permutation of the kind's modes that three factors can express.

    Raises:
        ValueError: a mode is missing, doubled or unknown, or the input stands between head and output.
    """
    order = tuple(modes)
    if sorted(order) != sorted(KINDS[kind]):
        raise ValueError(
            f"adapter.mode_order is {list(order)}; {kind} needs each of {', '.join(KINDS[kind])} exactly once"
        )
    if "head" in order:
        first, middle, _ = sorted(("input", "head", "output"), key=order.index)
        if middle == "input":
            raise ValueError(
                f"adapter.mode_order is {list(order)}; the input mode may not stand between head and output "
                f"(move `input` before `{first}` or to the end)"
            )
    if "task" in order:
        forward = order[::-1] if _is_reversed(order) else order
        start, end = _cut(forward)
        if not start <= forward.index("task") < end:
            raise ValueError(
                f"adapter.mode_order is {list(order)}; the task mode must stand between input and output, because "
                "input and output are multiplied for the rows of all tasks at once"
            )
    return order


def full_cores(spec: ChainSpec, cores: Sequence[Tensor]) -> list[Tensor]:
    """Return all cores as G_PNQ, diagonal slices written out."""
    if not spec.diagonal:
        return list(cores)
    middle = [torch.diag_embed(core_PN.mT).transpose(0, 1) for core_PN in cores[1:-1]]
    return [cores[0], *middle, cores[-1]]


def factors(spec: ChainSpec, cores: Sequence[Tensor], scale: float = 1.0, task: int | None = None) -> Factors:
    """Contract the chain into the three factors of all deltas; `scale` (alpha) goes into C.

    With a task core, C is that of `task`, or of all tasks where none is given.

    Costs O((L M + I + O) r^2) in the usual order: made once per optimizer step, not once per layer.
    """
    modes, cores = spec.modes, full_cores(spec, cores)
    if _is_reversed(modes):  # output before input: the same numbers read from the right end
        modes, cores = modes[::-1], [core_PNQ.permute(2, 1, 0) for core_PNQ in reversed(cores)]
    start, end = _cut(modes)
    a = _contract(modes[:start], cores[:start], spec.projections)  # (1, L, M, 1, I, 1, 1, P)
    b = _contract(modes[end:], cores[end:], spec.projections)  # (Q, L, M, 1, 1, H, J, 1)
    if start == end:  # nothing between input and output: C is the identity on their bond
        eye_PQ = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        c_LMPQ = eye_PQ[None, None]
    else:
        c = _contract(modes[start:end], cores[start:end], spec.projections)  # (P, L, M, T, 1, 1, 1, Q)
        c_LMTPQ = c[:, :, :, :, 0, 0, 0, :].permute(1, 2, 3, 0, 4)
        if spec.n_tasks is None:  # all tasks share the chain
            task = 0
        c_LMPQ = c_LMTPQ if task is None else c_LMTPQ[:, :, task]
    return Factors(
        a_LMIP=a[0, :, :, 0, :, 0, 0, :],
        c_LMPQ=scale * c_LMPQ,
        b_LMQO=b[..., 0].squeeze((3, 4)).flatten(3, 4).permute(1, 2, 0, 3),
    )


def initial_cores(spec: ChainSpec, init: str | None, std: float, seed: int) -> list[Tensor]:
    """Return the cores at the start (paper §D.4), fp32 on the CPU, a pure function of the seed.

    `init` is one letter pair per core: `ze` zeros, `no` normal(0, std), `id` the identity per slice (for the
    outer cores, which are matrices, the leading rows or columns of the identity). Absent: ze-no-...-no-id, and for
    diagonal slices no-id-...-id-ze: a product of many small normals would hardly let a gradient through, and LoRTA's
    authors start from a zero in the last factor.
    """
    middle = len(spec.modes) - 2
    usual = ["no", *["id"] * middle, "ze"] if spec.diagonal else ["ze", *["no"] * middle, "id"]
    pairs = init.split("-") if init else usual
    assert len(pairs) == len(spec.modes), "the recipe checks this"
    generator = torch.Generator().manual_seed(seed)
    cores = []
    for pair, shape in zip(pairs, spec.shapes, strict=True):
        if pair == "no":
            core = torch.randn(shape, generator=generator) * std
        else:
            core = torch.zeros(shape) if pair == "ze" else _identity(shape)
        cores.append(core)
    return cores


def _identity(shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 2:  # the diagonals of identities
        return torch.ones(shape)
    p, n, q = shape
    if p == 1:
        return torch.eye(n, q)[None]
    if q == 1:
        return torch.eye(p, n)[..., None]
    return torch.eye(p, q)[:, None, :].repeat(1, n, 1)


def _is_reversed(modes: Sequence[str]) -> bool:
    return modes.index("output") < modes.index("input")


def _cut(modes: Sequence[str]) -> tuple[int, int]:
    """Return (start, end): A is modes[:start], C modes[start:end], B modes[end:]."""
    return modes.index("input") + 1, min(modes.index(m) for m in ("head", "output") if m in modes)


def _contract(modes: Sequence[str], cores: Sequence[Tensor], projections: int) -> Tensor:
    """Contract neighbouring cores to (P, L, M, T, I, H, J, Q); modes that are not among them have size 1."""
    block: Tensor | None = None
    for mode, core_PNQ in zip(modes, cores, strict=True):
        if block is None:
            joined = core_PNQ.reshape(core_PNQ.shape[0], *[1] * len(_AXES), *core_PNQ.shape[1:])
        else:
            joined = torch.tensordot(block, core_PNQ, 1)  # (P, *axes, N, Q)
        axis = 1 + _AXES.index("layer" if mode == "site" else mode)
        block = joined.movedim(-2, axis).squeeze(axis + 1)  # the mode takes the place of its axis of size 1
        if mode == "site":
            block = block.squeeze(axis + 1).unflatten(axis, (-1, projections))
    assert block is not None
    return block

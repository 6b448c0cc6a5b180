"""One description of every adapter of the family: the modes along the chain, their sizes, the ranks.

The chain stores all deltas at once: entry (input i, layer l, projection m, output o) is delta W[l, m][i, o]
(paper eq. 2), with the output split into (head, head width) in 5D (eq. 3). For one layer and projection the
chain is three matrices,

    delta W[l, m] = A  C[l, m]  B        A: input x r,  C: r x r',  B: r' x output

where A holds the cores up to the input mode, B those from the output (or head) mode on, C what is between. In
the usual order A = G1, C[l, m] = G2[l] G3[m] and B = G4 (5D: G4[h] G5 side by side over h). In other orders A
or B carries a layer or projection index of its own; the same three factors serve every order.

Shape legend: L layers, M projections, I input width, O output width, H heads, J head width; P, Q bonds.
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
}
"""Modes of each kind in the paper's order."""

# Axes of a contracted block of cores between its two outer bonds; every mode has its place.
_AXES = ("layer", "projection", "input", "head", "output")


class Factors(NamedTuple):
    """The three factors of all deltas. Axes of size 1 stand for "the same for every index"."""

    a_LMIP: Tensor
    c_LMPQ: Tensor
    b_LMQO: Tensor


@dataclass(frozen=True, kw_only=True)
class ChainSpec:
    """Modes in chain order with their sizes, and one rank per inner bond."""

    modes: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shape (left bond, mode, right bond) of each core."""
        bonds = (1, *self.ranks, 1)
        return tuple(zip(bonds[:-1], self.sizes, bonds[1:], strict=True))

    @property
    def n_parameters(self) -> int:
        """Number of trained values: 2 D r + (L + M) r^2 for 4D with one width D and one rank r."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def lora_rank(self) -> int:
        """Rank of the exact LoRA form: the bond to the left of B."""
        modes, bonds = self._forward_order()
        return bonds[_cut(modes)[1] - 1]

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
    return order


def factors(spec: ChainSpec, cores: Sequence[Tensor], scale: float = 1.0) -> Factors:
    """Contract the chain into the three factors of all deltas; `scale` (alpha) goes into C.

    Costs O((L M + I + O) r^2) in the usual order: made once per optimizer step, not once per layer.
    """
    modes = spec.modes
    if _is_reversed(modes):  # output before input: the same numbers read from the right end
        modes, cores = modes[::-1], [core_PNQ.permute(2, 1, 0) for core_PNQ in reversed(cores)]
    start, end = _cut(modes)
    a = _contract(modes[:start], cores[:start])  # (1, L, M, I, 1, 1, P)
    b = _contract(modes[end:], cores[end:])  # (Q, L, M, 1, H, J, 1)
    if start == end:  # nothing between input and output: C is the identity on their bond
        eye_PQ = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        c_LMPQ = eye_PQ[None, None]
    else:
        c = _contract(modes[start:end], cores[start:end])  # (P, L, M, 1, 1, 1, Q)
        c_LMPQ = c[:, :, :, 0, 0, 0, :].permute(1, 2, 0, 3)
    return Factors(
        a_LMIP=a[0, :, :, :, 0, 0, :],
        c_LMPQ=scale * c_LMPQ,
        b_LMQO=b[..., 0].squeeze(3).flatten(3, 4).permute(1, 2, 0, 3),
    )


def initial_cores(spec: ChainSpec, init: str | None, std: float, seed: int) -> list[Tensor]:
    """Return the cores at the start (paper §D.4), fp32 on the CPU, a pure function of the seed.

    `init` is one letter pair per core: `ze` zeros, `no` normal(0, std), `id` the identity per slice (for the
    outer cores, which are matrices, the leading rows or columns of the identity). Absent: ze-no-...-no-id.
    """
    pairs = init.split("-") if init else ["ze", *["no"] * (len(spec.modes) - 2), "id"]
    assert len(pairs) == len(spec.modes), "the recipe checks this"
    generator = torch.Generator().manual_seed(seed)
    cores = []
    for pair, (p, n, q) in zip(pairs, spec.shapes, strict=True):
        if pair == "no":
            core = torch.randn(p, n, q, generator=generator) * std
        elif pair == "ze":
            core = torch.zeros(p, n, q)
        elif p == 1:
            core = torch.eye(n, q)[None]
        elif q == 1:
            core = torch.eye(p, n)[..., None]
        else:
            core = torch.eye(p, q)[:, None, :].repeat(1, n, 1)
        cores.append(core)
    return cores


def _is_reversed(modes: Sequence[str]) -> bool:
    return modes.index("output") < modes.index("input")


def _cut(modes: Sequence[str]) -> tuple[int, int]:
    """Return (start, end): A is modes[:start], C modes[start:end], B modes[end:]."""
    return modes.index("input") + 1, min(modes.index(m) for m in ("head", "output") if m in modes)


def _contract(modes: Sequence[str], cores: Sequence[Tensor]) -> Tensor:
    """Contract neighbouring cores to (P, L, M, I, H, J, Q); modes that are not among them have size 1."""
    block: Tensor | None = None
    for mode, core_PNQ in zip(modes, cores, strict=True):
        if block is None:
            joined = core_PNQ.reshape(core_PNQ.shape[0], *[1] * len(_AXES), *core_PNQ.shape[1:])
        else:
            joined = torch.tensordot(block, core_PNQ, 1)  # (P, *axes, N, Q)
        axis = 1 + _AXES.index(mode)
        block = joined.movedim(-2, axis).squeeze(axis + 1)  # the mode takes the place of its axis of size 1
    assert block is not None
    return block

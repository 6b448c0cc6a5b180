"""From the cores to what each adapted linear multiplies with, once per optimizer step, and the gradients back.

`fold` contracts the chain into the factors A, C, B of every module (y += x A C B) and picks the order of the
products: thin first, or C folded into B.

Shape legend: L layers, M projections, T tasks, I input width, O output width, P, Q the bonds around C.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from metatt_scale.adapter.modes import ChainSpec, Factors, factors
from metatt_scale.adapter.targets import Target


class Operand(NamedTuple):
    """One factor of one module: the leaf that receives its gradient, and the copy that computes."""

    leaf: Tensor
    copy: Tensor


class Operands(NamedTuple):
    """What one module multiplies with: y += (x A) C B, or y += (x A) B with C folded into B (then C is None).

    C is (P, Q), or (T, P, Q) where every row is of a task of its own.
    """

    a: Operand
    c: Operand | None
    b: Operand


@dataclass
class Fold:
    """The operands of all modules, in the order of the targets, and the way of their gradients back to the cores."""

    modules: list[Operands] = field(default_factory=list)
    pairs: list[tuple[GradientEdge, Tensor]] = field(default_factory=list)
    """(edge of the graph back to the cores, leaf): an edge, because a tensor would keep its values alive."""

    def pull_back(self) -> None:
        """Carry what all backward passes left on the leaves to `core.grad`, adding to it."""
        live = [(edge, leaf.grad) for edge, leaf in self.pairs if leaf.grad is not None]
        if live:
            torch.autograd.backward([edge for edge, _ in live], [gradient for _, gradient in live])


ROOM = 64
"""Folded products may take this part of the weights' bytes: below a percent of a training step's peak."""


def folding_pays(bonds: tuple[int, int], targets: Sequence[Target], rows: int | None, room: int, item: int) -> bool:
    """Return whether C is to be folded into B: fewer multiplications, and room for the products.

    Per module and step, forward and backward over N rows (P, Q the bonds, O the output width):
    thin first costs N (4 P Q + 3 Q O): h C twice, its two gradients, and the three products with B;
    folded costs 3 N P O + 3 P Q O: the three products with M = C B, and M and its two gradients once.

    Args:
        bonds: P and Q.
        targets: the adapted modules.
        rows: N of an optimizer step; None where M serves any number of forwards (inference).
        room: bytes that the copies of M may take.
        item: bytes of a value that computes.
    """
    p, q = bonds
    wide = sum(target.d_out for target in targets)
    if item * p * wide > room:
        return False
    if rows is None:
        return p * wide <= q * wide + len(targets) * p * q
    return 3 * p * wide * (rows + q) < rows * (4 * p * q * len(targets) + 3 * q * wide)


def fold(
    spec: ChainSpec,
    cores: Sequence[Tensor],
    alpha: float,
    targets: Sequence[Target],
    *,
    dtype: torch.dtype,
    into_b: bool,
    with_values: bool,
    task: int | None = None,
) -> Fold:
    """Contract the chain and return the operands of every module.

    Args:
        spec: modes, sizes and ranks.
        cores: the parameters.
        alpha: scale, which goes into C.
        targets: the adapted modules.
        dtype: of the copies.
        into_b: fold C into B.
        with_values: leaves hold values of their own, for the reference arithmetic; otherwise they only receive
            gradients, take no memory, and their values mean nothing.
        task: the task all rows are of; C keeps those of all tasks where it is None.
    """
    result = Fold()
    all_factors = factors(spec, cores, alpha, task)
    made: dict[tuple[Any, ...], Operand] = {}

    def operand(key: tuple[Any, ...], node: Tensor, copy: Tensor | None = None) -> Operand:
        if key not in made:
            own = node.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) if copy is None else copy
            made[key] = Operand(_leaf(node, with_values), own)
            if node.requires_grad:
                result.pairs.append((get_gradient_edge(node), made[key].leaf))
        return made[key]

    products = _products(all_factors, targets, dtype) if into_b else {}
    # Taken apart once: picking each module's slice would fill a gradient of the whole factor with zeros for each.
    slices = [[of_layer.unbind(0) for of_layer in factor.unbind(0)] for factor in all_factors]
    for index, target in enumerate(targets):
        places = [_place(factor, target) for factor in all_factors]
        a_IP, c_PQ, b_QO = (of[layer][projection] for of, (layer, projection) in zip(slices, places, strict=True))
        a = operand(("a", places[0], target.d_in), a_IP[: target.d_in])
        if into_b:
            c, b = None, operand(("m", index), *products[index])
        else:
            c, b = operand(("c", places[1]), c_PQ), operand(("b", places[2], target.d_out), b_QO[:, : target.d_out])
        result.modules.append(Operands(a, c, b))
    return result


def _leaf(node: Tensor, with_values: bool) -> Tensor:
    if with_values:
        leaf = node.detach().clone(memory_format=torch.contiguous_format)
    else:
        leaf = node.new_empty(()).detach().expand(node.shape)
    return leaf.requires_grad_(node.requires_grad)


def _products(
    all_factors: Factors, targets: Sequence[Target], dtype: torch.dtype
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return for each target M = C B as a node of the graph and as a copy; one batched product per projection."""
    _, c_LMPQ, b_LMQO = all_factors
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, target in enumerate(targets):
        groups[target.projection, target.d_out].append(index)
    made = {}
    for (projection, d_out), members in groups.items():
        layers = [targets[index].layer for index in members]
        c_LPQ, b_LQO = (_of_projection(factor, projection, layers) for factor in (c_LMPQ, b_LMQO))
        m_LPO = c_LPQ @ b_LQO[..., :d_out]
        for index, node, copy in zip(members, m_LPO.unbind(0), m_LPO.detach().to(dtype).unbind(0), strict=True):
            made[index] = (node, copy)
    return made


def _of_projection(factor_LM: Tensor, projection: int, layers: Sequence[int]) -> Tensor:
    """Return a factor's slices of one projection for some layers (one slice where all layers share it)."""
    of_layer = factor_LM[:, projection if factor_LM.shape[1] > 1 else 0]
    if of_layer.shape[0] == 1:
        return of_layer.expand(len(layers), -1, -1)
    if list(layers) == list(range(of_layer.shape[0])):
        return of_layer
    # Not by an index tensor, whose copy to the device would hold up the host.
    slices = of_layer.unbind(0)
    return torch.stack([slices[layer] for layer in layers])


def factors_at(all_factors: Factors, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return the A (d_in x r), C (r x r') and B (r' x d_out) of one module out of those of all."""
    a_LMIP, c_LMPQ, b_LMQO = all_factors
    a_IP = a_LMIP[_place(a_LMIP, target)][: target.d_in]
    b_QO = b_LMQO[_place(b_LMQO, target)][:, : target.d_out]
    return a_IP, c_LMPQ[_place(c_LMPQ, target)], b_QO


def _place(factor_LM: Tensor, target: Target) -> tuple[int, int]:
    """Return the (layer, projection) index of a target in a factor whose axes may be shared (size 1)."""
    layers, projections = factor_LM.shape[:2]
    return (target.layer if layers > 1 else 0), (target.projection if projections > 1 else 0)

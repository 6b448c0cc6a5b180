"""DMRG proper: minimise the loss at one bond after the other (paper appendix C, second extension).

At a bond the two neighbours are merged to theta, theta alone is trained for a few steps, and a truncated SVD splits
it again. The chain is canonical with its centre in theta, so the loss sees changes of theta as they are.

To the adapter a merged pair is a chain like any other: one of the two cores is theta, the other an identity, and the
bond between them is as wide as the narrower side of theta.

Shape legend: P left bond, N and M the modes of the pair, Q right bond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from metatt_scale.adapter import ChainAdapter
from metatt_scale.parallel import World
from metatt_scale.recipe import Recipe
from metatt_scale.tensor import Cut, canonicalise, cut_pair, ranks
from metatt_scale.training.optimizer import apply, clip, make_optimizer
from metatt_scale.training.reduce import PendingSums

Gradients = Callable[[int], PendingSums]
"""Leaves the gradient of the i-th global batch from here, summed over all ranks, on the cores."""


def optimise_bonds(
    recipe: Recipe,
    caps: Sequence[int | None],
    adapter: ChainAdapter,
    cores: list[Tensor],
    world: World,
    gradients: Gradients,
) -> tuple[list[Tensor], list[Cut]]:
    """Train and cut every bond from left to right; return the chain (float64, centre on the right) and the cuts.

    All ranks call this together; the cuts are of use on rank 0 only. The adapter is left with a merged chain.

    Args:
        recipe: of the run, with a section `sweep`.
        caps: rank per bond; None leaves it at most as wide as it is, for a trained pair has a full spectrum.
        adapter: computes the gradients.
        cores: the chain.
        world: the ranks.
        gradients: see `Gradients`.
    """
    assert recipe.sweep is not None
    cuts: list[Cut] = []
    for k, (cap, before) in enumerate(zip(caps, ranks(cores), strict=True)):
        merged = world.tensors_from_first(lambda k=k, cores=cores: merge_pair(cores, k))
        adapter.set_cores(merged)
        left = merged[k]
        theta = adapter.cores[k + 1 if left.shape[2] == left.shape[0] * left.shape[1] else k]
        _train(recipe, adapter, theta, gradients, first=k * recipe.sweep.local_steps)
        trained = [core.detach().to("cpu", torch.float64) for core in adapter.cores]
        *halves, cut = cut_pair(
            torch.tensordot(trained[k], trained[k + 1], 1),
            max_rank=before if cap is None else cap,
            min_rank=recipe.sweep.min_rank,
            max_discarded_weight=recipe.sweep.max_discarded_weight,
        )
        cores = [*trained[:k], *halves, *trained[k + 2 :]]
        cuts.append(cut)
    return cores, cuts


def merge_pair(cores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return the same tensor with the centre in cores k and k + 1, merged: one of them is theta, one an identity.

    A change of theta is then as large in the tensor, and no smaller factor restricts it.
    """
    result = canonicalise(cores, k)
    theta_PNMQ = torch.tensordot(result[k], result[k + 1], 1)
    p, n, m, q = theta_PNMQ.shape
    eye = torch.eye(min(p * n, m * q), dtype=theta_PNMQ.dtype)
    if p * n <= m * q:
        result[k], result[k + 1] = eye.view(p, n, -1), theta_PNMQ.reshape(p * n, m, q)
    else:
        result[k], result[k + 1] = theta_PNMQ.reshape(p, n, m * q), eye.view(-1, m, q)
    return result


def _train(recipe: Recipe, adapter: ChainAdapter, theta: nn.Parameter, gradients: Gradients, first: int) -> None:
    """Do local steps on one core, with an optimizer of its own."""
    assert recipe.sweep is not None
    optimizer = make_optimizer([theta], recipe.training)
    rate = recipe.sweep.local_learning_rate or recipe.training.learning_rate
    for i in range(first, first + recipe.sweep.local_steps):
        sums = gradients(i)
        assert theta.grad is not None
        clip([theta.grad], torch.linalg.vector_norm(theta.grad), recipe.training.max_grad_norm)
        apply(optimizer, sums.finite, rate)
        adapter.zero_grad(set_to_none=True)

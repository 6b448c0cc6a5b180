"""How often each source is passed through in an epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from metatt_scale.recipe import DataRecipe


def passes(recipe: DataRecipe, sizes: Sequence[int]) -> tuple[float, ...]:
    """Return the passes per epoch of every training source.

    A task (a source, where there are no tasks) holds n_t = sum of weight x size over its sources, cut to `cap`. With
    N = sum_t n_t an epoch takes n_t of it (`proportional`), N / T (`uniform`), or N n_t^(1/tau) / sum_s n_s^(1/tau)
    (`temperature`), in the shares of its sources.

    Args:
        recipe: the sources and `sampling`.
        sizes: training examples of each source.
    """
    how = recipe.sampling
    groups = [str(i) if source.task is None else source.task for i, source in enumerate(recipe.train)]
    held: dict[str, float] = defaultdict(float)
    for group, source, size in zip(groups, recipe.train, sizes, strict=True):
        held[group] += source.weight * size
    capped = {group: min(n, how.cap or n) for group, n in held.items()}
    power = {"proportional": 1.0, "uniform": 0.0, "temperature": 1.0 / how.temperature}[how.strategy]
    shares = {group: n**power for group, n in capped.items()}
    scale = 1.0 if power == 1.0 else sum(capped.values()) / sum(shares.values())
    factors = {group: scale * shares[group] / held[group] for group in held if held[group]}
    return tuple(
        source.weight * factors.get(group, 1.0) if power != 1.0 or how.cap else source.weight
        for group, source in zip(groups, recipe.train, strict=True)
    )

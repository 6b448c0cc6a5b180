"""AdamW on the trained parameters, its learning rate as a pure function of the step, and clipping.

Every function here depends on its arguments alone, so replicas that call it with equal numbers stay equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from metatt_scale.adapter import Adapter
from metatt_scale.recipe import TrainingRecipe

Moments = dict[str, Tensor]
"""AdamW's state of one parameter: step, exp_avg, exp_avg_sq; empty before its first step."""


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: TrainingRecipe) -> torch.optim.AdamW:
    """Return AdamW (decoupled weight decay, Loshchilov and Hutter 2017) on the fp32 parameters.

    PyTorch's fused form, which can be told on the device to leave a step out (`apply`).
    """
    return torch.optim.AdamW(
        list(parameters),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def moments_of(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, Moments]:
    """Return AdamW's state of every parameter by its name."""
    return {name: optimizer.state.get(parameter, {}) for name, parameter in trained.items()}


def named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def install(
    adapter: Adapter, values: Mapping[str, Tensor], moments: Mapping[str, Moments], recipe: TrainingRecipe
) -> torch.optim.AdamW:
    """Give an adapter these values (of cores, with any ranks), and return the optimizer that goes on with them."""
    adapter.set_values(values)
    trained = adapter.trained()
    optimizer = make_optimizer(trained.values(), recipe)
    for name, parameter in trained.items():
        if state := moments.get(name):
            # Fused AdamW wants its step counter, like the moments, on the device of the parameter.
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    return optimizer


def learning_rate(recipe: TrainingRecipe, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total_steps`.

    Warm-up over W = ceil(warmup_ratio * total) steps, then constant, or linear or cosine towards 0. From step W on
    these are the schedules of transformers, so that settings carry over. Its warm-up begins with a step of rate 0,
    which trains nothing; here step s < W has (s + 1) / (W + 1) of the peak.
    """
    warmup = math.ceil(recipe.warmup_ratio * total_steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    if recipe.schedule == "linear":
        return recipe.learning_rate * max(0.0, 1.0 - done)
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return recipe.learning_rate


@torch.no_grad()
def clip(gradients: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their 2-norm is at most `max_norm`; 0 never clips. Nothing waits for the device."""
    if max_norm:
        factor = torch.clamp(max_norm / norm, max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)


def apply(
    optimizer: torch.optim.AdamW, finite: Tensor, rate: float, behind: Callable[[], None] = lambda: None
) -> None:
    """Do one step, or none at all where `finite` (a scalar on the device) is false, and drop the gradients.

    This is how torch's GradScaler has fused optimizers leave out a step: parameters, moments and step counts stay.
    `behind` is called between the step and the end of the gradients.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    behind()
    optimizer.zero_grad(set_to_none=True)

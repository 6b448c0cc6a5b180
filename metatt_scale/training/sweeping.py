"""One sweep in the course of a run: measure, cut on rank 0, tell everybody.

Nothing that decides a bit is computed on two ranks: the new cores, and moments if they are carried over, come from
rank 0. Gradients of probes and local steps are sums over all ranks, like those of any step.

Shape legend: P left bond, N mode, Q right bond, K a bond.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metatt_scale.adapter import ChainAdapter, ChainSpec, Target, norm_in_use
from metatt_scale.parallel import Message, World
from metatt_scale.recipe import Recipe, SweepRecipe
from metatt_scale.recipe.adapter import Rank
from metatt_scale.tensor import (
    Cut,
    Scores,
    balance,
    canonicalise,
    check_finite,
    enrich,
    gauge_change,
    norm,
    ranks,
    subtract,
    sweep,
    transport_gradient,
    transport_variance,
)
from metatt_scale.training.local import Gradients, optimise_bonds
from metatt_scale.training.optimizer import Moments, named
from metatt_scale.training.reduce import PendingSums

_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep leaves, the same on every rank."""

    values: dict[str, Tensor]
    """The new cores."""
    moments: dict[str, Moments]
    """AdamW's state; empty for cores that start afresh."""
    report: dict[str, Any]
    """What happened, for metrics.jsonl."""
    stop_signal: int | None
    """One that any rank received meanwhile, as far as gradients were summed."""


def perform_sweep(
    recipe: Recipe,
    target: Rank | None,
    adapter: ChainAdapter,
    moments: Mapping[str, Moments],
    world: World,
    gradients: Gradients,
    seed: int,
) -> SweepResult:
    """Change the ranks of an adapter's chain. All ranks call this together; the adapter may be left in between.

    Args:
        recipe: of the run, with a section `sweep`.
        target: ranks after the sweep; None where the discarded weight decides.
        adapter: gives its cores, and computes gradients where those are asked for.
        moments: AdamW's state by the parameter's name.
        world: the ranks.
        gradients: leaves the gradient of the i-th global batch from here on the cores.
        seed: of new directions.
    """
    started, gradients = time.perf_counter(), _Listening(gradients)
    old = [core.detach().to("cpu", torch.float64) for core in adapter.cores]
    old_spec, how = adapter.spec, recipe.sweep
    assert how is not None
    current, cuts, rule = _before_the_cut(recipe, how, target, adapter, old, world, gradients)

    def compute() -> Message:
        swept = sweep(current, canonical=how.form == "canonical", **rule)
        new = balance(swept.cores) if how.gauge == "balanced" else swept.cores
        wanted = (target,) * len(swept.cuts) if isinstance(target, int) else target or ()
        if wanted:
            new = enrich(new, wanted, torch.Generator().manual_seed(seed))
        new32 = _in_32_bits(new)
        named = {f"core_{k}": core for k, core in enumerate(new32)}
        if how.moments == "transport":
            named |= _transported(moments, old, [core.double() for core in new32])
        # Between the cuts of local steps the chain was trained: they say nothing of the change.
        predicted = None if cuts else swept.predicted_error
        report = _report(cuts or swept.cuts, predicted, old, new, old_spec, adapter.targets)
        return report | _remarks(how, rule, wanted) | {"seconds": _short(time.perf_counter() - started)}, named

    report, tensors = world.from_first(compute)
    names = [f"core_{k}" for k in range(len(old))]
    return SweepResult(
        values={name: tensors[name] for name in names},
        moments={**moments, **{name: named(tensors, f"adam_{name}_") for name in names}},
        report=report,
        stop_signal=gradients.stop_signal(),
    )


def _in_32_bits(cores: Sequence[Tensor]) -> list[Tensor]:
    found = [core.float() for core in cores]
    check_finite(found, "the chain after the sweep")
    return found


class _Listening:
    """Gradients for a sweep, and the signals that were summed with them."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients, self._sums = gradients, list[PendingSums]()

    def __call__(self, i: int) -> PendingSums:
        self._sums.append(self._gradients(i))
        return self._sums[-1]

    def stop_signal(self) -> int | None:
        return next((number for sums in self._sums if (number := sums.read().stop_signal) is not None), None)


def _before_the_cut(
    recipe: Recipe,
    how: SweepRecipe,
    target: Rank | None,
    adapter: ChainAdapter,
    old: list[Tensor],
    world: World,
    gradients: Gradients,
) -> tuple[list[Tensor], list[Cut] | None, dict[str, Any]]:
    """Do what needs the model; return the chain to sweep, cuts that are done already, and the rule for the others."""
    caps = target if isinstance(target, tuple) else (how.max_rank if target is None else target,) * (len(old) - 1)
    if how.local_steps:
        return *optimise_bonds(recipe, caps, adapter, old, world, gradients), {}
    rule = {"max_ranks": caps, "min_rank": how.min_rank, "max_discarded_weight": how.max_discarded_weight}
    if how.importance == "sensitivity":
        canonical, rule["scores"] = _probe(how.probe_batches, adapter, old, world, gradients)
        return canonical, None, rule
    return old, None, rule


# ---- sensitivity


def _probe(
    count: int, adapter: ChainAdapter, old: list[Tensor], world: World, gradients: Gradients
) -> tuple[list[Tensor], Scores | None]:
    """Bring the adapter to canonical form and measure gradients on its bonds, with all cores frozen.

    Returns the canonical chain, and what its singular values are worth: the mean over the probes of |s dL/ds|. In a
    right-canonical chain the part of the tensor that belongs to a right singular vector v is what X = v v^T on the
    bond leaves of it, so s dL/ds = v^T (dL/dX at X = 1) v (for matrices AdaLoRA, Zhang et al. 2023, has |w dL/dw|).
    None where no gradient was finite: a run that may yet recover is not ended by its sweep.
    """
    cores = world.tensors_from_first(lambda: canonicalise(old, 0))
    adapter.set_cores(cores)
    bonds: list[list[Tensor]] = [[] for _ in cores[1:]]
    for i in range(count):
        finite = gradients(i).read().finite
        for on_bond, core in zip(bonds, adapter.cores[1:], strict=True):
            assert core.grad is not None
            if finite:
                x_KK = core.grad.flatten(1) @ core.detach().flatten(1).mT
                on_bond.append(x_KK.to("cpu", torch.float64))
        adapter.zero_grad(set_to_none=True)
    if not bonds[0]:
        return cores, None

    def scores(bond: int, s_K: Tensor, vh_KK: Tensor) -> Tensor:
        return torch.stack([((vh_KK @ x_KK) * vh_KK).sum(1).abs() for x_KK in bonds[bond]]).mean(0)

    return cores, scores


# ---- moments


def _transported(moments: Mapping[str, Moments], old: list[Tensor], new: list[Tensor]) -> dict[str, Tensor]:
    """Return AdamW's state for the new cores: the counter stays, the averages change their gauge."""
    of_cores = [moments.get(f"core_{k}") for k in range(len(old))]
    if not all(of_cores):
        return {}
    change = gauge_change(old, new)
    result: dict[str, Tensor] = {}
    for k, state in enumerate(of_cores):
        assert state
        mean, square = (state[name].to("cpu", torch.float64) for name in ("exp_avg", "exp_avg_sq"))
        result[f"adam_core_{k}_step"] = state["step"]
        result[f"adam_core_{k}_exp_avg"] = transport_gradient(change, k, mean).float()
        result[f"adam_core_{k}_exp_avg_sq"] = transport_variance(change, k, square).float()
    return result


# ---- the account


def _report(
    cuts: Sequence[Cut],
    predicted: float | None,
    old: list[Tensor],
    new: list[Tensor],
    spec: ChainSpec,
    targets: Sequence[Target],
) -> dict[str, Any]:
    """Return what happened, errors as parts of the norm before.

    `predicted` is what the discarded singular values say, `measured` the norm of the difference; `used` that of the
    deltas in use, where modules of other widths leave part of the chain unused.
    """
    difference = subtract(new, old)
    wide = replace(spec, ranks=ranks(difference))
    size, in_use = float(norm(old)), norm_in_use(spec, old, targets)
    return {
        "ranks_before": list(spec.ranks),
        "ranks_after": list(ranks(new)),
        "bonds": [
            {
                "singular_values": numbers(cut.singular_values),
                "kept_rank": len(cut.kept),
                "discarded_weight": _short(cut.discarded_weight),
            }
            for cut in cuts
        ],
        "norm": _short(size),
        "predicted_rel_error": None if predicted is None else _short(predicted / size) if size else 0.0,
        "measured_rel_error": _short(float(norm(difference)) / size) if size else 0.0,
        "used_rel_error": _short(norm_in_use(wide, difference, targets) / in_use) if in_use else 0.0,
    }


def _remarks(how: SweepRecipe, rule: dict[str, Any], wanted: Sequence[int]) -> dict[str, Any]:
    """Return what else a reader of the account must know."""
    remarks: dict[str, Any] = {}
    if wanted:  # wider than modes and neighbours make useful, maybe
        remarks["ranks_wanted"] = list(wanted)
    if how.importance == "sensitivity":
        remarks["by"] = "magnitude: no gradient was finite" if rule["scores"] is None else "sensitivity"
    return remarks


def numbers(values: Tensor) -> list[float]:
    """Return the values with the digits that a person or a plot can use."""
    return [_short(value) for value in values.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")

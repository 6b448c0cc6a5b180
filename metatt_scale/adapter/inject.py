"""From a frozen model and a recipe to a model with one chain behind its linears."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from metatt_scale.adapter.chain import ChainAdapter
from metatt_scale.adapter.modes import KINDS, ChainSpec, check_order, full_cores, initial_cores
from metatt_scale.adapter.targets import TargetMap, find_targets
from metatt_scale.recipe import AdapterRecipe
from metatt_scale.recipe.adapter import DIAGONAL
from metatt_scale.tensor import norm


def chain_spec(recipe: AdapterRecipe, target_map: TargetMap, head_dim: int | None, n_tasks: int = 0) -> ChainSpec:
    """Return modes, sizes and ranks for these targets.

    The input mode is as wide as the widest input, the output mode as the widest output (5D: the head width, and
    a head mode of ceil(widest output / head width)); narrower modules use the leading rows and columns.
    """
    widest_in = max(target.d_in for target in target_map.targets)
    widest_out = max(target.d_out for target in target_map.targets)
    size = {
        "input": widest_in,
        "layer": len(target_map.layers),
        "projection": len(target_map.projections),
        "output": widest_out,
        "task": n_tasks,
        "site": len(target_map.layers) * len(target_map.projections),
    }
    if "head" in KINDS[recipe.kind]:
        if head_dim is None:
            raise ValueError(f"adapter.kind {recipe.kind} needs a model with attention heads; use metatt_4d")
        size["head"], size["output"] = math.ceil(widest_out / head_dim), head_dim
    if "task" in KINDS[recipe.kind] and not n_tasks:
        raise ValueError(f"adapter.kind {recipe.kind} has a core for tasks, but the recipe has no `tasks`; name them")
    modes = check_order(recipe.mode_order or KINDS[recipe.kind], recipe.kind)
    ranks = recipe.rank if isinstance(recipe.rank, tuple) else (recipe.rank,) * (len(modes) - 1)
    return ChainSpec(
        modes=modes,
        sizes=tuple(size[mode] for mode in modes),
        ranks=ranks,
        diagonal=recipe.kind in DIAGONAL,
        projections=len(target_map.projections),
    )


def head_dim_of(model: PreTrainedModel) -> int | None:
    """Return the width of one attention head as the model's configuration has it."""
    config = model.config.get_text_config()
    explicit = getattr(config, "head_dim", None)
    if explicit:
        return explicit
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return hidden // heads if hidden and heads else None


def inject(
    model: PreTrainedModel, recipe: AdapterRecipe, seed: int, device: torch.device, n_tasks: int = 0
) -> ChainAdapter:
    """Freeze the model, put a new chain behind its target modules, and return the owner of the cores.

    Args:
        model: loaded, whole or sharded.
        recipe: of the adapter.
        seed: of the cores' random values.
        device: where the model computes; an engine may keep its weights elsewhere meanwhile.
        n_tasks: length of a task core.

    Raises:
        ValueError: no target, a target that is not linear, or a chain that is not zero at the start.
    """
    target_map = find_targets(model, recipe.target_modules, recipe.layers)
    spec = chain_spec(recipe, target_map, head_dim_of(model), n_tasks)
    cores = initial_cores(spec, recipe.init, recipe.init_std, seed)
    if not recipe.allow_nonzero_start and float(norm(full_cores(spec, cores))) != 0:
        raise ValueError(
            f"adapter.init {recipe.init!r} starts with a chain that is not zero, so that step 0 is not the frozen "
            "model; give one core `ze`, or set adapter.allow_nonzero_start: true"
        )
    adapter = ChainAdapter(spec, cores, recipe.alpha, target_map, compute_dtype(model))
    adapter.reference = recipe.operator == "reference"
    adapter.attach(model, device)
    return adapter


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the floating type the model computes in: that of its input embeddings (packed weights do not tell)."""
    return next(model.get_input_embeddings().parameters()).dtype

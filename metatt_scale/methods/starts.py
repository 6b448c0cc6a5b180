"""PiSSA's and OLoRA's first factors, computed from the frozen weights once per run.

Rank 0 computes and tells the others: an SVD on another machine may give other bits, or other signs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.adapter import Adapter, plain_linear
from metatt_scale.backbone import Engine
from metatt_scale.methods.peft_methods import TRAINED, Lora, import_peft
from metatt_scale.parallel import World
from metatt_scale.recipe import AdapterRecipe


def start_at_weights(adapter: Adapter, model: PreTrainedModel, world: World, engine: Engine | None) -> None:
    """Begin at A0 and B0 of every target, where `adapter.init` says so; all ranks call this together.

    Args:
        adapter: a LoRA, attached.
        model: what it is attached to.
        world: the ranks.
        engine: what has sharded the model; its weights are gathered one target at a time.
    """
    assert isinstance(adapter, Lora)
    if not adapter.has_start:
        return
    found: dict[str, Tensor] = {}
    failed: list[Exception] = []
    for placed, target in zip(adapter.linears, adapter.targets, strict=True):
        path, here = target.path, f"{target.path}.base_layer"
        with engine.gathered(model, here) if engine is not None else contextlib.nullcontext():
            plain = plain_linear(placed.base_layer, torch.float32).to(world.device) if world.is_first else None
        if plain is not None:  # while the others go on to the next gather and wait there
            try:
                a_RI, b_OR = _factors(plain, adapter.recipe)
            except (RuntimeError, ValueError) as error:
                failed.append(
                    ValueError(f"adapter.init {adapter.recipe.init}: {path} cannot be factorised ({error})")
                )
                continue
            found |= {f"{path}.start_A": a_RI, f"{path}.start_B": b_OR}
    adapter.start_at(world.from_first(lambda: _tell(found, failed))[1])


def _tell(found: dict[str, Tensor], failed: Sequence[Exception]) -> tuple[None, dict[str, Tensor]]:
    """Return what was found; what failed is told here, where the others listen, and not at a gather."""
    if failed:
        raise failed[0]
    return None, found


def _factors(plain: nn.Module, recipe: AdapterRecipe) -> tuple[Tensor, Tensor]:
    """Return PEFT's own start from one whole weight, which PEFT changes."""
    peft = import_peft()
    assert isinstance(recipe.rank, int)
    holder = nn.ModuleDict({"linear": plain.float()})
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha * recipe.rank,
        init_lora_weights=recipe.init,
        target_modules=["linear"],
        fan_in_fan_out=not isinstance(plain, nn.Linear),
    )
    layer = peft.inject_adapter_in_model(config, holder)["linear"]
    return layer.lora_A[TRAINED].weight.detach(), layer.lora_B[TRAINED].weight.detach()

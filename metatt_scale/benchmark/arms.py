"""What is compared: the frozen model and adapters behind it, all on one copy of the weights.

Every arm has a module tree of its own over the same frozen tensors (`twin`), so that none has to be taken off before
the next is put on, and a backbone that fits once fits for all arms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatt_scale.adapter import find_targets, inject
from metatt_scale.benchmark.memory import held_bytes
from metatt_scale.data import IGNORE, Batch
from metatt_scale.methods.peft_methods import import_peft
from metatt_scale.recipe import Recipe
from metatt_scale.training.loss import token_loss_sum

FROZEN = "frozen"
"""Name of the floor."""
CHAINS = {"metatt_4d": "MetaTT-4D", "metatt_5d": "MetaTT-5D", "metatt_4p1d": "MetaTT-(4+1)D"}
"""Kinds of chains that are measured, at every rank asked for."""
TASKS = 3
"""Of MetaTT-(4+1)D (paper, table 3)."""
LORA_RANKS = (8, 16, 64)
LORA_ALPHA = 16
VERA_RANK = 256
"""PEFT's default."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing whose step is measured."""

    name: str
    trained: int
    """Trained values."""
    own_bytes: int
    """Of tensors that this arm has and the frozen model has not: what is trained, VeRA's projections."""
    step: Callable[[], None]
    """Forward, backward, and what the adapter itself does once per optimizer step; leaves no gradient behind."""


class Build(Protocol):
    """Puts one arm on a module tree that nobody else uses."""

    def __call__(self, name: str, model: PreTrainedModel, work: Work) -> Arm:
        """Return the arm."""
        ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step of every arm does."""

    recipe: Recipe
    batch: Batch
    device: torch.device


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a module tree with modules, hooks and settings of its own over the very same tensors."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        # What bitsandbytes keeps beside its weights: scales (4 bits), weights after the first forward (8 bits).
        shared += [part for part in (getattr(module, name, None) for name in ("quant_state", "state")) if part]
    return copy.deepcopy(model, {id(part): part for part in shared})


def builders(recipe: Recipe, ranks: Iterable[int]) -> dict[str, Build]:
    """Return what makes each arm, by name, the floor first."""
    ranks = tuple(ranks)
    arms: dict[str, Build] = {FROZEN: _frozen}
    for kind, title in CHAINS.items():
        for rank in ranks:
            arms[f"{title} r={rank}"] = _chain(kind, rank)
    for rank in LORA_RANKS:
        arms[f"LoRA r={rank}"] = _lora(rank)
    if recipe.backbone.dtype != "float32":
        # PEFT keeps adapters in fp32 unless told otherwise; this is the cheapest that it can be.
        arms[f"LoRA r={LORA_RANKS[0]} in {recipe.backbone.dtype}"] = _lora(LORA_RANKS[0], in_fp32=False)
    arms[f"VeRA r={VERA_RANK}"] = _vera
    return arms


def random_batch(model: PreTrainedModel, examples: int, length: int) -> Batch:
    """Return random tokens (the same in every process) whose last eighth is to be predicted."""
    vocabulary = model.config.get_text_config().vocab_size
    ids_BS = torch.randint(0, vocabulary, (examples, length), generator=torch.Generator().manual_seed(0))
    labels_BS = ids_BS.clone()
    labels_BS[:, : length - max(1, length // 8)] = IGNORE
    return Batch(ids_BS, torch.ones_like(ids_BS), labels_BS)


def chain_recipe(recipe: Recipe, kind: str, rank: int) -> Recipe:
    """Return the recipe with another chain; order of modes and initialisation stay where the kind is the recipe's."""
    update: dict[str, Any] = {"kind": kind, "rank": rank}
    if kind != recipe.adapter.kind:
        update |= {"mode_order": None, "init": None}
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update=update)})


def put_lora(model: PreTrainedModel, recipe: Recipe, rank: int, *, in_fp32: bool = True) -> nn.Module:
    """Return the model with PEFT's LoRA behind the recipe's target modules.

    Raises:
        ValueError: PEFT is not installed.
    """
    peft = import_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=LORA_ALPHA, target_modules=_paths(model, recipe))
    _tell_peft(model, recipe)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=in_fp32)


def _frozen(name: str, model: PreTrainedModel, work: Work) -> Arm:
    """The floor: the frozen model's forward, and the backward to the first layer's input."""
    model.enable_input_require_grads()

    def step() -> None:
        token_loss_sum(model, work.batch, work.device).backward()

    return Arm(name=name, trained=0, own_bytes=0, step=step)


def _chain(kind: str, rank: int) -> Build:
    def build(name: str, model: PreTrainedModel, work: Work) -> Arm:
        recipe = chain_recipe(work.recipe, kind, rank)
        adapter = inject(model, recipe.adapter, recipe.seed, work.device, TASKS)
        adapter.rows_per_step = work.batch.input_ids_BS.numel()
        # Where the chain knows tasks, the examples of a batch take turns.
        tasks_B1 = torch.arange(len(work.batch.input_ids_BS))[:, None] % TASKS
        adapter.row_tasks = tasks_B1.to(work.device)

        def step() -> None:
            token_loss_sum(model, work.batch, work.device).backward()
            adapter.pull_back()
            adapter.zero_grad()

        cores = list(adapter.cores)
        trained = sum(core.numel() for core in cores)
        return Arm(name=name, trained=trained, own_bytes=held_bytes(cores), step=step)

    return build


def _lora(rank: int, *, in_fp32: bool = True) -> Build:
    def build(name: str, model: PreTrainedModel, work: Work) -> Arm:
        frozen = [*model.parameters(), *model.buffers()]
        put_lora(model, work.recipe, rank, in_fp32=in_fp32)
        return _peft_arm(name, model, frozen, work)

    return build


def _vera(name: str, model: PreTrainedModel, work: Work) -> Arm:
    peft = import_peft()
    frozen = [*model.parameters(), *model.buffers()]
    config = peft.VeraConfig(
        r=VERA_RANK, target_modules=_paths(model, work.recipe), projection_prng_key=work.recipe.seed
    )
    _tell_peft(model, work.recipe)
    peft.get_peft_model(model, config)
    return _peft_arm(name, model, frozen, work)


def _peft_arm(name: str, model: PreTrainedModel, frozen: Iterable[Tensor], work: Work) -> Arm:
    """Return the arm of a model that PEFT has put its layers into."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    known = {id(tensor) for tensor in frozen}
    own = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in known]

    def step() -> None:
        token_loss_sum(model, work.batch, work.device).backward()
        for parameter in trained:
            parameter.grad = None

    return Arm(name=name, trained=sum(p.numel() for p in trained), own_bytes=held_bytes(own), step=step)


def _paths(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    return [
        target.path for target in find_targets(model, recipe.adapter.target_modules, recipe.adapter.layers).targets
    ]


def _tell_peft(model: PreTrainedModel, recipe: Recipe) -> None:
    """Mark a packed model as transformers marks its own: PEFT chooses its layers by these."""
    if recipe.backbone.quantization != "none":
        bits = "8bit" if recipe.backbone.quantization == "int8" else "4bit"
        setattr(model, f"is_loaded_in_{bits}", True)

"""`--table generation`: tokens per second of greedy decoding, with the chain merged and beside the frozen weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from metatt_scale.adapter import ChainAdapter, inject, merge
from metatt_scale.backbone import load_backbone
from metatt_scale.benchmark.arms import (
    CHAINS,
    LORA_ALPHA,
    LORA_RANKS,
    chain_recipe,
    put_lora,
    random_batch,
    twin,
)
from metatt_scale.benchmark.report import Report, describe_backbone, describe_machine, describe_targets, ratio_cells
from metatt_scale.benchmark.settings import Settings, settings_of
from metatt_scale.benchmark.timing import ratios, take_turns
from metatt_scale.methods.peft_methods import import_peft
from metatt_scale.recipe import Recipe

BASE = "base"
"""Name of the arm without an adapter."""
_KIND = "metatt_4d"
_RANK = LORA_RANKS[0]
_SHARE = 0.1
"""What a random adapter adds to an output, beside an input of the same size: small, but enough to change tokens."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model that continues prompts."""

    name: str
    model: PreTrainedModel
    rank: int | None = None
    """Of the adapter."""
    order: str | None = None
    """How the chain multiplies: merged, folded or thin."""


def measure(recipe: Recipe, settings: Settings, device: torch.device, show: Callable[[str], None]) -> Report:
    """Let the base model and adapters on it continue the same prompts, in turns, on one frozen backbone.

    Raises:
        ValueError: PEFT is not installed, the model cannot generate or has too few positions, or what backbone and
            targets refuse.
    """
    import_peft()
    recipe = _without_checkpointing(recipe)
    show("loading the backbone")
    model = load_backbone(recipe.backbone, device, recipe.seed)
    check_room(model, settings)
    prompts_BS = random_batch(model, settings.examples, settings.length).input_ids_BS.to(device)
    arms = decoders(model, recipe, settings.ranks, device, show)
    tokens: dict[str, Tensor] = {}

    def act(arm: Decoder) -> Callable[[], None]:
        def generate() -> None:
            tokens[arm.name] = continue_greedily(arm.model, prompts_BS, settings.new_tokens)

        return generate

    seconds = take_turns({arm.name: act(arm) for arm in arms}, settings.repeats, device, show)
    rows = [_row(arm, seconds[arm.name], tokens) for arm in arms]
    for row in rows:
        row["rate_ratio"] = ratios(row["tokens_per_second"], rows[0]["tokens_per_second"])._asdict()
    return Report(
        table="generation",
        title=f"continuing {settings.examples} x {settings.length} tokens greedily by {settings.new_tokens} each: "
        f"{describe_backbone(recipe)}; adapted: {describe_targets(recipe)}",
        machine=describe_machine(device),
        columns=("arm", "order", "tokens/s", f"/ {BASE}", "range", f"as {BASE}", "merged as unmerged"),
        cells=tuple(_cells(row, settings.examples) for row in rows),
        rows=tuple(rows),
        settings=settings_of("generation", settings, recipe),
        notes=_notes(recipe),
    )


def check_room(model: PreTrainedModel, settings: Settings) -> None:
    """Refuse a model that cannot continue prompts of this length by so many tokens.

    Raises:
        ValueError: an encoder, or fewer positions than prompt and new tokens take together.
    """
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} cannot generate; --table generation needs a causal model, choose another table"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = settings.length + settings.new_tokens
    if positions is not None and needed > positions:
        raise ValueError(
            f"--length {settings.length} and --new-tokens {settings.new_tokens} take {needed} positions, but the "
            f"model has {positions}; lower one of them"
        )


def decoders(
    model: PreTrainedModel,
    recipe: Recipe,
    ranks: tuple[int, ...],
    device: torch.device,
    show: Callable[[str], None],
) -> list[Decoder]:
    """Return all arms in evaluation mode on the tensors of one model: the base, chains, LoRA.

    Raises:
        ValueError: PEFT is not installed, or what the targets refuse.
    """
    arms = [Decoder(name=BASE, model=twin(model))]
    for rank in ranks:
        for merged in (True, False):
            name = f"{CHAINS[_KIND]} r={rank}, {'merged' if merged else 'unmerged'}"
            show(f"adapting: {name}")
            own = twin(model)
            adapter = _random_chain(own, chain_recipe(recipe, _KIND, rank), device)
            if merged:
                merge(adapter)
            order = "merged" if merged else "folded" if adapter.folds_into_b else "thin"
            arms.append(Decoder(name=name, model=own, rank=rank, order=order))
    types = {"": True}
    if recipe.backbone.dtype != "float32":
        types[f" in {recipe.backbone.dtype}"] = False  # fp32 is PEFT's default, this the cheapest that it can be
    for suffix, in_fp32 in types.items():
        name = f"LoRA r={_RANK}{suffix}, unmerged"
        show(f"adapting: {name}")
        own = twin(model)
        _random_lora(own, recipe, in_fp32)
        arms.append(Decoder(name=name, model=own, rank=_RANK))
    for arm in arms:
        arm.model.eval()
    return arms


def continue_greedily(model: PreTrainedModel, prompts_BS: Tensor, new_tokens: int) -> Tensor:
    """Return exactly so many new tokens of each prompt (B prompts of S tokens, none of them padding)."""
    own = model.generation_config
    # What is left out here is taken from the model's own configuration, which may sample or penalise repetition.
    plain: dict[str, Any] = {"top_k": 50, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}
    config = GenerationConfig(
        **plain,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        max_length=None,
        pad_token_id=0,  # never used: all rows are equally long and none of them ends early
        eos_token_id=own.eos_token_id if own is not None else None,
    )
    output_BT = model.generate(  # type: ignore[operator]
        input_ids=prompts_BS, attention_mask=torch.ones_like(prompts_BS), generation_config=config
    )
    return output_BT[:, prompts_BS.shape[1] :]


def _without_checkpointing(recipe: Recipe) -> Recipe:
    backbone = recipe.backbone.model_copy(update={"gradient_checkpointing": False})
    return recipe.model_copy(update={"backbone": backbone})


def _random_chain(model: PreTrainedModel, recipe: Recipe, device: torch.device) -> ChainAdapter:
    """Put a chain behind the targets whose deltas have entries of standard deviation `_SHARE / sqrt(width)`."""
    adapter = inject(model, recipe.adapter, recipe.seed, device)
    generator = torch.Generator().manual_seed(recipe.seed)
    # 1 / sqrt(left bond) keeps the size of what runs through a core; the left bond of the first is 1.
    cores = [torch.randn(shape, generator=generator) / math.sqrt(shape[0]) for shape in adapter.spec.shapes]
    width = adapter.spec.sizes[adapter.spec.modes.index("input")]
    cores[0] *= _SHARE / (math.sqrt(width) * adapter.alpha)
    adapter.set_cores(cores)
    return adapter


@torch.no_grad()
def _random_lora(model: PreTrainedModel, recipe: Recipe, in_fp32: bool) -> None:
    """Put LoRA behind the targets with both factors random (PEFT starts B at zero), of about the same effect."""
    put_lora(model, recipe, _RANK, in_fp32=in_fp32)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, factor in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(factor.shape, generator=generator) / math.sqrt(factor.shape[1])
            factor.copy_(_SHARE * _RANK / LORA_ALPHA * values if "lora_B" in name else values)


def _row(arm: Decoder, seconds: list[float], tokens: dict[str, Tensor]) -> dict[str, Any]:
    """Return an arm's numbers; `same_tokens` is None where there is no merged and unmerged form to compare."""
    own_BN = tokens[arm.name]
    merged = None
    if arm.order is not None:
        stem = arm.name.rpartition(",")[0]
        merged = _equal_prompts(tokens[f"{stem}, merged"], tokens[f"{stem}, unmerged"])
    return {
        "arm": arm.name,
        "rank": arm.rank,
        "order": arm.order,
        "tokens": own_BN.numel(),
        "seconds": seconds,
        "tokens_per_second": [own_BN.numel() / taken for taken in seconds],
        "prompts_as_base": _equal_prompts(own_BN, tokens[BASE]),
        "prompts_merged_as_unmerged": merged,
        "same_tokens": None if merged is None else merged == len(own_BN),
    }


def _equal_prompts(a_BN: Tensor, b_BN: Tensor) -> int:
    """Return how many prompts were continued by the same tokens."""
    return int((a_BN == b_BN).all(1).sum())


def _notes(recipe: Recipe) -> tuple[str, ...]:
    notes = (
        "tokens/s: new tokens of all prompts by the time of model.generate, reading the prompts included; random "
        "prompts, end-of-text suppressed, so that all arms write equally many. Greater is faster.",
        "order: merged into W; folded: (x A) M with M = C B made once; thin: ((x A) C) B. Adapters are random, and "
        f"add about {_SHARE:.0%} of the size of a module's input to its output.",
        f"as {BASE}, merged as unmerged: prompts with the same new tokens. Merged and unmerged agree in fp32 but for "
        "ties; in bf16 they round differently.",
    )
    if recipe.backbone.dtype != "float32":
        notes += ("PEFT's adapters are in fp32, its default, unless their name says otherwise.",)
    if recipe.backbone.quantization != "none":
        notes += (
            f"the backbone is {recipe.backbone.quantization}, and merging dequantises: a merged module is a plain "
            f"{recipe.backbone.dtype} linear, in speed and memory; all others are {recipe.backbone.quantization}.",
        )
    return notes


def _cells(row: dict[str, Any], prompts: int) -> tuple[str, ...]:
    merged = row["prompts_merged_as_unmerged"]
    return (
        row["arm"],
        row["order"] or "-",
        f"{statistics.median(row['tokens_per_second']):,.1f}",
        *ratio_cells(row["rate_ratio"]),
        f"{row['prompts_as_base']} of {prompts}",
        "-" if merged is None else f"{merged} of {prompts}",
    )

"""What the launcher asked for, and whether the recipe agrees.

| started with | sign in the environment | backbone |
|---|---|---|
| `python`, `torchrun`, `accelerate launch` | none, or TORCHELASTIC_RUN_ID | replicate, or as the recipe says |
| `accelerate launch --use_fsdp --fsdp_version 2` | ACCELERATE_USE_FSDP, FSDP_VERSION | fsdp2 |
| `accelerate launch --use_deepspeed` | ACCELERATE_USE_DEEPSPEED, its stage or file | by stage: zero3 or replicate |
| `deepspeed` | CROSS_SIZE without TORCHELASTIC_RUN_ID | by stage: zero3 or replicate |
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from metatt_scale.recipe import ParallelRecipe, RecipeError

Strategy = Literal["replicate", "fsdp2", "zero3"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How this job holds its backbone."""

    strategy: Strategy
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's configuration as the user wrote it, for `zero3`."""
    note: str | None = None
    """One line that the user should read."""


def read_launch(recipe: ParallelRecipe) -> Launch:
    """Join the launcher's environment and the recipe's `parallel` section.

    Raises:
        RecipeError: they contradict each other; the message says which to change.
    """
    asked, sign, file = _asked_by_launcher()
    file = recipe.deepspeed_config or file
    if recipe.deepspeed_config and asked == "fsdp2":
        raise RecipeError(
            f"started with {sign}, but parallel.deepspeed_config is set; leave it out, or start with accelerate "
            "launch --use_deepspeed"
        )
    config, note, remedy = None, None, f"start with {_STARTED_BY.get(recipe.backbone)}"
    if file is not None:
        config = _read_config(file)
        stage = _stage_of(config, file)
        sign, remedy = f"{sign} with {file}" if sign else file, "name a DeepSpeed file of stage 3"
        asked, note = _by_stage(stage, sign)
    elif asked == "zero3" and (stage := os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")):
        asked, note = _by_stage(int(stage), f"{sign} --zero_stage {stage}")
    if asked is not None and recipe.backbone not in ("auto", asked):
        raise RecipeError(
            f"parallel.backbone is {recipe.backbone}, but {sign} means {asked}; set parallel.backbone: auto or "
            f"{asked}, or {remedy}"
        )
    strategy: Strategy = (asked or "replicate") if recipe.backbone == "auto" else recipe.backbone
    if strategy != "fsdp2" and (recipe.cpu_offload or recipe.shard_size != "world"):
        raise RecipeError(
            f"parallel.cpu_offload and parallel.shard_size are settings of fsdp2, but the backbone is {strategy}; "
            "leave them out, or set parallel.backbone: fsdp2"
        )
    return Launch(strategy=strategy, deepspeed=config if strategy == "zero3" else None, note=note)


_STARTED_BY = {
    "replicate": "torchrun, or accelerate launch --multi_gpu",
    "fsdp2": "torchrun, or accelerate launch --use_fsdp --fsdp_version 2",
    "zero3": "deepspeed, torchrun, or accelerate launch --use_deepspeed --zero_stage 3",
}


def _asked_by_launcher() -> tuple[Strategy | None, str, str | None]:
    """Return the strategy the launcher's environment names, what the user typed for it, and a DeepSpeed file."""
    env = os.environ
    if _is_on("ACCELERATE_USE_FSDP"):
        if env.get("FSDP_VERSION", "1") != "2":
            raise RecipeError(
                f"accelerate was started with FSDP version {env.get('FSDP_VERSION', '1')}; this toolkit shards by "
                "FSDP2: add --fsdp_version 2 (in a config file `fsdp_version: 2`)"
            )
        return "fsdp2", "accelerate launch --use_fsdp", None
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        return "zero3", "accelerate launch --use_deepspeed", None if file.lower() in ("", "none") else file
    if "CROSS_SIZE" in env and "TORCHELASTIC_RUN_ID" not in env:
        return "zero3", "deepspeed", None
    return None, "", None


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _read_config(file: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("not an object")
        return config
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{file}: no DeepSpeed JSON ({error}); see ds_configs/ for examples") from None


def _stage_of(config: dict[str, Any], file: str) -> int:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if not isinstance(stage, int) or not 0 <= stage <= 3:
        raise RecipeError(f"{file}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    return stage


def _by_stage(stage: int, sign: str) -> tuple[Strategy, str | None]:
    if stage == 3:
        return "zero3", None
    return "replicate", (
        f"{sign}: ZeRO-{stage} shards optimizer state and gradients, and those of the cores are a few megabytes; "
        "every rank holds the whole backbone (replicate). Stage 3 shards it"
    )

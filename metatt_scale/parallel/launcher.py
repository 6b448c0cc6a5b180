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
from typing import Any, Literal, NoReturn

from metatt_scale.paths import user_path
from metatt_scale.recipe import ParallelRecipe, RecipeError
from metatt_scale.strict_json import loads

Strategy = Literal["replicate", "fsdp2", "zero3"]


class ContradictionError(RecipeError):
    """The launcher asks for what the recipe excludes."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How this job holds its backbone."""

    strategy: Strategy
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's configuration as the user wrote it, for `zero3`."""
    deepspeed_file: str | None = None
    """Where it was read from."""
    note: str | None = None
    """One line that the user should read."""


def read_launch(recipe: ParallelRecipe) -> Launch:
    """Join the launcher's environment and the recipe's `parallel` section.

    Raises:
        ContradictionError: they contradict each other; the message says which to change.
        RecipeError: a DeepSpeed file that cannot be used.
    """
    asked, sign, file = _asked_by_launcher()
    file = recipe.deepspeed_config or file
    if recipe.deepspeed_config and asked == "fsdp2":
        raise ContradictionError(
            f"started with {sign}, but parallel.deepspeed_config is set; leave it out, or start with accelerate "
            "launch --use_deepspeed"
        )
    config, note, remedy = None, None, f"start with {_STARTED_BY.get(recipe.backbone)}"
    if file is not None:
        config = _read_config(file)
        stage = config.get("zero_optimization", {}).get("stage", 0)
        sign, remedy = f"{sign} with {file}" if sign else file, "name a DeepSpeed file of stage 3"
        asked, note = _by_stage(stage, sign)
    elif asked == "zero3" and (stage := os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")):
        if stage not in ("0", "1", "2", "3"):
            raise RecipeError(
                f"ACCELERATE_DEEPSPEED_ZERO_STAGE is {stage!r}; give accelerate launch --zero_stage 0, 1, 2 or 3"
            )
        asked, note = _by_stage(int(stage), f"{sign} --zero_stage {stage}")
    if asked is not None and recipe.backbone not in ("auto", asked):
        raise ContradictionError(
            f"parallel.backbone is {recipe.backbone}, but {sign} means {asked}; set parallel.backbone: auto or "
            f"{asked}, or {remedy}"
        )
    strategy: Strategy = (asked or "replicate") if recipe.backbone == "auto" else recipe.backbone
    if problem := recipe.foreign_to(strategy):
        raise ContradictionError(problem)
    _check_flags(recipe, config or {})
    if strategy != "zero3":
        return Launch(strategy=strategy, note=note)
    return Launch(strategy=strategy, deepspeed=config, deepspeed_file=file, note=note)


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


def _check_flags(recipe: ParallelRecipe, config: dict[str, Any]) -> None:
    """Refuse accelerate's own settings of how to shard where ours, which count, say something else."""
    fsdp, deepspeed = _is_on("ACCELERATE_USE_FSDP"), _is_on("ACCELERATE_USE_DEEPSPEED")
    offload = fsdp and _is_on("FSDP_OFFLOAD_PARAMS")
    keep = fsdp and os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "").lower() == "false"
    device = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none").lower() if deepspeed else "none"
    example = f"ds_configs/zero3_offload_{'nvme' if device == 'nvme' else 'cpu'}.json"
    for dropped, flag, ours in (
        (offload and not recipe.cpu_offload, "--fsdp_offload_params true", "parallel.cpu_offload: true"),
        (
            keep and recipe.reshard_after_forward,
            "--fsdp_reshard_after_forward false",
            "parallel.reshard_after_forward: false",
        ),
        (
            device not in ("none", offload_device(config)),
            f"--offload_param_device {device}",
            f"parallel.deepspeed_config: {example}",
        ),
    ):
        if dropped:
            raise ContradictionError(
                f"accelerate launch {flag} has no effect here; leave it out, or set {ours} instead"
            )


def offload_device(config: dict[str, Any]) -> str:
    """Return where a DeepSpeed configuration keeps the shards: `none` is the GPU."""
    return config.get("zero_optimization", {}).get("offload_param", {}).get("device", "none")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _read_config(file: str) -> dict[str, Any]:
    try:
        text = user_path(file, "parallel.deepspeed_config").read_text(encoding="utf-8")
        config = loads(text, parse_constant=_refuse_constant)
        if not isinstance(config, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{file}: not a DeepSpeed JSON file ({error}); see ds_configs/ for examples") from None
    for path in ("zero_optimization", "zero_optimization.offload_param", "bf16", "fp16"):
        parent, _, name = path.rpartition(".")
        section = (config.get(parent, {}) if parent else config).get(name, {})
        if not isinstance(section, dict):
            raise RecipeError(
                f"{file}: {path} is {json.dumps(section)[:60]}; it must be an object in braces, or be left out; see "
                "ds_configs/ for examples"
            )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:  # true is an int
        raise RecipeError(f"{file}: zero_optimization.stage is {json.dumps(stage)[:60]}; it must be 0, 1, 2 or 3")
    return config


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _by_stage(stage: int, sign: str) -> tuple[Strategy, str | None]:
    if stage == 3:
        return "zero3", None
    return "replicate", (
        f"{sign}: ZeRO-{stage} shards optimizer state and gradients, and those of the cores are a few megabytes; "
        "every rank holds the whole backbone (replicate). Stage 3 shards it"
    )

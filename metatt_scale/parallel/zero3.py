"""A frozen backbone sharded by DeepSpeed ZeRO-3, with no optimizer of DeepSpeed's."""

from __future__ import annotations

import copy
import os
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from metatt_scale.parallel.parity import Parity
from metatt_scale.parallel.world import World

_OURS = ("optimizer", "scheduler", "gradient_clipping")
"""Sections about what DeepSpeed never sees: the chain has an optimizer, a schedule and clipping of its own."""


class Zero3:
    """Cuts units with `zero.Init`; after `finish` the hooks of DeepSpeed's engine gather them module by module.

    Call the model itself, never DeepSpeed's engine, which would refuse `loss.backward()`.
    """

    def __init__(self, world: World, config: dict[str, Any], dtype: torch.dtype) -> None:
        """Prepare DeepSpeed on the process group that is there.

        Args:
            world: the ranks, with a process group (also for one).
            config: from `zero3_config`.
            dtype: the type of all weights.

        Raises:
            ValueError: a type that DeepSpeed cannot use here, or NVMe offloading without the library for it.
        """
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed reads this process's place from the environment, also where no launcher has set it.
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        import deepspeed

        # A collective that PyTorch has renamed; DeepSpeed's affair.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
        _check_supported(config, dtype)
        offload = config["zero_optimization"].get("offload_param", {})
        if world.device.type == "cpu" and offload.get("device") == "cpu":
            # There is nothing to pin for, and DeepSpeed would compile a library for it; its NVMe reader needs one.
            config = {**config, "zero_optimization": {**config["zero_optimization"]}}
            config["zero_optimization"]["offload_param"] = {**offload, "pin_memory": False}
        # A shared-memory collective for CPUs that would be compiled at every start; a process killed meanwhile leaves
        # a lock on which every later one waits for ever. gloo does its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False)
        self._deepspeed = deepspeed
        self._world = world
        self._config = config
        self._dtype = dtype
        self._parity = Parity()
        self._engine: Any = None

    def shard(self, unit: nn.Module) -> None:
        """Keep this rank's slice of every parameter of the unit."""
        self._parity.remember(unit)
        self._shard(unit)

    def finish(self, model: PreTrainedModel) -> None:
        """Shard what no unit holds, install the hooks, and compare a 4-bit layer with what it was.

        Raises:
            ValueError: the 4-bit layer computes something else now.
        """
        self._shard(model)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._engine, *_ = self._deepspeed.initialize(model=model, config=copy.deepcopy(self._config))
        for name, buffer in buffers.items():  # rotary frequencies in bf16 would be off by 0.4 %
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, buffer)
        self._parity.check(self._world, self._gathered)

    def _gathered(self, unit: nn.Module) -> AbstractContextManager[object]:
        return self._deepspeed.zero.GatheredParameters(list(unit.parameters()))

    def _shard(self, module: nn.Module) -> None:
        self._deepspeed.zero.Init(module=module, config_dict_or_path=copy.deepcopy(self._config), dtype=self._dtype)


def zero3_config(
    given: dict[str, Any] | None, *, micro_batch_size: int, accumulation: int, dtype: torch.dtype, world_size: int
) -> dict[str, Any]:
    """Return a complete DeepSpeed configuration: the user's, with "auto" and what is absent from the recipe.

    Args:
        given: as read from the user's file; plain ZeRO-3 when None.
        micro_batch_size: examples of one rank at once.
        accumulation: micro-batches of one optimizer step.
        dtype: of the backbone.
        world_size: number of ranks.

    Raises:
        ValueError: another stage than 3, or another precision than `backbone.dtype`.
    """
    config = copy.deepcopy(given or {})
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 3)
    if stage != 3:
        raise ValueError(
            f"zero_optimization.stage is {stage}, but only stage 3 shards a frozen model; set it to 3, or set "
            "parallel.backbone: replicate"
        )
    for name in _OURS:
        config.pop(name, None)
    for section, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        asked = config.setdefault(section, {}).get("enabled", "auto")
        if asked not in ("auto", dtype == wanted):
            raise ValueError(
                f"the DeepSpeed file has {section}.enabled: {str(asked).lower()}, but backbone.dtype is "
                f'{str(dtype).removeprefix("torch.")}; write "auto" there, or change backbone.dtype'
            )
        config[section]["enabled"] = dtype == wanted
    wanted_sizes = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world_size,
    }
    # These size DeepSpeed's own bookkeeping only; the recipe decides what a batch is.
    return _without_auto(config) | wanted_sizes


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Leave out values that are "auto", so that DeepSpeed's defaults hold."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def _check_supported(config: dict[str, Any], dtype: torch.dtype) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if dtype not in accelerator.supported_dtypes():
        raise ValueError(
            f"backbone.dtype is {str(dtype).removeprefix('torch.')}, in which DeepSpeed does not compute on "
            f"{accelerator.device_name()}; use bfloat16 or float32, or set parallel.backbone: fsdp2"
        )
    offload = config["zero_optimization"].get("offload_param", {})
    if offload.get("device") == "nvme":
        path = str(offload.get("nvme_path"))
        if not os.path.isdir(path):  # DeepSpeed would make it, on whatever disk that is
            raise ValueError(
                f"zero_optimization.offload_param.nvme_path is {path!r}, which is no folder; name one on a disk that "
                "is local to every node"
            )
        builder = accelerator.create_op_builder("AsyncIOBuilder")
        if builder is None or not builder.is_compatible(verbose=False):
            raise ValueError(
                "zero_optimization.offload_param.device is nvme, for which DeepSpeed builds a library that needs "
                "libaio; install it (on Debian and Ubuntu: apt install libaio-dev), or use "
                "ds_configs/zero3_offload_cpu.json"
            )

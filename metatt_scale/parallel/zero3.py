"""A frozen backbone sharded by DeepSpeed ZeRO-3, with no optimizer of DeepSpeed's."""

from __future__ import annotations

import copy
import os
import warnings
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from metatt_scale.parallel.launcher import offload_device
from metatt_scale.parallel.parity import Parity
from metatt_scale.parallel.world import World

_OURS = ("optimizer", "scheduler", "gradient_clipping")
"""Sections about what DeepSpeed never sees: the chain has an optimizer, a schedule and clipping of its own."""


class Zero3:
    """Cuts units with `zero.Init`; after `finish` the hooks of DeepSpeed's engine gather them module by module.

    Call the model itself, never DeepSpeed's engine, which would refuse `loss.backward()`.
    """

    def __init__(self, world: World, config: dict[str, Any], dtype: torch.dtype, file: str | None = None) -> None:
        """Prepare DeepSpeed on the process group that is there.

        Args:
            world: the ranks, with a process group (also for one).
            config: from `zero3_config`.
            dtype: the type of all weights.
            file: what the configuration was read from, for messages.

        Raises:
            ValueError: a configuration that DeepSpeed refuses, a type that it cannot use here, or NVMe offloading
                without the library for it.
        """
        tell_deepspeed(world.device)
        import deepspeed

        # A collective that PyTorch has renamed; DeepSpeed's affair.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
        _check_supported(config, dtype)
        if world.device.type == "cpu" and offload_device(config) == "cpu":
            # There is nothing to pin for, and DeepSpeed would compile a library for it; its NVMe reader needs one.
            config = {**config, "zero_optimization": {**config["zero_optimization"]}}
            config["zero_optimization"]["offload_param"] = {
                **config["zero_optimization"]["offload_param"],
                "pin_memory": False,
            }
        do_without_compiled_collective(deepspeed.ops)
        deepspeed.init_distributed(auto_mpi_discovery=False)
        _check_keys(config, file)
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

    def gathered(self, model: nn.Module, path: str) -> AbstractContextManager[object]:
        """Have the weights of the module at this path whole inside a `with` block; all ranks call it."""
        return self._gathered(model.get_submodule(path))

    def _gathered(self, unit: nn.Module) -> AbstractContextManager[object]:
        return self._deepspeed.zero.GatheredParameters(list(unit.parameters()))

    def _shard(self, module: nn.Module) -> None:
        self._deepspeed.zero.Init(module=module, config_dict_or_path=copy.deepcopy(self._config), dtype=self._dtype)


def do_without_compiled_collective(ops: ModuleType) -> None:
    """Keep DeepSpeed from compiling a shared-memory collective for CPUs at every start; gloo does its work.

    A process killed while it compiles leaves a lock on which every later one waits for ever. The table is written to
    without being read: to read it is to try the compilers, nvcc among them, for every operation DeepSpeed knows.

    Args:
        ops: `deepspeed.ops`.
    """
    vars(ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


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
        ValueError: a setting under which gathered weights are not released.
    """
    config = copy.deepcopy(given or {"zero_optimization": {"stage": 3}})
    if config.get("zero_optimization", {}).get("memory_efficient_linear") is False:
        raise ValueError(
            "zero_optimization.memory_efficient_linear is false, but PyTorch's own linear keeps a view of its weight "
            "from forward to backward, so that no gathered weight would be released; remove that key"
        )
    for name in _OURS:
        config.pop(name, None)
    for section, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config.setdefault(section, {})["enabled"] = dtype == wanted
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


def _check_keys(config: dict[str, Any], file: str | None) -> None:
    """Let DeepSpeed read the configuration before any weight is loaded, and tell in one line what it refuses."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except Exception as error:  # pydantic's, DeepSpeed's own, or whatever its code does with a value of another type
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{file or 'the DeepSpeed configuration'}: DeepSpeed refuses it ({problem}); correct or remove that key, "
            "see ds_configs/ for examples"
        ) from None


def tell_deepspeed(device: torch.device) -> None:
    """Set what DeepSpeed reads from the environment about this process's device, which is an index or the CPU."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")  # only a single process may have none
    else:  # it takes LOCAL_RANK for the GPU's index, which is 0 where each process sees one GPU only
        os.environ["LOCAL_RANK"] = str(device.index or 0)


def _check_supported(config: dict[str, Any], dtype: torch.dtype) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if dtype not in accelerator.supported_dtypes():
        raise ValueError(
            f"backbone.dtype is {str(dtype).removeprefix('torch.')}, in which DeepSpeed does not compute on "
            f"{accelerator.device_name()}; use bfloat16 or float32, or set parallel.backbone: fsdp2"
        )
    if offload_device(config) == "nvme":
        builder = accelerator.create_op_builder("AsyncIOBuilder")
        if builder is None or not builder.is_compatible(verbose=False):
            raise ValueError(
                "zero_optimization.offload_param.device is nvme, for which DeepSpeed builds a library that needs "
                "libaio; install it (on Debian and Ubuntu: apt install libaio-dev), or use "
                "ds_configs/zero3_offload_cpu.json"
            )

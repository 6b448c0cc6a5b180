"""What other libraries print: set in the environment before they are imported, so nothing heavy is imported here."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

_GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
"""Device files of NVIDIA's driver, of AMD's, and of either under Windows."""


def quiet_libraries(devices: Path = Path("/dev")) -> None:
    """Keep the libraries' chatter out of our progress; their errors still show, and what the user has set holds.

    Args:
        devices: where device files are.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # gloo's failures are exceptions, which `ending` puts into words; PyTorch would write their C++ stacks besides.
    # NCCL's watchdog ends the process itself, and its lines are all that is ever said.
    level = "ERROR" if expects_gpu(os.environ, devices) else "FATAL"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", level)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed sets its level when it loads, so here a filter.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", ".torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's calls
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)  # PEFT asks transformers for it


def expects_gpu(environment: Mapping[str, str], devices: Path) -> bool:
    """Return whether this process may compute on a GPU, as far as can be told without PyTorch.

    Args:
        environment: variables of this process; they may rule GPUs out.
        devices: where device files are.
    """
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return False
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    # Read up to its first entry that names no GPU: "", "-1", and Slurm's "NoDevFiles" leave none.
    if visible is not None and not re.match(r"\s*\+?\d|GPU-|MIG-", visible):
        return False
    return any(path for pattern in _GPU_FILES for path in devices.glob(pattern))

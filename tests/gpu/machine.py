"""The machine on which the GPU tests run, as one line of JSON: `python -m tests.gpu.machine cuda`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import torch

from metatt_scale.benchmark.report import cpu_name, describe_machine
from metatt_scale.hardware import find_hardware, why_no_gpu

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "flash-attn", "pydantic")


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware."""
    about = {**describe_machine(device, PACKAGES), "python": platform.python_version(), "cpu": cpu_name()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "driver": find_hardware().driver,
            "gpu": settings_of_gpu(),
            "cuda": torch.version.cuda,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return about


def settings_of_gpu() -> str:
    """Return what decides the speed of the GPU besides its name, as nvidia-smi has it."""
    fields = "power.limit,clocks.max.sm,ecc.mode.current"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (no nvidia-smi)"
    return f"{fields}: {done.stdout.strip()}"


if __name__ == "__main__":
    wanted, hardware = sys.argv[1], find_hardware()
    if wanted == "cuda" and not hardware.gpus:
        sys.exit(why_no_gpu(hardware, os.environ))
    print(json.dumps(describe(torch.device("cuda", 0) if wanted == "cuda" else torch.device("cpu"))))

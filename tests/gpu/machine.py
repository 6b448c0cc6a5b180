"""The machine on which the GPU tests run, as one line of JSON: `python -m tests.gpu.machine cuda`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from metatt_scale.benchmark.report import cpu_name, describe_machine

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "flash-attn", "pydantic")
_DRIVER = Path("/proc/driver/nvidia/version")


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware."""
    about = {**describe_machine(device, PACKAGES), "python": platform.python_version(), "cpu": cpu_name()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "driver": driver(),
            "cuda": torch.version.cuda,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return about


def driver() -> str:
    """Return what the driver says of itself and the GPU, by nvidia-smi or from its own file."""
    fields = "driver_version,power.limit,clocks.max.sm,ecc.mode.current"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode == 0:
            version, power, clock, ecc = (part.strip() for part in done.stdout.strip().split(","))
            return f"{version} (power limit {power}, clock up to {clock}, ECC {ecc})"
    except (OSError, ValueError, subprocess.TimeoutExpired):
        pass
    return _DRIVER.read_text(errors="replace").partition("\n")[0] if _DRIVER.is_file() else "unknown"


if __name__ == "__main__":
    wanted = sys.argv[1]
    if wanted == "cuda" and not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} finds no GPU (CUDA {torch.version.cuda}; driver: {driver()})")
    print(json.dumps(describe(torch.device("cuda", 0) if wanted == "cuda" else torch.device("cpu"))))

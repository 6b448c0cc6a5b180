"""What needs heavy libraries, or may crash or hang: `python -m metatt_scale.doctor.answers QUESTION...`.

Each answer is one line of JSON on stdout, in the order of the questions: `{"facts": ...}` or `{"error": ...}`. What
libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from metatt_scale.doctor.line import one_line
from metatt_scale.doctor.nvml import read_driver
from metatt_scale.files import cache_folder
from metatt_scale.paths import user_home, user_path

if TYPE_CHECKING:
    from metatt_scale.hardware import Hardware

_IMPORT = "import "
_BLOCK = 64  # weights that share a scale in NF4
_ROWS, _WIDTH = 128, 256  # of the matrix that is quantised: it holds every one of the 16 codes
_LITTLE_MEMORY = 2 * 2**30  # of a GPU, below which a CUDA context might be what a run there is then missing
_SECONDS = 20  # for two threads of one process to meet


def read_folders() -> list[dict[str, Any]]:
    """Return free space, in bytes, of each folder that commands write to, and whether they can."""
    wanted = {"working folder": Path.cwd, "Hugging Face cache": _hub_cache, "metatt_scale cache": cache_folder}
    return [{"name": name, **_read_folder(find)} for name, find in wanted.items()]


def _hub_cache() -> Path:
    """Return where huggingface_hub keeps models, by its own rule and without importing it."""
    for name, inside in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if value := os.environ.get(name):
            return user_path(os.path.expandvars(value), name) / inside
    base = os.environ.get("XDG_CACHE_HOME")
    cache = user_path(base, "XDG_CACHE_HOME") if base else user_home("set HF_HOME to a folder for models") / ".cache"
    return cache / "huggingface" / "hub"


def _read_folder(find: Callable[[], Path]) -> dict[str, Any]:
    path = None
    try:
        path = find().absolute()
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
        disk = os.statvfs(nearest)
        inodes = disk.f_favail if disk.f_files else None  # btrfs makes them as needed and counts none
        room = {"free": disk.f_bavail * disk.f_frsize, "total": disk.f_blocks * disk.f_frsize, "inodes": inodes}
        return {"path": str(path), **room, "refusal": _why_not_writable(nearest)}
    except (OSError, ValueError) as error:  # ValueError: no home folder
        return {"path": None if path is None else str(path), "refusal": one_line(error)}


def _why_not_writable(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # permissions alone do not tell of quotas and file servers
            file.write(b"metatt_scale doctor")
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return ""


def read_torch() -> dict[str, Any]:
    """Import PyTorch and return what its build has."""
    import torch
    from torch import distributed
    from torch.cuda import nccl

    has_nccl = distributed.is_available() and distributed.is_nccl_available()
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "kernels": torch.cuda.get_arch_list(),
        "nccl": ".".join(map(str, nccl.version())) if has_nccl else None,
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def read_hardware() -> dict[str, Any]:
    """Return what `metatt_scale.hardware` finds, and the device that commands take here."""
    from metatt_scale.hardware import find_hardware

    return describe_hardware(find_hardware(), os.environ)


def describe_hardware(found: Hardware, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the same for hardware and variables that are given."""
    from metatt_scale.hardware import choose, why_no_gpu

    choice, refusal = _try(lambda: choose(found, "auto", environment))
    gpus = [
        {**asdict(gpu), "emulates_bfloat16": found.emulates_bfloat16(index)} for index, gpu in enumerate(found.gpus)
    ]
    return {
        "gpus": gpus,
        "nodes": found.nodes,
        "why_no_gpu": "" if gpus else why_no_gpu(found, environment),
        "device": choice.line if choice else "",
        "warnings": choice.warnings if choice else (),
        "refusal": refusal,
    }


def read_launch() -> dict[str, Any]:
    """Return what the launcher's variables mean to the commands, for a recipe that leaves `parallel` as it is."""
    from metatt_scale.parallel import place_in_world, read_launch
    from metatt_scale.recipe import ParallelRecipe

    place, place_refusal = _try(place_in_world)
    launch, launch_refusal = _try(lambda: read_launch(ParallelRecipe()))
    return {
        "place": place._asdict() if place else None,
        "strategy": launch.strategy if launch else None,
        "note": launch.note if launch else None,
        "refusals": [text for text in (place_refusal, launch_refusal) if text],
    }


def _try(act: Callable[[], Any]) -> tuple[Any, str]:
    """Return what `act` returns and "", or None and what it says to the user."""
    try:
        return act(), ""
    except ValueError as error:
        return None, str(error)


def _device() -> Any:
    """Return the device that commands take here; the CPU where they refuse to choose."""
    import torch

    from metatt_scale.hardware import choose, find_hardware

    choice, _ = _try(lambda: choose(find_hardware(), "auto", os.environ))
    return choice.device if choice else torch.device("cpu")


def read_attention() -> dict[str, Any]:
    """Return the attention that a bfloat16 backbone gets here."""
    from metatt_scale.backbone.attention import pick_attention

    device = _device()
    return {"device": str(device), "attention": pick_attention("auto", device, "bfloat16")}


def try_four_bits() -> dict[str, Any]:
    """Quantise a matrix to NF4 on the device, unpack it and multiply by it.

    Returns:
        `beyond`: the largest difference to the original in units of its block's largest weight; `product`: the
        relative error of a product, for one row as in generation and for several as in training.
    """
    import torch

    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    cextension: Any = importlib.import_module("bitsandbytes.cextension")
    device = _device()
    facts: dict[str, Any] = {"device": str(device), "library": _library_of(cextension.lib)}
    if device.type == "cuda" and 0 < (free := _free_memory(device)) < _LITTLE_MEMORY:
        return {**facts, "free": free}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_ROWS, _WIDTH, generator=generator).to(torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(weight.to(device), blocksize=_BLOCK, quant_type="nf4")
    unpacked = bitsandbytes.functional.dequantize_4bit(packed, state).float().cpu()
    scales = weight.float().view(-1, _BLOCK).abs().amax(1, keepdim=True)
    beyond = ((unpacked - weight.float()).view(-1, _BLOCK) / scales).abs().max()
    products = []
    for rows in (1, 4):
        inputs = torch.randn(rows, _WIDTH, generator=generator).to(torch.bfloat16)
        with torch.no_grad():
            product = bitsandbytes.matmul_4bit(inputs.to(device), packed.t(), quant_state=state).float().cpu()
        expected = inputs.float() @ unpacked.T
        products.append(float((product - expected).norm() / expected.norm()))
    return {**facts, "beyond": float(beyond), "product": max(products)}


def _library_of(library: Any) -> dict[str, Any]:
    """Return the file that bitsandbytes has loaded, or why it has loaded none."""
    file = getattr(library.__dict__.get("_lib"), "_name", None)
    return {
        "file": None if file is None else Path(file).name,
        "for_gpu": bool(getattr(library, "compiled_with_cuda", False)),
        "error": str(library.__dict__.get("error_msg", "")),
    }


def _free_memory(device: Any) -> int:
    """Return free bytes of a GPU without a CUDA context on it; 0 where the driver does not tell."""
    import torch

    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    driver = read_driver() or {"gpus": []}
    return next((gpu["free"] for gpu in driver["gpus"] if gpu["uuid"] == uuid), 0)


def read_deepspeed() -> dict[str, Any]:
    """Return whether DeepSpeed's library for NVMe is built, or what building it needs; nothing is compiled."""
    if _device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as our engine does
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    headers = (Path("/usr/include/libaio.h"), Path("/usr/local/include/libaio.h"))
    accelerator: Any = get_accelerator()
    return {
        "accelerator": accelerator.device_name(),
        "built": bool(installed_ops.get("async_io")),
        "libaio": any(header.is_file() for header in headers),
        "compiler": shutil.which(os.environ.get("CXX", "c++")),
        "ninja": shutil.which("ninja"),
    }


def try_gloo() -> dict[str, Any]:
    """Let two threads of this process meet as two ranks and sum a tensor, over the interface that gloo chooses."""
    import torch
    from torch.distributed import HashStore, ProcessGroupGloo  # pyright: ignore[reportPrivateImportUsage]

    store = HashStore()
    sums: dict[int, float | str] = {}

    def join(rank: int) -> None:
        try:
            group: Any = ProcessGroupGloo(store, rank, 2, timedelta(seconds=_SECONDS))
            value = torch.tensor([rank + 1.0])
            group.allreduce([value]).wait()
            sums[rank] = float(value)
        except RuntimeError as error:
            sums[rank] = one_line(error)

    threads = [Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"sums": [sums[0], sums[1]]}


ANSWERS: dict[str, Callable[[], Any]] = {
    "folders": read_folders,
    "driver": read_driver,
    "torch": read_torch,
    "hardware": read_hardware,
    "launch": read_launch,
    "gloo": try_gloo,
    "attention": read_attention,
    "four bits": try_four_bits,
    "deepspeed": read_deepspeed,
}
"""By question, in the order in which they are asked; `import NAME` imports a module and has no facts."""


def answer(question: str) -> dict[str, Any]:
    """Return the facts that a question asks for, or the error on the way to them."""
    try:
        if question.startswith(_IMPORT):
            importlib.import_module(question.removeprefix(_IMPORT))
            return {"facts": None}
        return {"facts": ANSWERS[question]()}
    except (Exception, SystemExit) as error:  # some packages leave the process where their import fails
        return {"error": one_line(error)}


def answers(questions: list[str]) -> Iterator[str]:
    """Yield each answer as one line of JSON."""
    for question in questions:
        yield json.dumps(answer(question))


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)  # what libraries print is no answer
        for line in answers(sys.argv[1:]):
            print(line, file=channel, flush=True)
        os._exit(0)  # with the threads and libraries of a broken installation still there

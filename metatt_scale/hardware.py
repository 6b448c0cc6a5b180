"""What this machine can compute on, and which device this process takes.

`find_hardware` looks at the machine and decides nothing. `choose` decides from what was found and from the
environment; it is a pure function, so that every case can be tested without the machine that has it.
"""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from metatt_scale.recipe import RecipeError

_DRIVER = Path("/proc/driver/nvidia/version")
_GIB = 2**30
_NATIVE_BF16 = (8, 0)
"""First compute capability of NVIDIA GPUs that calculate in bfloat16; older ones emulate it."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that PyTorch can use."""

    name: str
    capability: tuple[int, int]
    """Compute capability, (major, minor)."""
    memory: int
    """Bytes in all."""
    uuid: str = ""
    """Identifies the GPU among all of all machines; empty where PyTorch does not say."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What was found on this machine."""

    torch: str
    """PyTorch's version, with its build."""
    cuda: str | None = None
    """The CUDA version that PyTorch was built for; None for other builds."""
    rocm: str | None = None
    """The ROCm version that PyTorch was built for; None for other builds."""
    gpus: tuple[Gpu, ...] = ()
    """The GPUs that PyTorch can use, by index."""
    reason: str = ""
    """PyTorch's own words, where it is built for GPUs and can use none."""
    nodes: tuple[str, ...] = ()
    """Device files of NVIDIA's driver: /dev/nvidia0 and so on, /dev/nvidiactl."""
    denied: tuple[str, ...] = ()
    """Those of them that this process may not open."""
    driver: str | None = None
    """Version of NVIDIA's kernel module; None where it is not loaded."""
    driver_cuda: tuple[int, int] | None = None
    """Newest CUDA version that the driver's library serves; None where there is no such library."""
    others: tuple[str, ...] = ()
    """Accelerators that PyTorch could use and this toolkit does not support: MPS, XPU."""
    threads: int = 1
    """Threads that PyTorch computes with on the CPU."""

    def emulates_bfloat16(self, index: int) -> bool:
        """Return whether a GPU has no arithmetic of its own for bfloat16."""
        return self.rocm is None and self.gpus[index].capability < _NATIVE_BF16


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The device a process takes, and what its user should know of it."""

    device: torch.device
    line: str
    """One line that names the device."""
    warnings: tuple[str, ...] = ()


def find_hardware() -> Hardware:
    """Look at this machine and this build of PyTorch; starts CUDA where there is any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of an unusable driver; `reason` holds the same words
        gpus = _gpus()
    nodes = tuple(sorted(str(path) for path in Path("/dev").glob("nvidia*") if re.search(r"\d$|ctl$", path.name)))
    return Hardware(
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        rocm=torch.version.hip,
        gpus=gpus,
        reason="" if gpus else _why_none(),
        nodes=nodes,
        denied=tuple(node for node in nodes if not os.access(node, os.R_OK | os.W_OK)),
        driver=driver_version(_DRIVER.read_text(encoding="utf-8", errors="replace")) if _DRIVER.is_file() else None,
        driver_cuda=_driver_cuda(),
        others=tuple(
            name
            for name, there in (("MPS", torch.backends.mps.is_available()), ("XPU", torch.xpu.is_available()))
            if there
        ),
        threads=torch.get_num_threads(),
    )


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(
        Gpu(name=p.name, capability=(p.major, p.minor), memory=p.total_memory, uuid=str(getattr(p, "uuid", "")))
        for p in found
    )


def _why_none() -> str:
    """Return PyTorch's reason for having no GPU, in one line; empty where it is not built for any."""
    if torch.version.cuda is None and torch.version.hip is None:
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0]
    return "no reason given"


def driver_version(text: str) -> str:
    """Return the version out of the text of /proc/driver/nvidia/version."""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]*)", text)
    return found[1] if found else text.strip().partition("\n")[0]


def _driver_cuda() -> tuple[int, int] | None:
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def pick_device(wanted: str = "auto", console: Console | None = None, dtype: str | None = None) -> torch.device:
    """Take the device of this process and, where a console is given, say on it which one that is.

    Args:
        wanted: as of `choose`.
        console: prints the device in one line, and warnings; silent on all ranks but the first.
        dtype: as of `choose`.

    Raises:
        ValueError: as `choose`.
    """
    choice = choose(find_hardware(), wanted, os.environ, dtype)
    if choice.device.type == "cuda":
        torch.cuda.set_device(choice.device)
    if console is not None:
        console.print(choice.line, highlight=False, soft_wrap=True)
        for text in choice.warnings:
            console.print(text, style="yellow", highlight=False, soft_wrap=True)
    return choice.device


def choose(hardware: Hardware, wanted: str, environment: Mapping[str, str], dtype: str | None = None) -> Choice:
    """Return the device of this process.

    Args:
        hardware: what was found.
        wanted: `auto` takes a GPU where there is one, `cpu` none, `cuda` insists on one.
        environment: variables of this process. ACCELERATE_USE_CPU=true and an empty CUDA_VISIBLE_DEVICES mean the
            CPU. LOCAL_RANK is this process's place among those of the node.
        dtype: `backbone.dtype`, to warn of a GPU that emulates it.

    Raises:
        RecipeError: `cuda` is wanted and cannot be had, or PyTorch is built for CUDA, the machine has GPUs, and none
            can be used.
        ValueError: this process has no GPU of its own.
    """
    wish = _wish_for_cpu(environment)
    if wanted == "cuda" and wish:
        raise RecipeError(f"device is cuda, but {wish}; unset that variable, or set device: cpu")
    if wanted == "cpu" or wish:
        return _cpu(hardware, wish)
    if hardware.gpus:
        return _gpu(hardware, gpu_index(len(hardware.gpus), environment), dtype)
    if wanted == "cuda" or (hardware.cuda and hardware.nodes):
        said = "device is cuda, but " if wanted == "cuda" else ""
        remedy = "or insist on the CPU (device=cpu of a recipe, --device cpu of the other commands)"
        raise RecipeError(f"{said}{why_no_gpu(hardware, environment)}, {remedy}")
    notes = [why_no_gpu(hardware, environment)] if hardware.nodes else []
    if hardware.others:
        notes.append(f"{' and '.join(hardware.others)}: not supported by this toolkit, so the CPU is used")
    return _cpu(hardware, None, *notes)


def _wish_for_cpu(environment: Mapping[str, str]) -> str | None:
    """Return the variable by which GPUs are ruled out, with its value; None where there is none."""
    asked = environment.get("ACCELERATE_USE_CPU", "")
    if asked.lower() in ("1", "true", "yes"):
        return f"ACCELERATE_USE_CPU is {asked}"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    # CUDA reads the list up to its first entry that names no GPU: "", "-1", and Slurm's "NoDevFiles".
    if visible is not None and not re.match(r"\s*\+?\d|GPU-|MIG-", visible):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}"
    return None


def why_no_gpu(hardware: Hardware, environment: Mapping[str, str]) -> str:
    """Return why PyTorch can use no GPU, as far as can be told, and the remedy."""
    build, nodes = f"PyTorch {hardware.torch}", ", ".join(hardware.nodes)
    if hardware.cuda is None and hardware.rocm is None:
        where = f"so the GPUs here ({nodes}) are not used" if hardware.nodes else "so it can use no GPU"
        version = hardware.torch.partition("+")[0]
        return (
            f"{build} is built without CUDA, {where}; run `pip install --force-reinstall torch=={version}` (PyPI has "
            "wheels for Linux that are built for CUDA)"
        )
    if not hardware.nodes:
        return f"{build} finds no GPU on this machine ({hardware.reason}); use a machine that has one"
    driver = f"driver {hardware.driver or 'not loaded'}"
    if hardware.driver_cuda:
        driver += ", for CUDA up to {}.{}".format(*hardware.driver_cuda)
    return (
        f"{build}, built for {_built_for(hardware)}, can use none of the NVIDIA GPUs here ({nodes}; {driver}): "
        f"{hardware.reason}; {_remedy(hardware, environment)}"
    )


def _built_for(hardware: Hardware) -> str:
    return f"CUDA {hardware.cuda}" if hardware.cuda else f"ROCm {hardware.rocm}"


def _remedy(hardware: Hardware, environment: Mapping[str, str]) -> str:
    """Return what helps where PyTorch is built for GPUs and can use none of those that have device files."""
    if hardware.cuda is None:
        return "install a PyTorch that is built for CUDA"
    if hardware.denied:
        return f"this process may not open {hardware.denied[0]}: ask the batch system or the container for a GPU"
    if hardware.driver is None or hardware.driver_cuda is None:
        part = "kernel module is not loaded" if hardware.driver is None else "library libcuda.so.1 is not there"
        return f"the driver's {part}: install the driver, and see that `nvidia-smi` lists the GPUs"
    needed = tuple(map(int, hardware.cuda.split(".")[:2]))
    if hardware.driver_cuda[0] < needed[0]:
        return (
            f"the driver is too old: update it to one for CUDA {hardware.cuda}, or install a PyTorch that is built "
            "for CUDA {}".format(hardware.driver_cuda[0])
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}: name GPUs that `nvidia-smi -L` lists, or unset it"
    return "see that `nvidia-smi` lists the GPUs (after an update of the driver the machine has to be restarted)"


def gpu_index(count: int, environment: Mapping[str, str]) -> int:
    """Return which of the visible GPUs this process takes.

    LOCAL_RANK counts among all GPUs of the node. A batch system may show each of its tasks one GPU only, which has
    index 0 whatever the task's LOCAL_RANK. torchrun and deepspeed show all their processes the same GPUs, so there
    a LOCAL_RANK beyond them has none. Whether two processes have taken one GPU all the same is found when they meet
    (`parallel.meeting`).

    Args:
        count: visible GPUs, at least one.
        environment: variables of this process.

    Raises:
        ValueError: this process has no GPU of its own.
    """
    text = environment.get("LOCAL_RANK", "0")
    if not re.fullmatch("[0-9]{1,9}", text):
        raise RecipeError(f"LOCAL_RANK is {text!r}; it must be a whole number from 0 on")
    index = int(text)
    if index < count:
        return index
    same_for_all = "TORCHELASTIC_RUN_ID" in environment or "CROSS_SIZE" in environment
    if count == 1 and not same_for_all:
        return 0
    several = "s" if count > 1 else ""
    raise ValueError(
        f"LOCAL_RANK is {index}, but this process sees {count} GPU{several}; start at most {count} "
        f"process{'es' if count > 1 else ''} here, or compute on the CPU (ACCELERATE_USE_CPU=true)"
    )


def _gpu(hardware: Hardware, index: int, dtype: str | None) -> Choice:
    gpu, notes = hardware.gpus[index], ()
    if dtype == "bfloat16" and hardware.emulates_bfloat16(index):
        capability = "{}.{}".format(*gpu.capability)
        notes = (
            f"backbone.dtype is bfloat16, which {gpu.name} (compute capability {capability}) only emulates, slowly; "
            "train with backbone.dtype=float16",
        )
    line = f"device: {gpu.name} (cuda:{index}, {gpu.memory / _GIB:.0f} GiB)"
    return Choice(device=torch.device("cuda", index), line=line, warnings=notes)


def _cpu(hardware: Hardware, wish: str | None, *notes: str) -> Choice:
    threads = f"{hardware.threads} thread{'s' * (hardware.threads > 1)}"
    line = f"device: CPU, {threads}" + (f" ({wish})" if wish else "")
    return Choice(device=torch.device("cpu"), line=line, warnings=notes)

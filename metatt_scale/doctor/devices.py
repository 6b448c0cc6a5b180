"""The driver, PyTorch's build, GPUs, the device that commands take, and the kernels that run on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metatt_scale.doctor.ask import Answer, no_facts
from metatt_scale.doctor.line import Line, size_of, split

_WIDEST = 0.155
"""Bound on an NF4 weight's distance from the original, in units of its block's largest weight: half of the widest gap
between two codes is 0.1519, and unpacking rounds to bfloat16."""
_PRODUCT = 0.01
"""Bound on the relative error of a product in bfloat16, whose roundings are 2^-9 = 0.002 each."""
_BUSY = 0.5
"""Share of a GPU's memory that others hold from which on it is worth a warning."""


def check_driver(answer: Answer, nodes: Sequence[str]) -> Line:
    """Return the line of NVIDIA's driver.

    Args:
        answer: to `driver`.
        nodes: the driver's device files, for example /dev/nvidia0.
    """
    if answer.error and not nodes:  # CUDA's container images hold the library without a driver
        return Line(name="driver", found=f"none of NVIDIA's ({answer.error})", verdict="note")
    if answer.error:
        return no_facts("driver", answer, "restart the machine if the driver was updated; see what `nvidia-smi` says")
    if answer.facts is None:
        if nodes:
            found = f"device files ({', '.join(nodes)}), but no driver library (libnvidia-ml.so.1)"
            remedy = "install the driver; in a container, start it with the NVIDIA container toolkit (--gpus all)"
            return Line(name="driver", found=found, verdict="problem", remedy=remedy)
        return Line(name="driver", found="none of NVIDIA's", verdict="note")
    cuda = ".".join(map(str, answer.facts["cuda"]))
    gpus = len(answer.facts["gpus"])
    found = f"NVIDIA {answer.facts['version']}, for CUDA up to {cuda}, {gpus} GPU{'s' * (gpus != 1)}"
    return Line(name="driver", found=found)


def check_build(build: Mapping[str, Any], hardware: Answer) -> Line:
    """Return the line of PyTorch's build, and whether it can use the GPUs that are here."""
    name = "PyTorch's build"
    backend = next((f"for {k} {build[key]}" for k, key in (("CUDA", "cuda"), ("ROCm", "rocm")) if build[key]), "")
    found = backend or "without CUDA"
    if hardware.facts is None:
        return no_facts(name, hardware)
    facts = hardware.facts
    if facts["gpus"]:
        kernels = " ".join(build["kernels"]) or "unknown GPUs"
        return Line(name=name, found=f"{found}, with kernels for {kernels}")
    if not facts["nodes"]:
        return Line(name=name, found=f"{found}; no GPU here", verdict="note")
    if not (facts["refusal"] or facts["warnings"]):
        return Line(name=name, found=f"{found}; the GPUs here are not used, as was asked for", verdict="note")
    why, remedy = split(facts["why_no_gpu"])
    return Line(name=name, found=why, verdict="problem", remedy=remedy)


def check_gpus(build: Mapping[str, Any], hardware: Answer, driver: Answer) -> Iterator[Line]:
    """Yield a line for each GPU that PyTorch can use, and one for those it does not see."""
    usable = hardware.facts["gpus"] if hardware.facts else []
    listed = {gpu["uuid"]: gpu for gpu in (driver.facts or {"gpus": []})["gpus"]}
    for index, gpu in enumerate(usable):
        known = listed.pop(gpu["uuid"].removeprefix("GPU-"), None)
        yield check_gpu(f"GPU {index}", gpu, known["free"] if known and known["total"] else None, build)
    if listed:
        names = ", ".join(f"{gpu['name']} ({size_of(gpu['total'])})" for gpu in listed.values())
        yield Line(name="other GPUs", found=f"PyTorch does not see {names}", verdict="note")


def check_gpu(name: str, gpu: Mapping[str, Any], free: int | None, build: Mapping[str, Any]) -> Line:
    """Return the line of one GPU.

    Args:
        name: by which it is listed.
        gpu: as of `hardware.Gpu`, with `emulates_bfloat16`.
        free: bytes; None where the driver does not tell.
        build: of PyTorch.
    """
    capability = tuple(gpu["capability"])
    bfloat16 = "emulated" if gpu["emulates_bfloat16"] else "native"
    room = size_of(gpu["memory"]) + ("" if free is None else f", {size_of(free)} free")
    found = f"{gpu['name']}, {room}, compute capability {capability[0]}.{capability[1]}, bfloat16 {bfloat16}"
    if build["cuda"] and build["kernels"] and not has_kernels(build["kernels"], capability):
        remedy = "install a PyTorch whose build has kernels for this GPU (https://pytorch.org/get-started)"
        found += f", which this build has no kernels for ({' '.join(build['kernels'])})"
        return Line(name=name, found=found, verdict="problem", remedy=remedy)
    remedies = []
    if gpu["emulates_bfloat16"]:
        remedies.append("train with backbone.dtype=float16: bfloat16 is slow here")
    if free is not None and free < (1 - _BUSY) * gpu["memory"]:
        remedies.append("see with `nvidia-smi` which process holds its memory")
    return Line(name=name, found=found, verdict="warning" if remedies else "ok", remedy="; ".join(remedies))


def has_kernels(kernels: Sequence[str], capability: tuple[int, ...]) -> bool:
    """Return whether a build runs on a GPU of this compute capability.

    `sm_80` runs on every later GPU of the same major number, `compute_80` (code for the driver to translate) on every
    later GPU; `sm_90a` and the like on that GPU alone.
    """
    for kernel in kernels:
        kind, _, digits = kernel.partition("_")
        exact = not digits.isdigit()
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        built_for = int(digits[:-1]), int(digits[-1])
        if built_for == capability or (not exact and kind == "compute" and built_for <= capability):
            return True
        if not exact and built_for[0] == capability[0] and built_for <= capability:
            return True
    return False


def check_device(hardware: Answer) -> Line:
    """Return the line of the device that commands take."""
    if hardware.facts is None:
        return no_facts("device", hardware)
    facts = hardware.facts
    if facts["refusal"]:
        why, remedy = split(facts["refusal"])
        _, told_above, rest = facts["refusal"].partition(facts["why_no_gpu"] or "\n")
        if told_above:
            why, remedy = "commands refuse to start", f"see PyTorch's build{rest}"
        return Line(name="device", found=f"none: {why}", verdict="problem", remedy=remedy)
    found = facts["device"].removeprefix("device: ")
    if facts["warnings"]:
        remedies = (text if text != facts["why_no_gpu"] else "see PyTorch's build" for text in facts["warnings"])
        return Line(name="device", found=found, verdict="warning", remedy="; ".join(remedies))
    return Line(name="device", found=found)


def check_attention(answer: Answer) -> Line:
    """Return the line of the attention kernel that `backbone.attention: auto` takes."""
    if answer.error:
        return no_facts("attention", answer)
    attention = answer.facts["attention"]
    found = f"`auto` takes {attention} for bfloat16 on {answer.facts['device']}"
    if attention != "sdpa" or answer.facts["device"] == "cpu":
        return Line(name="attention", found=found)
    return Line(
        name="attention", found=f"{found}; flash-attn needs its package and compute capability 8.0", verdict="note"
    )


def check_four_bits(answer: Answer) -> Line:
    """Return the line of bitsandbytes' kernels: do they pack, unpack and multiply on the device, and rightly."""
    name = "4-bit kernels"
    remedy = "update bitsandbytes and PyTorch together; `python -m bitsandbytes` tells more"
    if answer.error:
        return no_facts(name, answer, remedy)
    facts = answer.facts
    library, on_gpu = facts["library"], facts["device"] != "cpu"
    file = library["file"] or f"no library of its own ({library['error']})"
    where = f"{file}, on {facts['device']}"
    if "free" in facts:
        found = f"{where}: not tried, as other processes have left {size_of(facts['free'])} of its memory"
        return Line(name=name, found=found, verdict="note")
    beyond, product = facts["beyond"], facts["product"]
    figures = f"largest error {beyond:.3f} of a block's largest weight, product off by {product:.1e}"
    # Comparisons with NaN are false, so these ask for what is right.
    if not (beyond <= _WIDEST and product <= _PRODUCT):
        bounds = f"allowed: {_WIDEST} and {_PRODUCT}"
        return Line(
            name=name, found=f"{where}: wrong results ({figures}; {bounds})", verdict="problem", remedy=remedy
        )
    if on_gpu and not library["for_gpu"]:
        found = f"{where}: {figures}, but the library is not built for GPUs"
        return Line(name=name, found=found, verdict="problem", remedy=remedy)
    if library["file"] is None:
        return Line(name=name, found=f"{where}: {figures}", verdict="warning", remedy=remedy)
    return Line(name=name, found=f"{where}: NF4 packs, unpacks and multiplies; {figures}")


def check_deepspeed(answer: Answer) -> Line:
    """Return the line of the one library that DeepSpeed would compile for us: async_io, for offloading to NVMe."""
    name = "DeepSpeed's ops"
    if answer.error:
        return no_facts(name, answer, "pip install --force-reinstall --no-deps deepspeed")
    facts = answer.facts
    start = f"for {facts['accelerator']}; async_io (only ZeRO-3 with offloading to NVMe needs it, and no other op)"
    if facts["built"]:
        return Line(name=name, found=f"{start} is built")
    needs = {
        "libaio.h (apt install libaio-dev)": facts["libaio"],
        "C++ compiler (apt install g++)": facts["compiler"],
        "ninja (pip install ninja)": facts["ninja"],
    }
    missing = [need for need, there in needs.items() if not there]
    if missing:
        return Line(name=name, found=f"{start} cannot be compiled: no {', no '.join(missing)}", verdict="note")
    return Line(name=name, found=f"{start} will be compiled when it is first used", verdict="note")


def check_cpu(cpuinfo: str, build: Mapping[str, Any]) -> Line:
    """Return the line of the CPU: its name, and whether it multiplies bfloat16.

    Args:
        cpuinfo: text of /proc/cpuinfo.
        build: of PyTorch; empty where there is none.
    """
    fields = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in cpuinfo.splitlines())
    }
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    native = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    level = f", PyTorch uses {build['cpu']}" if build else ""
    found = fields.get("model name", "unknown model") + level
    if native:
        return Line(name="CPU", found=f"{found}, bfloat16 native ({', '.join(native)})")
    return Line(name="CPU", found=f"{found}, bfloat16 emulated", verdict="note")

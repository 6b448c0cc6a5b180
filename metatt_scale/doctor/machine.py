"""Cores and threads, memory, limits and disks."""

from __future__ import annotations

import math
import os
import re
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metatt_scale.doctor.ask import Answer, no_facts
from metatt_scale.doctor.line import Line, Verdict, size_of

_GIB = 2**30
_LITTLE_MEMORY = 2 * _GIB
_LITTLE_SHARED = _GIB
_FULL = _GIB // 10  # adapters, checkpoints and logs of a small run have room in it
_LITTLE_DISK = {"Hugging Face cache": 20 * _GIB}  # the weights of 7 B parameters take 14 GiB
_LITTLE_DISK_ELSE = 2 * _GIB
_ELSEWHERE = {
    "working folder": "work in another folder",
    "Hugging Face cache": "set HF_HOME to another folder",
    "metatt_scale cache": "set METATT_CACHE to another folder",
}
_FEW_FILES = 1024
_BUSY = 0.5  # cores
_SAMPLE_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Cores:
    """What computes on this machine's CPU."""

    cores: int
    """Of the machine."""
    allowed: int
    """That this process may run on."""
    quota: float | None = None
    """Cores' worth of time that its container gets; None for no limit."""
    busy: float | None = None
    """Cores that other processes keep busy; None where that cannot be told."""
    load: float = 0.0
    """Load average of the last minute."""
    threads: int | None = None
    """That PyTorch computes with; None where it cannot be imported."""


def read_cores(threads: int | None, busy: float | None) -> Cores:
    """Look at this machine's cores."""
    cores = os.cpu_count() or 1
    return Cores(
        cores=cores,
        allowed=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        quota=quota_of(_read("/sys/fs/cgroup/cpu.max")),
        busy=busy,
        load=os.getloadavg()[0],
        threads=threads,
    )


def measure_busy() -> float | None:
    """Return how many cores all processes keep busy just now; None where the system does not tell."""
    before = _read("/proc/stat")
    time.sleep(_SAMPLE_SECONDS)
    return busy_cores(before, _read("/proc/stat"))


def busy_cores(before: str, after: str) -> float | None:
    """Return how many cores were busy between two states of /proc/stat."""
    (idle, total, cores), (later_idle, later_total, _) = _times(before), _times(after)
    spent = later_total - total
    return cores * (1 - (later_idle - idle) / spent) if spent > 0 else None


def _times(stat: str) -> tuple[int, int, int]:
    """Return idle time, all time (both in ticks, summed over cores) and the number of cores."""
    lines = [line.split() for line in stat.splitlines() if line.startswith("cpu")]
    times = next((list(map(int, words[1:9])) for words in lines if words[0] == "cpu"), [0] * 8)
    return times[3] + times[4], sum(times), sum(words[0] != "cpu" for words in lines)


def quota_of(text: str) -> float | None:
    """Return the cores' worth of time in a cgroup's cpu.max, `QUOTA PERIOD` in microseconds."""
    found = re.fullmatch(r"(\d+) (\d+)", text.strip())
    return int(found[1]) / int(found[2]) if found and int(found[2]) else None


def check_threads(cores: Cores, environment: Mapping[str, str]) -> Line:
    """Return the line of cores and threads."""
    asked = environment.get("OMP_NUM_THREADS")
    usable = cores.allowed if cores.quota is None else min(cores.allowed, max(1, math.ceil(cores.quota)))
    threads = "PyTorch's threads unknown" if cores.threads is None else f"PyTorch computes with {cores.threads}"
    parts = [f"{cores.cores} cores, {usable} usable; {threads}", f"load {cores.load:.1f}"]
    parts.insert(1, "OMP_NUM_THREADS is unset" if asked is None else f"OMP_NUM_THREADS is {asked!r}")
    if cores.busy is not None:
        parts.append(f"{cores.busy:.1f} cores busy with other processes")
    verdict: Verdict = "ok"
    remedy = ""
    if asked is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", asked.strip()):
        verdict, remedy = "warning", "set OMP_NUM_THREADS to a whole number, or unset it"
    elif cores.threads is not None and cores.threads > usable:
        verdict, remedy = "warning", f"set OMP_NUM_THREADS={usable}: more threads than cores wait for each other"
    elif cores.threads is not None and cores.threads > 1 and _crowded(cores, usable) and not _waits_idly(environment):
        verdict = "warning"
        remedy = "threads wait for those whose core is taken: set OMP_NUM_THREADS=1, or OMP_WAIT_POLICY=PASSIVE"
    return Line(name="threads", found="; ".join(parts), verdict=verdict, remedy=remedy)


def _crowded(cores: Cores, usable: int) -> bool:
    busy = cores.busy or 0.0
    return busy > _BUSY and usable - busy < (cores.threads or 1) - _BUSY


def _waits_idly(environment: Mapping[str, str]) -> bool:
    """Return whether GNU OpenMP's threads, which wait for each other in a loop, soon leave their core to others."""
    return "GOMP_SPINCOUNT" in environment or environment.get("OMP_WAIT_POLICY", "").lower() == "passive"


def check_memory(meminfo: str, limit: str, used: str) -> Line:
    """Return the line of memory.

    Args:
        meminfo: text of /proc/meminfo.
        limit: text of the cgroup's memory.max, in bytes; empty where there is none.
        used: text of its memory.current.
    """
    sizes = {name: int(size) << 10 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE)}
    if "MemTotal" not in sizes:
        return Line(name="memory", found="unknown: /proc/meminfo does not tell", verdict="note")
    free = sizes.get("MemAvailable", sizes.get("MemFree", 0))
    found = f"{size_of(free)} free of {size_of(sizes['MemTotal'])}"
    if limit.strip().isdigit() and used.strip().isdigit() and int(limit) < sizes["MemTotal"]:
        free = min(free, int(limit) - int(used))
        found += f"; this container may take {size_of(int(limit))} and has {size_of(int(used))}"
    if free < _LITTLE_MEMORY:
        remedy = "end other processes; `metatt-scale plan RECIPE` estimates what a run needs"
        return Line(name="memory", found=found, verdict="warning", remedy=remedy)
    return Line(name="memory", found=found)


def check_shared_memory(free: int | None, total: int | None, gpus: int) -> Line:
    """Return the line of /dev/shm, through which NCCL and data loaders on one machine talk; sizes in bytes."""
    if free is None or total is None:
        return Line(name="/dev/shm", found="not there", verdict="warning" if gpus > 1 else "note")
    found = f"{size_of(free)} free of {size_of(total)}"
    if free < _LITTLE_SHARED:
        remedy = "start the container with --shm-size=8g (docker) or --ipc=host" if gpus > 1 else ""
        found += "; several GPUs on one machine need more"
        return Line(name="/dev/shm", found=found, verdict="warning" if gpus > 1 else "note", remedy=remedy)
    return Line(name="/dev/shm", found=found)


def check_limits(files: int, locked: int) -> Iterator[Line]:
    """Yield the lines of what this process may take; -1 is no limit.

    Args:
        files: open files.
        locked: bytes of memory that stay in place.
    """
    if 0 <= files < _FEW_FILES:
        remedy = f"ulimit -n {4 * _FEW_FILES}"
        yield Line(name="open files", found=f"at most {files}", verdict="warning", remedy=remedy)
    else:
        yield Line(name="open files", found="no limit" if files < 0 else f"at most {files}")
    if locked < 0:
        yield Line(name="locked memory", found="no limit")
    else:
        # What PyTorch pins is locked by NVIDIA's driver and does not count here.
        found = f"at most {size_of(locked)}; NCCL over InfiniBand and offloading to NVMe want `ulimit -l unlimited`"
        yield Line(name="locked memory", found=found, verdict="note")


def check_folder(folder: Mapping[str, Any]) -> Line:
    """Return the line of a folder that commands write to, as of `answers.read_folders`."""
    name = folder["name"]
    if "free" not in folder:
        where = f"{folder['path']}: " if folder["path"] else ""
        remedy = "change to a folder that exists" if name == "working folder" else _ELSEWHERE[name]
        return Line(name=name, found=f"{where}{folder['refusal']}", verdict="problem", remedy=remedy)
    found = f"{folder['path']}: {size_of(folder['free'])} free of {size_of(folder['total'])}"
    remedy = _ELSEWHERE[name]
    if folder["refusal"]:
        return Line(
            name=name, found=f"{found}; cannot be written: {folder['refusal']}", verdict="problem", remedy=remedy
        )
    if folder["inodes"] == 0:
        return Line(
            name=name, found=f"{found}; no file can be added", verdict="problem", remedy=f"delete files, or {remedy}"
        )
    if folder["free"] < _FULL:
        return Line(name=name, found=found, verdict="problem", remedy=f"make room, or {remedy}")
    if folder["free"] < _LITTLE_DISK.get(name, _LITTLE_DISK_ELSE):
        return Line(name=name, found=found, verdict="warning", remedy=f"make room, or {remedy}")
    return Line(name=name, found=f"{found}, writable")


def check_machine(
    answers: Mapping[str, Answer], busy: float | None, environment: Mapping[str, str]
) -> Iterator[Line]:
    """Yield the lines of cores, memory and limits."""
    build, hardware = answers["torch"].facts or {}, answers["hardware"].facts
    yield check_threads(read_cores(build.get("threads"), busy), environment)
    group = "/sys/fs/cgroup/memory."
    yield check_memory(_read("/proc/meminfo"), _read(f"{group}max"), _read(f"{group}current"))
    free, total = _room("/dev/shm")
    yield check_shared_memory(free, total, len(hardware["gpus"]) if hardware else 0)
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    yield from check_limits(files, locked)


def check_folders(answer: Answer) -> Iterator[Line]:
    """Yield the lines of the folders that commands write to."""
    if answer.error:
        yield no_facts("folders", answer, "see whether a file server that is mounted here answers")
        return
    yield from map(check_folder, answer.facts)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _room(path: str) -> tuple[int | None, int | None]:
    try:
        disk = os.statvfs(path)
    except OSError:
        return None, None
    return disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize

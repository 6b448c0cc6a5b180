"""Jobs of several ranks that train the toy recipe: how to start, watch and compare them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.no_gpu import NO_GPU
from tests.toy import toy, write_toy

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
FAULTS = Path(__file__).parent / "workers" / "faults.py"
"""launch/train.py with a fault; `fault` says which."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STEPS = 12
_LAUNCHER_SIGNS = re.compile(r"(ACCELERATE|FSDP|CROSS|TORCHELASTIC|MASTER)_|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)$")


def write_recipe(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    """Write a recipe of 12 steps with a sweep, that runs into `folder/name`; a folder's runs share data and model."""
    if not (folder / "data.jsonl").exists():
        write_toy(folder, n=80)
    training = {"max_steps": STEPS, "save_every": 4, "eval_every": 6, "micro_batch_size": 4, "resume": "exact"}
    sections["training"] = training | sections.get("training", {})
    # Behind the checkpoint of step 4 and, for most jobs, before the end: ranks change in every job.
    sweep = {"unit": "step", "schedule": [{"after": 5, "rank": 3}], "moments": "transport"}
    sections.setdefault("sweep", sweep)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(toy(folder, output_dir=str(folder / name), **sections)))
    return path


def torchrun(*arguments: str | Path, ranks: int = 2, restarts: int = 0) -> list[str]:
    """Return the command of a job on this host; `arguments` are the script and what follows it."""
    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    return [*TORCHRUN, *options, *map(str, arguments)]


def fault(kind: str, rank: int, notes: Path) -> dict[str, str]:
    """Return the variables that tell workers/faults.py what to do, and where to note it."""
    notes.mkdir(exist_ok=True)
    return {"FAULT": kind, "FAULT_RANK": str(rank), "FAULT_NOTES": str(notes)}


@dataclass
class Job:
    """A launcher and the ranks below it."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        """Return everything printed so far, in the order it was printed in."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 400) -> int:
        """Wait for the launcher and return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {seconds} s:\n{self.output()}") from None

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 400) -> float:
        """Wait until `condition` holds while the job runs; return the time when it did."""
        end = time.time() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output()}"
            assert time.time() < end, f"no {what} after {seconds} s:\n{self.output()}"
            time.sleep(0.01)
        return time.time()


def environment(**more: str) -> dict[str, str]:
    """Return this process' environment for a job: no GPU, one thread per rank, no signs of another launcher."""
    clean = {name: value for name, value in os.environ.items() if not _LAUNCHER_SIGNS.match(name)}
    return {**clean, **NO_GPU, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", **more}


@contextlib.contextmanager
def job(command: list[str], log: Path, **variables: str) -> Iterator[Job]:
    """Start a job; nothing is left of it after the block."""
    env = environment(**variables)
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield Job(process=process, log=log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and of its descendants."""
    descendants: list[psutil.Process] = []
    if process.poll() is None:
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.terminate()  # not killed: it may be a script that has made namespaces and removes them
    for descendant in descendants:
        with contextlib.suppress(psutil.Error):
            descendant.kill()
    process.wait(60)


def finish(command: list[str], log: Path, seconds: float = 400, /, **variables: str) -> str:
    """Run a job to its good end and return its output."""
    with job(command, log, **variables) as running:
        assert running.wait(seconds) == 0, running.output()
        return running.output()


def stop(command: list[str], log: Path, kind: str, rank: int, notes: Path, **variables: str) -> str:
    """Run a job in which one rank is told to end and all do; return its output."""
    with job(command, log, **fault(kind, rank, notes), **variables) as running:
        assert running.wait() != 0
        output = running.output()
    assert [(notes / f"code-{r}").read_text() for r in (0, 1)] == ["143\n", "143\n"], output
    return output


def alive(pid: int) -> bool:
    """Return whether a process runs (one that ended, but was not asked after yet, does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def adapter_of(run: Path) -> bytes:
    """Return the trained cores, as they are on disk."""
    return (run / "adapter" / "metatt.safetensors").read_bytes()


def checkpoints_of(run: Path) -> list[str]:
    """Return the names of all that lies among the checkpoints of a run, half-written ones too."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())

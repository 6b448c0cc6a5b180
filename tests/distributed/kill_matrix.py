"""What becomes of a job of two ranks when one is killed: `python -m tests.distributed.kill_matrix` prints a table.

The job runs under `torchrun --max-restarts 1`. Times are those of the machine it runs on.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tests.distributed.jobs import FAULTS, TRAIN, adapter_of, alive, fault, finish, job, torchrun, write_recipe

MOMENTS = {
    "step": "in the forward of step 6",
    "all-reduce": "in the all-reduce of step 6",
    "broadcast": "in a broadcast of rank 0",
    "sweep": "in the broadcast of a sweep",
    "checkpoint": "while step 8 is being saved",
}


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    gone: float
    """Seconds from the kill until no rank of that attempt ran."""
    back: float
    """Seconds from the kill until the launcher had started all ranks again."""
    resumed: int
    """Step after which the restarted job went on."""
    same_bits: bool
    """Whether the final cores are those of an undisturbed run."""


def straight(folder: Path, backbone: str = "replicate", **sections: dict[str, Any]) -> bytes:
    """Return the cores of a run that nothing disturbs; `sections` of its recipe change no bit."""
    name = f"straight-{backbone}"
    recipe = write_recipe(folder, name, parallel={"backbone": backbone}, **sections)
    finish(torchrun(TRAIN, recipe), folder / f"{name}.log")
    return adapter_of(folder / name)


def gone_after(notes: Path, seconds: float = 60) -> float:
    """Wait until no rank of the first attempt runs; return the seconds since the fault."""
    pids = [int(path.read_text().split()[0]) for path in notes.glob("pid-*")]
    end = time.time() + seconds
    while any(map(alive, pids)):
        assert time.time() < end, f"ranks still run {seconds} s after the fault"
        time.sleep(0.01)
    return time.time() - float((notes / "moment").read_text())


def kill(folder: Path, moment: str, rank: int, expected: bytes, backbone: str = "replicate") -> Outcome:
    """Kill one rank at one moment and watch the job recover."""
    name = f"{backbone}-{moment}-{rank}"
    notes, log = folder / f"{name}-notes", folder / f"{name}.log"
    command = torchrun(FAULTS, write_recipe(folder, name, parallel={"backbone": backbone}), restarts=1)
    with job(command, log, **fault(moment, rank, notes)) as running:
        running.wait_until((notes / "moment").exists, "kill")
        gone = gone_after(notes)
        pids = [notes / f"pid-{r}" for r in (0, 1)]
        back = running.wait_until(lambda: all(len(path.read_text().split()) == 2 for path in pids), "restart")
        assert running.wait() == 0, running.output()
    resumed = re.findall(r"resuming after step (\d+)", log.read_text())
    return Outcome(
        gone=gone,
        back=back - float((notes / "moment").read_text()),
        resumed=int(resumed[-1]) if resumed else 0,
        same_bits=adapter_of(folder / name) == expected,
    )


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"{'SIGKILL':28} backbone   rank   all gone  restarted  resumed after  final cores")
        for backbone in ("replicate", "fsdp2", "zero3"):
            expected = straight(folder, backbone)
            for moment, rank in product(MOMENTS, (0, 1)):
                out = kill(folder, moment, rank, expected, backbone)
                bits = "bit-equal" if out.same_bits else "DIFFERENT"
                times = f"{out.gone:7.2f} s  {out.back:7.2f} s"
                step = f"step {out.resumed}"
                print(f"{MOMENTS[moment]:28} {backbone:9}  {rank:4}  {times}  {step:>13}  {bits}", flush=True)


if __name__ == "__main__":
    main()

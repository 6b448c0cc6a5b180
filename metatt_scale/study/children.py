"""A run as a process of its own: it can be stopped, go on another day, or fail without taking the study down."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import metatt_scale
from metatt_scale.files import write_text
from metatt_scale.gpus import showing
from metatt_scale.study.outcome import is_trained
from metatt_scale.study.runs import OpenStudy, Run, resolve

Command = Sequence[str]
MakeCommands = Callable[[OpenStudy, Run], Sequence[Command]]

_CLI = (sys.executable, "-m", "metatt_scale.cli")
_TAIL_LINES = 8


def commands_of(opened: OpenStudy, run: Run) -> list[Command]:
    """Return what a run is made of: training, unless it is done, then scores where the study reports any."""
    commands: list[Command] = []
    if not is_trained(run):
        own = (f"seed={run.seed}", f"output_dir={json.dumps(str(run.folder))}")
        commands.append((*_CLI, "train", str(run.recipe), *run.overrides, *own))
    if tasks := opened.tasks(run):
        device = resolve(run.recipe, run.overrides).device  # which scoring does not take from the run itself
        where = () if device == "auto" else ("--device", device)
        commands.append((*_CLI, "evaluate", str(run.folder), "--tasks", ",".join(tasks), *where))
    return commands


def environment() -> dict[str, str]:
    """Return ours, such that children import this very package, wherever they are started."""
    package = str(Path(metatt_scale.__file__).resolve().parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def read_machine(device: str = "auto") -> dict[str, object]:
    """Return versions and device, from a process of its own: ours needs no torch and holds no GPU memory.

    `device` is the recipe's.

    Raises:
        ValueError: that process failed, so runs would too.
    """
    command = [sys.executable, "-m", "metatt_scale.study.machine", device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise ValueError(f"torch cannot be imported or used here: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def seconds_spent(run: Run) -> float:
    """Return how long a run has worked so far, today and earlier."""
    with contextlib.suppress(OSError, ValueError):
        return float(_clock(run).read_text(encoding="utf-8"))
    return 0.0


class Child:
    """The processes of one run, one after the other."""

    def __init__(self, run: Run, commands: Sequence[Command], gpu: str | None = None) -> None:
        """Start the first; all write to log.txt in the run directory, and see one GPU where one is given."""
        self.run, self.gpu = run, gpu
        self.log = run.folder / "log.txt"
        run.folder.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self._begins = self.log.stat().st_size
        self._before, self._started = seconds_spent(run), time.monotonic()
        self._left = list(commands)
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._next()

    @property
    def where(self) -> str:
        """The GPU in words, behind something else; empty without one."""
        return "" if self.gpu is None else f" on GPU {self.gpu}"

    @property
    def seconds(self) -> float:
        """How long the run has worked, earlier invocations included."""
        return self._before + time.monotonic() - self._started

    def poll(self) -> int | None:
        """Return None while the run works; then the exit code of its last process (0 where there was none)."""
        code = self._process.poll() if self._process else 0
        if code is None:
            return None
        if code == 0 and self._left and not self._stopped:
            self._next()
            return None
        write_text(_clock(self.run), f"{self.seconds:.1f}\n")
        return code if code or not self._left else -signal.SIGTERM

    def stop(self) -> None:
        """Ask the process to finish its step, save, and end."""
        self._stopped = True
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End the process and all that it has started, at once."""
        self._stopped = True
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait for the process."""
        if self._process:
            self._process.wait()

    def last_words(self) -> str:
        """Return the end of what the run has printed since it was started."""
        with self.log.open("rb") as file:
            file.seek(self._begins)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])

    def _next(self) -> None:
        if not self._left:
            return
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C on our terminal would reach the child beside our own signal, and the second
            # one interrupts it before its checkpoint is written.
            self._process = subprocess.Popen(
                self._left.pop(0),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=showing(environment(), self.gpu),
                start_new_session=True,
            )
        if self._stopped:  # a signal came while it was started
            self._process.terminate()


def _clock(run: Run) -> Path:
    return run.folder / "seconds.txt"

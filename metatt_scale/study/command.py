"""`metatt-scale study`: start the runs that are left, one line each, until all are done or the time is up."""

from __future__ import annotations

import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from metatt_scale.ending import DIVERGED, SIGNALS
from metatt_scale.files import write_text
from metatt_scale.gpus import least_used, visible_gpus
from metatt_scale.paths import check_no_file_in_the_way, path_argument
from metatt_scale.study.agenda import Agenda, agenda_of, unused
from metatt_scale.study.children import Child, MakeCommands, commands_of, read_machine, seconds_spent
from metatt_scale.study.opening import open_study
from metatt_scale.study.outcome import collect, diverged
from metatt_scale.study.results import Results
from metatt_scale.study.runs import OpenStudy, Run

_BUDGET_MINUTES = 75.0
_PAUSE_SECONDS = 0.1
_STOPPED = (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM)
"""Exit codes of a run that was stopped as we asked."""


def add_study(commands: Any) -> None:
    """Add the command to those of the command line."""
    study = commands.add_parser("study", help="arms x seeds over a recipe, into one table; goes on where it stopped")
    study.add_argument("study", type=path_argument, help="YAML file, see studies/")
    study.add_argument(
        "--budget-minutes",
        type=float,
        default=_BUDGET_MINUTES,
        help=f"stop after this time; what runs is saved and goes on next time ({_BUDGET_MINUTES:g})",
    )
    alone = study.add_mutually_exclusive_group()
    alone.add_argument("--dry-run", action="store_true", help="list the runs that are left")
    alone.add_argument("--table-only", action="store_true", help="write the table of what is finished")
    study.set_defaults(run=lambda options: run(options, Console(markup=False, highlight=False, soft_wrap=True)))


def run(
    options: Namespace,
    console: Console,
    make_commands: MakeCommands = commands_of,
    machine: Callable[[str], dict[str, Any]] = read_machine,
) -> int:
    """Run what is left of a study and write its table.

    Args:
        options: study, budget_minutes, dry_run, table_only.
        console: for progress and the table.
        make_commands: what a run is made of, and
        machine: what its line of results says of this machine, given the recipe's `device`; tests put something
            quick in their places.

    Returns:
        0 if nothing failed, also where the time was up; 1 if a run failed; 128 plus the number of the signal that
        stopped the study.

    Raises:
        ValueError: a bad study file, or results that do not fit it.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("a study starts its runs itself and works in one process; start it with python")
    if not options.budget_minutes > 0:
        raise ValueError(f"--budget-minutes is {options.budget_minutes}; it must be greater than 0")
    opened = open_study(options.study)
    _warn(opened, Results(opened.results), console)
    if options.dry_run:
        _list(agenda_of(opened, Results(opened.results)), opened, console)
        return 0
    code = 0
    if not options.table_only:
        with _only_study(opened):
            invocation = _Invocation(opened, console, options.budget_minutes * 60, make_commands)
            code = invocation.work(machine)
    _write_table(opened, console)
    return code


class _Invocation:
    """One invocation: what works now, what was begun, and how much time is left."""

    def __init__(self, opened: OpenStudy, console: Console, budget: float, make_commands: MakeCommands) -> None:
        self._opened, self._results, self._console = opened, Results(opened.results), console
        self._make_commands = make_commands
        self._budget, self._started = budget, time.monotonic()
        self._agenda = agenda_of(opened, self._results)
        self._gpus: tuple[str, ...] = ()
        self._children: list[Child] = []
        self._begun: list[Run] = []
        self._failed = 0
        self._signal: int | None = None
        self._closed = False  # nothing is started any more
        self._stopping = False  # and what works is to save its state and end

    def work(self, machine: Callable[[str], dict[str, Any]]) -> int:
        """Run until nothing is left, the time is up, or a signal comes; return the exit code."""
        if not self._agenda.left:
            return 1 if self._agenda.undecided else 0
        self._machine = machine(self._opened.device)
        self._tell_where()
        with self._signals():
            try:
                while self._start_what_fits() or self._children:
                    time.sleep(_PAUSE_SECONDS)
                    if self._elapsed() > self._budget and self._children and not self._stopping:
                        self._stop("the time is up")
                    self._reap()
            finally:
                for child in self._children:  # left only by an error of our own
                    child.stop()
                for child in self._children:
                    child.wait()
        self._take_leave()
        if self._signal and self._signal != signal.SIGUSR1:  # which means a time limit, no failure
            return 128 + self._signal
        return 1 if self._failed or self._agenda.undecided else 0

    def _tell_where(self) -> None:
        """Find the GPUs, and say what runs where."""
        jobs = self._opened.study.jobs
        if self._opened.device != "cpu":
            self._gpus = visible_gpus(os.environ)
        gpus = f", on GPU{'s' * (len(self._gpus) > 1)} {', '.join(self._gpus)}" if self._gpus else ""
        self._console.print(
            f"{self._outlook()}; {jobs} at a time{gpus}, each with a log.txt below {self._opened.runs}"
        )
        if 0 < (n := len(self._gpus)) < jobs:
            self._console.print(
                f"`jobs` is {jobs}, but GPUs are {n}: some runs share a GPU and its memory; set `jobs: {n}` if these "
                "do not fit",
                style="yellow",
            )

    # ---- runs

    def _start_what_fits(self) -> bool:
        """Start as many runs as may work now; return whether any was started."""
        started = False
        while not self._closed and len(self._children) < self._opened.study.jobs:
            run = next((run for run in self._agenda.left if run not in self._begun), None)
            if run is None:
                break
            if not self._fits(run):
                self._closed = True
                break
            self._begun.append(run)
            gpu = least_used(self._gpus, [child.gpu for child in self._children])
            self._children.append(Child(run, self._make_commands(self._opened, run), gpu))
            if self._stopping:  # a signal came while it was started
                self._children[-1].stop()
            started = True
        return started

    def _fits(self, run: Run) -> bool:
        """Return whether a run as long as the longest so far would end in time; the first one is always begun.

        It would never be otherwise where one run takes longer than the budget: it is cut, and goes on next time.
        """
        longest = max(self._results.seconds, default=0.0)
        return not self._begun or self._elapsed() + max(0.0, longest - seconds_spent(run)) <= self._budget

    def _reap(self) -> None:
        """Record the runs that have ended."""
        for child in list(self._children):
            code = child.poll()
            if code is None:
                continue
            self._children.remove(child)
            if code == 0:
                self._record(child)
            elif code == DIVERGED:
                print(
                    f"{child.run.label}{child.where} diverged, which counts as worst:\n{child.last_words()}",
                    file=sys.stderr,
                )
                self._append(child, diverged(self._opened, child.run, child.seconds, self._machine))
            elif not (self._stopping and code in _STOPPED):
                self._fail(child, f"ended with code {code}")

    def _record(self, child: Child) -> None:
        run = child.run
        try:
            line = collect(self._opened, run, child.seconds, self._machine)
        except (ValueError, OSError, KeyError) as error:
            self._fail(child, f"has no result: {error}")
            return
        self._append(child, line)

    def _append(self, child: Child, line: dict[str, Any]) -> None:
        run = child.run
        self._results.append(line)
        self._agenda = agenda_of(self._opened, self._results)
        for arm, choice in self._agenda.chosen.items():
            if self._results.choice(arm) != choice:
                self._results.append(choice)
                self._console.print(f"{arm} takes {choice['chosen']}, by {choice['by']}: {_means(choice['means'])}")
        numbers = ", ".join(_number(name, line["scores"][name]) for name in self._opened.numbers(run))
        self._console.print(f"{run.label}: {numbers}; {_duration(line['seconds'])}{child.where}; {self._outlook()}")

    def _fail(self, child: Child, why: str) -> None:
        self._failed += 1
        print(
            f"error: {child.run.label}{child.where} {why}; the end of {child.log}:\n{child.last_words()}",
            file=sys.stderr,
        )

    # ---- time and signals

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _stop(self, why: str) -> None:
        self._closed = self._stopping = True
        # Not through the console: this may interrupt a half-finished print, and Python refuses to nest them.
        os.write(2, f"{why}: stopping {len(self._children)} run(s), which save their state\n".encode())
        for child in self._children:
            child.stop()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let a signal stop the runs in good order; a second one kills them (their last checkpoints remain)."""

        def handler(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                for child in self._children:
                    child.kill()
            else:
                self._signal = number
                self._stop(signal.Signals(number).name)

        before = {number: signal.signal(number, handler) for number in SIGNALS}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def _outlook(self) -> str:
        n, seconds = len(self._agenda.left) + self._agenda.later, self._results.seconds
        if not n:
            return "none left"
        if not seconds:
            return f"{n} left"
        return f"{n} left, about {_duration(sum(seconds) / len(seconds) * n / self._opened.study.jobs)}"

    def _take_leave(self) -> None:
        for why in self._agenda.undecided.values():
            self._console.print(why, style="yellow")
        if n := len(self._agenda.left) + self._agenda.later:
            self._console.print(f"{_runs(n)} left; the same command goes on with them", style="yellow")


@contextmanager
def _only_study(opened: OpenStudy) -> Iterator[None]:
    """Hold the results and the folder of the runs, so that neither is ever worked on twice at once.

    One of them is not enough: from two working folders a study has two folders of runs and one file of results, and
    two studies of one name may share a folder of runs.
    """
    with ExitStack() as held:
        _hold(opened.results, opened.results.with_name(f".{opened.results.stem}.lock"), held)
        _hold(opened.runs, opened.runs / ".lock", held)
        yield


def _hold(what: Path, lock: Path, held: ExitStack) -> None:
    check_no_file_in_the_way(lock.parent, str(what))
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(FileLock(lock, timeout=0))
    except Timeout:
        raise ValueError(
            f"{what}: this study is running already, perhaps from another working folder (`fuser {lock}` "
            "prints the PID of the process that holds it); wait for it, or stop it"
        ) from None


def _warn(opened: OpenStudy, results: Results, console: Console) -> None:
    if results.cut_short is not None:
        console.print(
            f"{results.path}: dropped a last line that was cut short; that run is done again", style="yellow"
        )
    if n := unused(opened, results):
        console.print(
            f"{results.path}: {n} results of arms, seeds or values that the study no longer has", style="yellow"
        )


def _list(agenda: Agenda, opened: OpenStudy, console: Console) -> None:
    for run in agenda.left:
        console.print(f"{run.label}: {' '.join(run.overrides)}")
    later = f", and {agenda.later} that wait for a choice" if agenda.later else ""
    console.print(f"{_runs(len(agenda.left))} left{later}; {opened.study.jobs} at a time")


def _write_table(opened: OpenStudy, console: Console) -> None:
    from metatt_scale.study import columns, table

    agenda = agenda_of(opened, Results(opened.results))
    if not any(agenda.finished.values()):
        console.print("no table yet: no reported run is finished")
        return
    form = columns if opened.study.recipes else table
    text = form.as_markdown(opened, agenda)
    write_text(opened.results.with_suffix(".md"), text)
    write_text(opened.results.with_suffix(".csv"), form.as_csv(opened, agenda))
    console.print(text, end="")


def _number(name: str, score: dict[str, Any]) -> str:
    last, best = ("not finite" if score[key] is None else f"{score[key]:.4f}" for key in ("last", "best"))
    return f"{name} {last}" + (f" (best {best})" if score["per_epoch"] else "")


def _runs(n: int) -> str:
    return f"{n} run{' is' if n == 1 else 's are'}"


def _means(means: dict[str, float | None]) -> str:
    return ", ".join(f"{tried} {'not finite' if mean is None else f'{mean:.4f}'}" for tried, mean in means.items())


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

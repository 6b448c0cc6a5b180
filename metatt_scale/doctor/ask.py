"""Ask `metatt_scale.doctor.answers` in a process of its own, so that a crash or a hang there is an answer too."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from threading import Thread
from typing import IO, Any

from metatt_scale.doctor.line import Line, one_line
from metatt_scale.study.children import environment

PATIENCE = 120.0
"""Seconds for one answer. Importing PyTorch from a file server for the first time can take more than a minute."""
_LAST_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a question has brought: facts, or why there are none."""

    facts: Any = None
    error: str = ""
    tried: bool = True
    """False where nothing was asked, because an earlier question has failed."""


def ask(questions: Sequence[str], seconds: float = PATIENCE) -> dict[str, Answer]:
    """Return the answer to each question; those behind `torch` are not asked where it cannot be imported.

    Args:
        questions: names out of `answers.ANSWERS`, in the order in which they are asked.
        seconds: after which one of them counts as hanging.
    """
    answers: dict[str, Answer] = {}
    waiting = list(questions)
    while waiting:
        # A process that has crashed or hangs is replaced: its successor gets what is left.
        with closing(_ask_one_process(tuple(waiting), seconds)) as told:
            for name, answer in told:
                answers[name] = answer
                waiting.remove(name)
                if name == "torch" and answer.error:
                    return {**answers, **dict.fromkeys(waiting, _WITHOUT_TORCH)}
    return answers


_WITHOUT_TORCH = Answer(error="not tried, because torch cannot be imported", tried=False)


def no_facts(name: str, answer: Answer, remedy: str = "") -> Line:
    """Return the line of a question that has brought no facts.

    Only the line of the question that failed is a problem; one that was therefore not asked is a note.
    """
    if not answer.tried:
        return Line(name=name, found=answer.error, verdict="note")
    return Line(name=name, found=answer.error, verdict="problem", remedy=remedy)


def _ask_one_process(questions: Sequence[str], seconds: float) -> Generator[tuple[str, Answer], None, None]:
    """Yield an answer to each question up to the one at which the process ends; at least to the first."""
    command = [sys.executable, "-m", "metatt_scale.doctor.answers", *questions]
    # Libraries must not look for anything on the hub meanwhile.
    surroundings = {**environment(), "HF_HUB_OFFLINE": "1"}
    try:
        child = subprocess.Popen(
            command,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, ValueError) as error:
        yield from ((name, Answer(error=f"no process could be started: {one_line(error)}")) for name in questions)
        return
    told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    said: deque[str | None] = deque(maxlen=_LAST_LINES)
    readers = [
        Thread(target=_read, args=(child.stdout, told.put), daemon=True),
        Thread(target=_read, args=(child.stderr, said.append), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        for name in questions:
            try:
                text = told.get(timeout=seconds)
            except queue.Empty:
                yield name, Answer(error=f"no answer within {seconds:.0f} seconds")
                return
            if text is None:
                readers[1].join(timeout=1)
                _wait(child)
                yield name, Answer(error=_how_it_ended(child.returncode, said))
                return
            yield name, Answer(**json.loads(text))
    finally:
        child.kill()
        _wait(child)
        for reader in readers:
            reader.join(timeout=1)


def _wait(child: subprocess.Popen[str]) -> None:
    with suppress(subprocess.TimeoutExpired):  # a killed process that waits for a dead file server ends later
        child.wait(timeout=5)


def _read(stream: IO[str], put: Callable[[str | None], None]) -> None:
    with stream:
        for line in stream:
            put(line)
    put(None)


def _how_it_ended(code: int | None, said: Sequence[str | None]) -> str:
    how = "no exit code" if code is None else f"exit code {code}"
    if code is not None and code < 0:
        with suppress(ValueError):
            how = signal.Signals(-code).name
    last = next((line.strip() for line in reversed(said) if line and line.strip()), "")
    return f"the process that tried it ended with {how}" + (f" ({last})" if last else "")

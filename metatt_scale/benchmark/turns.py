"""Training loops that take turns: each in a process of its own, only one of them ever running.

Libraries own their loops and offer callbacks, not steps; a callback that waits lets another loop go on meanwhile. In
threads of one process the loops would share allocator and thread pools: measured on a CPU, ours lost a third of its
speed there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from metatt_scale.gpus import VARIABLE, showing, visible_gpus

Pause = Callable[[], bool]
"""Lets other loops run; true where this one is to end."""


class LoopInTurns:
    """A loop in a process that stands still until it is told to go on."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Start a process that sees one GPU at most, the first that this one sees, and wait until it is ready.

        Args:
            work: a function of a module, called with `ready`, `pause` and the arguments. It calls `ready(facts)`
                once, then `pause()` wherever it may wait, ends when that returns true, and returns its results.
            arguments: for it; they are pickled.
        """
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks of thread pools
        self._pipe, end = context.Pipe()
        # A daemon: an error in another loop, or Ctrl-C, must not leave a process that waits for this one.
        self._process = context.Process(target=_run, args=(end, work, arguments), daemon=True)
        with _one_gpu():
            self._process.start()
        end.close()
        self.facts = self._receive()

    def advance(self) -> None:
        """Let the loop run to its next pause.

        Raises:
            ValueError: what it raised, or that its process has died.
        """
        self._pipe.send(False)
        self._receive()

    def close(self) -> Any:
        """Let the loop end, and return its results."""
        self._pipe.send(True)
        results = self._receive()
        self._process.join()
        return results

    def _receive(self) -> Any:
        try:
            error, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ValueError(
                f"the process of a benchmarked loop ended with code {self._process.exitcode} (killed for memory?); "
                "give fewer examples or a smaller backbone"
            ) from None
        if error is not None:
            raise ValueError(error)
        return value


@contextlib.contextmanager
def _one_gpu() -> Iterator[None]:
    """Let processes that are started in a `with` block see one GPU: some loops would take all."""
    before = os.environ.get(VARIABLE)
    os.environ |= showing({}, next(iter(visible_gpus(os.environ)), None))
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def _run(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    def ready(facts: Any) -> None:
        pipe.send((None, facts))
        pipe.recv()

    def pause() -> bool:
        pipe.send((None, None))
        return pipe.recv()

    try:
        results = work(ready, pause, *arguments)
    except ValueError as error:
        pipe.send((str(error), None))
    else:
        pipe.send((None, results))

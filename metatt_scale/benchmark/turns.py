"""Training loops that take turns: each in a thread of its own, only one of them ever running.

Libraries own their loops and offer callbacks, not steps; a callback that waits lets another loop go on meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class LoopInTurns:
    """A loop that stands still until it is told to go on."""

    def __init__(self, loop: Callable[[Callable[[], bool]], None], device: torch.device) -> None:
        """Take a loop, which is to call its argument wherever it may pause, and to end when that returns true."""
        self._loop, self._device = loop, device
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = self._told_to_end = False
        # A daemon: an error in another loop, or Ctrl-C, must not leave a process that waits for this one.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Let the loop run to its next pause (or its end), and raise what it raised."""
        assert not self._ended, "the loop has ended"
        self._go.release()
        self._stands.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let the loop run to its end."""
        self._told_to_end = True
        while not self._ended:
            self.advance()
        self._thread.join()

    def _pause(self) -> bool:
        self._stands.release()
        self._go.acquire()
        return self._told_to_end

    def _run(self) -> None:
        self._go.acquire()
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self._loop(self._pause)
        except BaseException as error:
            self._error = error
        self._ended = True
        self._stands.release()

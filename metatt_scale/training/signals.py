"""Signals that end a run after a whole step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that end a run after a whole, saved step; the first that any rank received counts."""


class SignalCatcher:
    """Remembers the first of SIGNALS while it is in force; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def catch(self) -> Callable[[], None]:
        """Take over the handlers; return what gives them back."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}

        def restore() -> None:
            for number, old in before.items():
                signal.signal(number, old)

        return restore

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        # Not through the console: a handler may interrupt a half-finished print, and Python refuses to nest them.
        os.write(2, f"{signal.Signals(number).name}: finishing this step, then saving\n".encode())

"""Signals that end a run after a whole step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from metatt_scale.ending import SIGNALS


class TrainingStopped(Exception):
    """A signal stopped the run after a whole step; its checkpoint is written."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {step}; the checkpoint is written"
        )
        # SIGUSR1 asks for no more than that (a time limit is near): a launcher must not take it for a failure.
        self.exit_code = 0 if signal_number == signal.SIGUSR1 else 128 + signal_number


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

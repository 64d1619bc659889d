"""Signals and process ties: a run asked to stop saves first, and never outlives what started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType

from finetune.errors import Preempted

_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}  # 75 is EX_TEMPFAIL: requeue me


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and SIGINT only set `received`; a second SIGINT interrupts at once."""

    received: int = 0

    def __enter__(self) -> StopSignals:
        # Python allows handlers in the main thread only; elsewhere (some notebooks) signals keep their meaning.
        main = threading.current_thread() is threading.main_thread()
        self._previous = {number: signal.signal(number, self._handle) for number in _EXIT_CODES} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def preempted(number: int, step: int, *, how: str) -> Preempted:
    """The exception that ends a run stopped by signal `number` after its checkpoint at `step` was saved.

    how: the command that goes on, in words.
    """
    return Preempted(
        f"{signal.Signals(number).name}: saved at step {step}; {how} resumes here.",
        exit_code=_EXIT_CODES[signal.Signals(number)],
    )


def die_with_parent() -> None:
    """Receive SIGTERM when the launcher dies: `accelerate launch` does not pass its own SIGTERM on (Linux only)."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)

"""What SIGTERM, SIGUSR1 and SIGINT do, from the first moment of a command to its last; and ties to the launcher.

Three ways, by what is under way: leave at once where nothing can be lost (start-up, data check, evaluation, export,
which are whole or absent on the disk); take note where a step or a checkpoint must be finished first; interrupt work
that holds nothing durable but takes long (drawing, a conversation with the Hub).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from finetune.errors import Preempted

_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}  # 75 is EX_TEMPFAIL: requeue me
_LEAVE, _NOTE, _INTERRUPT = "leave", "note", "interrupt"
STUCK_SECONDS = 0.3
"""How long the main thread may take to heed a signal before it counts as waiting outside of Python."""
ABORT_SECONDS = 2.0
"""How long a second SIGINT waits for Python to unwind, which code that runs outside of Python can delay for ever."""


class Interrupted(BaseException):
    """A signal came inside `SIGNALS.interrupting()`; no Exception, so that nothing on the way takes it for its own."""


class Signals:
    """The stop signals of this process; there is one, `SIGNALS`. Outside of its contexts signals keep their meaning.

    Python allows handlers in the main thread only: entered elsewhere (some notebooks), the contexts change nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        """The first signal that came in the outermost context, or 0."""
        self._way: str | None = None
        self._handled: dict[int, float] = {}

    def leaving(self, *, last: bool = False) -> contextlib.AbstractContextManager[Signals]:
        """Inside, a signal ends the process at once with its exit code, also while it waits outside of Python.

        last: nothing comes after it but the interpreter's end, which signals (but SIGKILL, SIGQUIT) do not change.
        """
        return self._in_way(_LEAVE, last=last)

    def noting(self) -> contextlib.AbstractContextManager[Signals]:
        """Inside, a signal only sets `received`; a second SIGINT raises KeyboardInterrupt."""
        return self._in_way(_NOTE)

    def interrupting(self) -> contextlib.AbstractContextManager[Signals]:
        """Inside, a signal raises Interrupted, as does one that came before; what is left behind must not matter."""
        return self._in_way(_INTERRUPT)

    @contextlib.contextmanager
    def _in_way(self, way: str, *, last: bool = False) -> Iterator[Signals]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        with self._handlers(last) if self._way is None else contextlib.nullcontext():
            before, self._way = self._way, way
            try:
                if way == _INTERRUPT and self.received:
                    raise Interrupted
                yield self
            finally:
                self._way = before
            if before == _LEAVE and self.received:  # noted when nobody looked any more
                _leave(self.received)

    @contextlib.contextmanager
    def _handlers(self, last: bool) -> Iterator[None]:
        self.received = 0
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        previous_pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        previous = {number: signal.signal(number, self._handle) for number in _EXIT_CODES}
        try:
            yield
        finally:
            self._way = None
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_IGN if last else handler)
            signal.set_wakeup_fd(previous_pipe)
            os.close(writer)  # which ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled[number] = time.monotonic()
        if self._way == _LEAVE:
            _leave(number)
        again = number == signal.SIGINT and self.received == signal.SIGINT
        self.received = self.received or number
        if again:
            raise KeyboardInterrupt
        if self._way == _INTERRUPT:
            self._way = _NOTE  # once: the next must not hit the cleaning up
            raise Interrupted

    def _watch(self, reader: int) -> None:
        """In a thread: do what `_handle` cannot while the main thread is in a call outside of Python that lasts (a
        rendezvous, a collective, a file system that hangs); the numbers of signals come through a pipe even then."""
        interrupts = 0
        while number := os.read(reader, 1):
            if number[0] not in _EXIT_CODES:
                continue
            time.sleep(STUCK_SECONDS)
            if self._way == _LEAVE and time.monotonic() - self._handled.get(number[0], 0.0) > 2 * STUCK_SECONDS:
                _leave(number[0])
            interrupts += number[0] == signal.SIGINT
            if interrupts > 1:
                time.sleep(ABORT_SECONDS)
                if self._way is not None:
                    os._exit(_EXIT_CODES[signal.SIGINT])
        os.close(reader)


SIGNALS = Signals()


def _leave(number: int) -> None:
    words = f"{signal.Signals(number).name}: stopped; nothing was lost, the same command goes on or starts again.\n"
    os.write(2, words.encode())  # not print: the main thread may hold the lock of the stream
    for children in Path("/proc/self/task").glob("*/children"):  # empty where there is no /proc: they end by themselves
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)
    os._exit(_EXIT_CODES[signal.Signals(number)])


def preempted(number: int, step: int, *, how: str) -> Preempted:
    """The exception that ends a run stopped by signal `number` after its checkpoint at `step` was saved.

    how: the command that goes on, in words.
    """
    return stopped(number, f"saved at step {step}; {how} resumes here.")


def stopped(number: int, words: str) -> Preempted:
    """The exception that ends a command stopped by signal `number`, with its exit code."""
    return Preempted(f"{signal.Signals(number).name}: {words}", exit_code=_EXIT_CODES[signal.Signals(number)])


def die_with_parent() -> None:
    """Receive SIGTERM when the launcher dies: `accelerate launch` does not pass its own SIGTERM on (Linux only)."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)

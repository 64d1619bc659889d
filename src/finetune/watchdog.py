"""What notices that something hangs: a step, a process that loads samples."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from finetune.errors import ProcessError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

STEPS = 10
"""A step may take this many times the median step."""
LOADER_POLL = 2.0
"""Seconds between two looks at whether the loader processes are alive (the `timeout` of the DataLoader)."""
_deadlines: list[float] = []  # of the `bounded` that the process is in; faulthandler has one timer per process


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """What must be left within `seconds`, or faulthandler's own thread shows the stacks and ends this process.

    For calls that may never return to Python. May be nested, in one thread: the outer deadline stays in force.
    """
    _deadlines.append(min([time.monotonic() + seconds, *_deadlines]))
    _set_timer()
    try:
        yield
    finally:
        _deadlines.pop()
        _set_timer()


def _set_timer() -> None:
    if _deadlines:
        faulthandler.dump_traceback_later(max(_deadlines[-1] - time.monotonic(), 1e-3), exit=True, file=2)
    else:
        faulthandler.cancel_dump_traceback_later()


class Watchdog:
    """Ends this process when a step of it hangs, after showing on stderr where each of its threads stands.

    With limit = max(STEPS x the median step, timeout): the stacks are shown after limit / 2, while all processes still
    live. At limit, waiting for another process or a loader fails with an error that lets the run save. What fails in
    neither way is ended at 1.2 x limit; a process that holds Python's lock, by faulthandler's own thread, at 2 x limit.
    """

    def __init__(self, timeout: float, describe: Callable[[], str]) -> None:
        """timeout: seconds. describe: who this process is and what it works on, for the message."""
        self._timeout, self._describe = timeout, describe
        self._since: float | None = None
        self._times: deque[float] = deque(maxlen=50)
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One step; what is outside of steps, such as drawing and saving, may take as long as it needs."""
        with bounded(2 * self.limit):
            self._since = time.monotonic()
            try:
                yield
                self._times.append(time.monotonic() - self._since)
            finally:
                self._since = None

    @property
    def limit(self) -> float:
        """Seconds that a step may take at present."""
        return max(STEPS * statistics.median(self._times), self._timeout) if self._times else self._timeout

    def _watch(self) -> None:
        shown = None  # the step whose stacks were shown
        while not self._ended.wait(min(1.0, self._timeout / 20)):
            since, limit = self._since, self.limit
            if since is None:
                continue
            waited = time.monotonic() - since
            if waited > limit / 2 and shown != since:
                shown = since
                _say(f"no progress for {waited:.0f} s: {self._describe()}; it ends after {1.2 * limit:.0f} s")
                faulthandler.dump_traceback(file=2, all_threads=True)
            if waited > 1.2 * limit:
                _say(f"ended after {waited:.0f} s without progress (train.timeout_minutes): {self._describe()}")
                os._exit(ProcessError.exit_code)


def patiently(loader: DataLoader, seconds: float) -> Iterator[Any]:
    """The batches of a loader whose timeout is LOADER_POLL, each waited for up to `seconds`; ends with its processes.

    Its own long timeout would be waited out for a process that is dead already. Raises ProcessError that says which.
    """
    batches = iter(loader)
    try:
        while True:
            yield _next(batches, seconds, loader.num_workers)
    finally:
        # Loader processes that are left to the interpreter's end keep it waiting after an error in one of them.
        getattr(batches, "_shutdown_workers", lambda: None)()


def _next(batches: Iterator[Any], seconds: float, workers: int) -> Any:
    start = time.monotonic()
    while True:
        try:
            return next(batches)
        except (RuntimeError, ConnectionError, EOFError) as error:
            words = str(error)
            broken = isinstance(error, ConnectionError | EOFError)  # its batch was being fetched
            if workers and "in DataLoader worker process" not in words and (broken or "exited unexpectedly" in words):
                raise ProcessError(
                    "a process that loads samples was killed, most likely because the machine ran out of memory: lower "
                    f"data.dataloader_num_workers ({workers}), or give the run more memory ({words})"
                ) from None
            if not words.startswith("DataLoader timed out"):
                raise
            if time.monotonic() - start > seconds:
                raise ProcessError(
                    f"the loader processes have made no batch for {seconds:.0f} s (train.timeout_minutes): look at the "
                    "storage of the data, or raise it"
                ) from None


def _say(words: str) -> None:
    os.write(2, f"{words}\n".encode())  # not print: a thread that hangs may hold the lock of the stream

"""Training processes that take turns on one machine, so that its drift is the same for all of them.

Each contender is started once and trains until it is warm; then one of them runs at a time, the others are stopped
(SIGSTOP). Time is that of the contender's own turns alone, by the clock of the events that its tracker writes to
TensorBoard, one per optimizer step: all trainers can do that, so that all are read alike. A step that is cut by the end
of a turn goes on in the next, and counts where it is done. Linux.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

PATIENCE = 600  # seconds that a contender may take to become warm


class Contender:
    """One training process, which logs a scalar per step and would go on for ever."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, *, images: int, env: Mapping[str, str]) -> None:
        """folder: where its events lie, at any depth, and its output. images: per step. env: beside this process's."""
        self.name, self.images, self._folder = name, images, folder
        folder.mkdir(parents=True)
        self._log = folder / "output.txt"
        self._walls, self._runs = [time.time()], [0.0]  # the ends of its turns, and how long it had run by then
        self._cpu: list[float] = []
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | dict(env),
            )  # fmt: skip

    def steps(self) -> list[float]:
        """When each step that it has done was logged, in seconds since the epoch. Raises RuntimeError if it ended."""
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.name} ended ({self._process.returncode}):\n{self._log.read_text()[-3000:]}")
        events = (event for path in self._folder.rglob("*tfevents*") for event in EventFileLoader(str(path)).Load())
        seen: dict[int, float] = {}
        for event in events:  # several scalars of a step: the first counts
            if any("loss" in value.tag for value in event.summary.value):
                seen.setdefault(event.step, event.wall_time)
        return [seen[step] for step in sorted(seen)]

    def wait_for(self, steps: int) -> None:
        """Until so many steps are done."""
        end = time.monotonic() + PATIENCE
        while len(self.steps()) < steps:
            if time.monotonic() > end:
                raise RuntimeError(f"{self.name}: no {steps} steps in {PATIENCE} s:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End its turn."""
        self._signal(signal.SIGSTOP)
        self._walls.append(time.time())
        self._runs.append(self._runs[-1] + self._walls[-1] - self._walls[-2])
        self._cpu.append(sum(self._of_all(lambda p: sum(p.cpu_times()[:2]))))

    def go_on(self) -> None:
        """Begin its turn."""
        self._walls.append(time.time())
        self._runs.append(self._runs[-1])
        self._signal(signal.SIGCONT)

    def finish_step(self) -> None:
        """A turn to the end of the step that the last one cut."""
        self.go_on()
        self.wait_for(len(self.steps()) + 1)
        self.stop()

    def speeds(self, rounds: int) -> list[tuple[float, float]]:
        """Of each of the `rounds` turns after the warm-up: images per second, and per second of processor time."""
        done = np.interp(self.steps(), self._walls, self._runs)
        ends = np.interp(self._runs[1::2], done, np.arange(len(done))) * self.images  # the images done by each stop
        images = np.diff(ends)[:rounds]
        seconds, cpu = np.diff(self._runs[1::2])[:rounds], np.diff(self._cpu)[:rounds]
        return list(zip((images / seconds).tolist(), (images / cpu).tolist(), strict=True))

    def peak_memory(self) -> float:
        """Largest resident set so far, in MB: of the process, or of the largest of those that it started.

        By VmHWM: the ru_maxrss of wait4 begins with that of the process which it was started by.
        """

        def peak(process: psutil.Process) -> float:
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6

        return max(self._of_all(peak))

    def end(self) -> None:
        """Kill it, and what it started."""
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        list(self._of_all(lambda process: process.send_signal(number)))

    def _of_all(self, action: Callable[[psutil.Process], float | None]) -> list:
        process = psutil.Process(self._process.pid)
        results = []
        for one in [process, *process.children(recursive=True)]:
            if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                results.append(action(one))
        return results


@contextmanager
def started(starts: Mapping[str, Callable[[str], Contender]], *, warm: int) -> Iterator[dict[str, Contender]]:
    """Inside, the contenders by name, started by `starts`, warm after so many steps each, and stopped; then killed."""
    contenders: dict[str, Contender] = {}
    try:
        for name, start in starts.items():
            contenders[name] = start(name)
        for contender in contenders.values():
            contender.wait_for(warm)
            contender.stop()
        yield contenders
    finally:
        for contender in contenders.values():
            contender.end()


def take_turns(contenders: Mapping[str, Contender], *, rounds: int, seconds: float) -> dict[str, list]:
    """Let each run for `seconds` in each of `rounds` rounds; returns `Contender.speeds` by name."""
    for number in range(rounds):
        order = list(contenders.values())
        for contender in order if number % 2 == 0 else reversed(order):
            contender.go_on()
            time.sleep(seconds)
            contender.stop()
    for contender in contenders.values():
        contender.finish_step()
    return {name: contender.speeds(rounds) for name, contender in contenders.items()}

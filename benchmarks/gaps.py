"""What a trace of torch.profiler says of a GPU: how much of the time it works, and what it waits for."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
ON_HOST = {"cpu_op", "cuda_runtime", "cuda_driver"}


@dataclass(frozen=True)
class Event:
    """Something that took a time, in microseconds."""

    name: str
    start: float
    end: float
    thread: Any
    correlation: int | None
    """The same of a kernel and of the call that launched it."""


@dataclass(frozen=True)
class Gap:
    """A time in which nothing ran on the GPU."""

    microseconds: float
    doing: str
    """What the host did for most of it: the innermost operation or call of CUDA; or Python."""
    before: str
    """The operation that launched what ran before it."""
    after: str
    """The operation that launched what ended it."""


class Trace:
    """The events of the GPU, in order, and of the host."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        """events: the traceEvents of a Chrome trace."""
        kept = [event for event in events if event.get("ph") == "X"]
        self.device = sorted(_events(kept, ON_DEVICE), key=lambda event: event.start)
        self.host = _events(kept, ON_HOST)
        self._launches = {e.correlation: e for e in _events(kept, ON_HOST - {"cpu_op"}) if e.correlation is not None}
        self._operations = _events(kept, {"cpu_op"})

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Of a file as torch.profiler exports it, .json or .json.gz."""
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            return cls(json.load(file)["traceEvents"])

    @property
    def span(self) -> float:
        """Microseconds from the first event on the GPU to the end of the last."""
        return max(event.end for event in self.device) - self.device[0].start

    @property
    def busy(self) -> float:
        """Share of the span in which something ran on the GPU, on any stream."""
        return 1 - sum(end - start for start, end, *_ in self._idle()) / self.span

    def gaps(self, most: int) -> list[Gap]:
        """The longest times in which nothing ran, longest first."""
        longest = sorted(self._idle(), key=lambda idle: idle[0] - idle[1])[:most]
        return [
            Gap(end - start, self._doing(start, end), self._launcher(before), self._launcher(after))
            for start, end, before, after in longest
        ]

    def kernels(self, most: int) -> list[tuple[str, int, float]]:
        """What ran longest on the GPU in all: name, how often, and share of the span."""
        times, counts = Counter(), Counter(event.name for event in self.device)
        for event in self.device:
            times[event.name] += event.end - event.start
        return [(name, counts[name], time / self.span) for name, time in times.most_common(most)]

    def _idle(self) -> list[tuple[float, float, Event, Event]]:
        """Start and end of each time in which nothing ran, and what ran before and after."""
        found, last = [], self.device[0]
        for event in self.device[1:]:
            if event.start > last.end:
                found.append((last.end, event.start, last, event))
            last = max(last, event, key=lambda one: one.end)
        return found

    def _doing(self, start: float, end: float) -> str:
        """The shortest of what took half of the gap, or more of it: the innermost."""
        half = (end - start) / 2
        filling = [e for e in self.host if min(e.end, end) - max(e.start, start) >= half]
        return min(filling, key=lambda e: e.end - e.start).name if filling else "Python"

    def _launcher(self, event: Event) -> str:
        launch = self._launches.get(event.correlation)
        if launch is None:
            return event.name
        around = [
            op for op in self._operations
            if op.thread == launch.thread and op.start <= launch.start and launch.end <= op.end
        ]  # fmt: skip
        return max(around, key=lambda op: op.start).name if around else launch.name


def _events(events: list[dict[str, Any]], kinds: set[str]) -> list[Event]:
    return [
        Event(
            name=event["name"],
            start=event["ts"],
            end=event["ts"] + event["dur"],
            thread=(event.get("pid"), event.get("tid")),
            correlation=event.get("args", {}).get("correlation"),
        )
        for event in events
        if event.get("cat") in kinds
    ]

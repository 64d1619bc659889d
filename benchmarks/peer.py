"""Another's training script in a process of its own, whose steps are asked for, a block at a time, and timed.

    python benchmarks/peer.py READ WRITE SCRIPT [ARGUMENT ...]

is that process: it runs a script that trains with Accelerate, as it is, and stops before its optimizer steps until
READ, the number of an open pipe, says how many of them to make; then it says on WRITE how long they took. So two
trainers can take turns on one device. `Peer` is the other end.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class PeerFailed(Exception):
    """The script ended by itself; says how."""


class Peer:
    """A script that waits for its steps to be asked for."""

    def __init__(self, script: Path, arguments: Sequence[str], log: Path, *, patience: float = 300) -> None:
        """Start it; what it prints goes to the file `log`. patience: seconds that a block may take."""
        self._log, self._patience = log, patience
        asked, self._ask = os.pipe()
        self._told, tell = os.pipe()
        command = [sys.executable, __file__, str(asked), str(tell), str(script), *arguments]
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, pass_fds=(asked, tell), stdout=output, stderr=output)
        os.close(asked), os.close(tell)
        self.peak = 0
        """Bytes of the device's memory that it held at most in the last block."""

    def block(self, steps: int) -> float:
        """Seconds per step of `steps` steps, after one that is not timed. Raises PeerFailed."""
        for count in (1, steps):
            os.write(self._ask, b"%d\n" % count)
            answer = json.loads(self._answer())
        self.peak = answer["peak"]
        return answer["seconds"] / steps

    def _answer(self) -> bytes:
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            if select.select([self._told], [], [], 0.5)[0] and (line := os.read(self._told, 1000)):
                return line
            if self._process.poll() is not None:
                break
        state = self._process.poll()
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["nothing printed"]
        raise PeerFailed(f"{'no answer' if state is None else f'exit code {state}'}: {lines[-1][-300:]}")

    def close(self) -> None:
        """End it."""
        os.close(self._ask)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._told)


class _Steps:
    """Counts the optimizer steps of this process and holds it after those that were asked for."""

    def __init__(self, asked: int, tell: int) -> None:
        self._asked, self._tell = os.fdopen(asked), tell
        self._left, self._since = 0, 0.0

    def passed(self) -> None:
        """A step is about to be made: all that belongs to the one before is done, on the host."""
        import torch

        if self._left:
            self._left -= 1
            if self._left:
                return
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.synchronize()
            answer = {"seconds": time.perf_counter() - self._since}
            answer["peak"] = torch.cuda.max_memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.empty_cache()  # for the other trainer
                torch.cuda.reset_peak_memory_stats()
            os.write(self._tell, json.dumps(answer).encode() + b"\n")
        if not (line := self._asked.readline()):
            raise SystemExit
        self._left, self._since = int(line), time.perf_counter()


def main() -> None:
    """Run the script that the arguments name."""
    asked, tell, script, *arguments = sys.argv[1:]

    from accelerate.optimizer import AcceleratedOptimizer

    steps, step = _Steps(int(asked), int(tell)), AcceleratedOptimizer.step

    def counted(optimizer: AcceleratedOptimizer, *args: Any, **kwargs: Any) -> Any:
        steps.passed()
        return step(optimizer, *args, **kwargs)

    AcceleratedOptimizer.step = counted
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

"""Everything that can happen to a run, done to real training runs, which must lose nothing: a table of what survived.

    python benchmarks/faults.py [--quick] [--only PART] [--seed 0] [--json FILE]

A trial survives if the run that met the fault, started again by the same command, ends with the same bits (weights,
averages, optimizer) and the same lines of metrics.jsonl as the run that nothing happened to, with exactly the
checkpoints that are to be kept and no junk. Trials are numbered, and everything random in one follows from its number:
a failing one is named on the screen and can be repeated by --only and --seed. --quick takes a tenth of the trials.
--only: the faults whose name holds this text. Writes the table into docs/reliability.md unless --quick or --only is
given. Exits with 1 if anything was lost. About half an hour on two cores.
"""

import argparse
import errno
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

import crash_points  # noqa: E402
import signal_trials  # noqa: E402

DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: written by benchmarks/faults.py -->", "<!-- end of faults -->"
Trial = Callable[[], str | None]


@dataclass
class Row:
    """One kind of fault and its trials."""

    fault: str
    trials: int = 0
    lost: int = 0
    seconds: float = 0.0


def tiny(folder: Path, seed: int) -> Iterator[tuple[str, list[Trial]]]:
    """Saves of tiny tensors: every durable operation."""
    for how, cfg in (("at once", crash_points.NOW), ("in the background", crash_points.BEHIND)):
        # The number of operations in the background varies by a few with the threads; all but the last are tried.
        operations = crash_points.operations(folder / f"count {how}", cfg)
        points = range(len(operations) - 12 * (how != "at once"))
        for name in ("killed", "torn", "power"):
            some = [at for at in points if name != "torn" or operations[at].startswith("write")]
            yield (
                f"{WORDS[name]} at each durable operation of 7 saves {how}",
                [
                    lambda at=at, name=name, cfg=cfg: crash_points.dies(folder / f"{name} {at}", cfg, at, name)
                    for at in some
                ],
            )
        for error in (errno.ENOSPC, errno.EIO):
            yield (
                f"{WORDS[error]} at each durable operation of 7 saves {how}",
                [
                    lambda at=at, error=error, cfg=cfg: crash_points.fails(folder / f"{error} {at}", cfg, at, error)
                    for at in points
                ],
            )


WORDS = {
    "killed": "process killed",
    "torn": "process killed in the middle of a write",
    "power": "power lost, what was not flushed gone,",
    errno.ENOSPC: "disk full",
    errno.EIO: "input/output error",
}


def saving(folder: Path, seed: int) -> Iterator[tuple[str, list[Trial]]]:
    """Real training runs of seven saves."""
    for how, asynchronous, kills, damages in (("at once", False, 100, 200), ("in the background", True, 50, 0)):
        reference = crash_points.Reference(folder / f"reference {how}", asynchronous=asynchronous)
        points = range(len(reference.operations) - 12 * asynchronous)
        yield (
            f"training killed at each durable operation of 7 saves {how}",
            [lambda at=at, r=reference: r.crash(folder / f"crash {at}", at) for at in points],
        )
        yield (
            f"training killed at a random moment, saves {how}",
            [lambda n=n, r=reference: r.kill(folder / f"kill {n}", n) for n in range(seed, seed + kills)],
        )
        if damages:
            yield (
                "newest checkpoint damaged at random, and given by its path: refused",
                [lambda n=n, r=reference: r.damage(folder / f"damage {n}", n) for n in range(seed, seed + damages)],
            )


def signals(folder: Path, seed: int) -> Iterator[tuple[str, list[Trial]]]:
    """TERM, INT and USR1 in every phase."""

    def trial(number: int) -> str | None:
        return "; ".join(signal_trials.trial(number, folder / f"signal {number}").problems) or None

    yield (
        "TERM, INT or USR1 at a random moment of any phase, to trainer, launcher or group",
        [lambda n=n: trial(n) for n in range(seed, seed + 50)],
    )


def measure(row: Row, trials: list[Trial], every: int) -> None:
    """Run every so manieth of the trials; what is lost is told at once."""
    start = time.perf_counter()
    for number, trial in list(enumerate(trials))[::every]:
        row.trials += 1
        try:
            lost = trial()
        except Exception as error:  # a trial that cannot be judged has not survived
            lost = f"{type(error).__name__}: {error}"
        if lost:
            row.lost += 1
            print(f"LOST {row.fault}, trial {number}: {lost}", flush=True)
    row.seconds = time.perf_counter() - start


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| fault | trials | survived | lost |", "|---|---:|---:|---:|"]
    lines += [f"| {row.fault} | {row.trials:,} | {row.trials - row.lost:,} | {row.lost:,} |" for row in rows]
    return "\n".join(lines)


def main() -> int:
    """Measure all, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir=crash_points.RAM) as name:
        for part in (tiny, saving, signals):
            folder = Path(name) / part.__name__
            folder.mkdir()
            for fault, trials in part(folder, asked.seed):
                if asked.only not in fault:
                    continue
                rows.append(row := Row(fault))
                measure(row, trials, 10 if asked.quick else 1)
                print(f"{row.trials - row.lost} of {row.trials} survived in {row.seconds:.0f} s: {fault}", flush=True)
    print(f"\n{table(rows)}")
    if asked.json:
        asked.json.write_text(json.dumps([row.__dict__ for row in rows], indent=1))
    if not asked.quick and not asked.only:
        machine = f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}, torch "
        told = f"{BEGIN}\n`python benchmarks/faults.py --seed {asked.seed}` on {machine}{torch.__version__}:\n\n"
        text = DOCUMENT.read_text()
        DOCUMENT.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{told}{table(rows)}\n{END}", text, flags=re.S))
    return int(any(row.lost for row in rows))


if __name__ == "__main__":
    sys.exit(main())

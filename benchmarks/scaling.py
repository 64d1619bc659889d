"""Images per second with several processes, each with as many images per step as one alone: weak scaling.

    python benchmarks/scaling.py [--rounds 5] [--seconds 8]

The trainer on unet64 of workloads.py, 14.6 M parameters, started by `accelerate launch`: with one process and with 2 on
a CPU of one thread each, with 1, 2, 4, ... processes on as many GPUs as there are. They take turns (turns.py), and the
efficiency is the images per second over those of one process, divided by the processes: median over the rounds, lowest
and highest. On a CPU also for two runs of one process side by side that know nothing of each other: what is missing
there is what cores share (memory, caches, clock), and the rest is what data-parallel training costs.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from figures import Report, middle, parser
from throughput import ROOT, WARM, options
from turns import Contender, started, take_turns
from workloads import Workload, make

CONFIGS = ROOT / "configs" / "accelerate"


class SideBySide:
    """Runs that know nothing of each other, with their turns in common: what a Contender does, by all of them."""

    def __init__(self, runs: Sequence[Contender]) -> None:
        self._runs = runs

    def wait_for(self, steps: int) -> None:
        """Until each has done so many steps."""
        for run in self._runs:
            run.wait_for(steps)

    def stop(self) -> None:
        """End their turn."""
        for run in self._runs:
            run.stop()

    def go_on(self) -> None:
        """Begin their turn."""
        for run in self._runs:
            run.go_on()

    def finish_step(self) -> None:
        """A turn of each to the end of the step that the last one cut."""
        for run in self._runs:
            run.finish_step()

    def speeds(self, rounds: int) -> list[tuple[float, float]]:
        """Those of a Contender, of all together: images per second, and per second of processor time."""
        turns = zip(*(run.speeds(rounds) for run in self._runs), strict=True)
        return [(sum(wall for wall, _ in turn), sum(cpu for _, cpu in turn) / len(turn)) for turn in turns]

    def end(self) -> None:
        """Kill them."""
        for run in self._runs:
            run.end()


def run(folder: Path, workload: Workload, processes: int, env: Mapping[str, str]) -> Contender:
    """The trainer with this many processes."""
    if torch.cuda.is_available():
        config = "multi_gpu" if processes > 1 else "one_gpu"
    else:
        config = "cpu_2" if processes > 1 else "cpu"
    several = ["--num_processes", str(processes), "--main_process_port", "0"] if processes > 1 else []
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    settings = options(workload, folder / "run", ema=False, precision="no")
    place = settings.index("--global_batch_size")
    settings[place : place + 2] = ["--train_batch_size", str(workload.batch)]
    command = [*launch, *several, str(ROOT / "train_unet.py"), *settings]
    return Contender(folder.name, command, folder, images=workload.batch * processes, env=env)


def contenders(folder: Path, workload: Workload) -> dict[str, tuple[int, Callable]]:
    """By name: the number of processes, and what starts them."""
    env = {"OMP_NUM_THREADS": "1"}
    numbers = [1, 2]
    if torch.cuda.is_available():
        numbers = [2**power for power in range(torch.cuda.device_count().bit_length())]
    found = {}
    for processes in numbers:
        name = f"{processes} process{'es' * (processes > 1)}"
        found[name] = processes, lambda name, n=processes: run(folder / name, workload, n, env)
    if not torch.cuda.is_available():
        pair = [folder / "side by side 1", folder / "side by side 2"]
        found["2 runs side by side"] = 2, lambda _: SideBySide([run(one, workload, 1, env) for one in pair])
    return found


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--seconds", type=float, default=8.0, help="of a turn")
    asked = made.parse_args()
    report = Report("scaling", f"python benchmarks/scaling.py --rounds {asked.rounds} --seconds {asked.seconds:g}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        workload = make("unet64", Path(place) / "work")
        found = contenders(Path(place) / "runs", workload)
        with started({name: start for name, (_, start) in found.items()}, warm=WARM) as running:
            speeds = take_turns(running, rounds=asked.rounds, seconds=asked.seconds)
    alone = speeds["1 process"]
    for name, (processes, _) in found.items():
        share = middle([one[0] / base[0] / processes for one, base in zip(speeds[name], alone, strict=True)])
        per_second = middle([one[0] for one in speeds[name]])["median"]
        report.add(
            name, images_per_second=per_second, efficiency=share["median"], lowest=share["lowest"],
            highest=share["highest"],
        )  # fmt: skip
    report.finish(docs=asked.docs)


if __name__ == "__main__":
    main()

"""Speed, memory and exactness on one GPU, in one call of under ten minutes.

    python benchmarks/gpu.py --minutes 9 [--diffusers PATH] [--only STAGE ...] [--peak 989] [--out FOLDER] [--docs]
    python benchmarks/gpu.py --tiny [--diffusers PATH]        the same on small shapes, on whatever there is

Stages, most important first; one that no longer fits into the minutes is skipped, and says so:

losses, resume      losses of float16 (GradScaler), bfloat16, TF32, channels_last and unfused AdamW beside float32 in
                    eager mode; a resume with train.deterministic, bit for bit
sd15, sdxl, ddpm    images/s of Stable Diffusion 1.5 at 512 pixels (batch 4, 16, 1), of XL at 1024 (1, 4), and of the
                    114 M DDPM at 64 (128, 64), all of them trained in full in bfloat16, models of random weights. Ours:
                    `Trainer.train_step` on batches of its loader, caches hit, with the levers off and on (LEVERS);
                    beside it the bare loop of the same UNet (noise, network, squared error, AdamW; data in memory), and
                    with --diffusers the script of a diffusers checkout on the same files. They take turns, a block of
                    steps each (sdxl one after the other: two do not fit); medians over blocks, each ended by a wait
                    for the device. mfu: 3 x forward FLOP of the UNet over --peak TFLOP/s, dense bfloat16 (989: H100
                    SXM, H200). ddpm has an EMA, in the script too, in the bare loop not
syncs, trace        where a step of sd15, batch 4, waits for the device; what its profile says: share of the time in
                    which the GPU works, the longest gaps between kernels and what the host did in them, the kernels
                    that take longest. The trace itself goes to --out
compiled            losses with compiled blocks, a compiled UNet and CUDA graphs beside those in eager mode
lever               sd15, batch 4, with each lever alone, beside none

Prints a line of JSON per figure as soon as it is known. Exit code 1 if losses do not agree or a resume is not exact.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from figures import Report, parser
from gpu_checks import check_compiled, check_losses, check_resume, count_synchronisations, profile
from gpu_runs import CASES, GPU, LEVERS, Bare, Ours, Place, forget_accelerate, measure, peer_of, release

Stage = tuple[str, float, Callable[[], None]]
"""Name, seconds that it takes on an H100 (with diffusers' scripts), and what it does."""
ON = "on"
ALONE = {"channels_last": 40, "cudnn_benchmark": 40, "compile blocks": 90, "compile unet": 240, "cuda_graphs": 240}
"""Seconds that a lever takes, to be measured alone."""


class Bench:
    """What the stages share: the time that is left, the report, and the trainers that are alive."""

    def __init__(self, asked: Any, root: Path) -> None:
        self.asked, self.root = asked, root
        self.report = Report("gpu", f"python benchmarks/gpu.py {' '.join(asked.shown)}".strip())
        self.end = time.monotonic() + 60 * asked.minutes
        self.failed = False
        """Whether something that must hold did not."""
        self._places: dict[str, Place] = {}
        self._trainers: dict[tuple[str, str], Ours] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def run(self, stages: list[Stage]) -> None:
        """Each stage that is asked for and fits; an error of one is a row of the report, and the next goes on."""
        for name, seconds, stage in stages:
            if self.asked.only and not {name, name.split()[0]} & set(self.asked.only):
                continue
            if not self.asked.tiny and self.left < seconds:
                self.report.add(name, note=f"skipped: it takes about {seconds:.0f} s, and {self.left:.0f} s are left")
                continue
            try:
                stage()
            except Exception as error:
                self.report.add(name, note=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(f"{name}: done, {self.left:.0f} s left", file=sys.stderr, flush=True)
        self.keep_only("")

    def place(self, name: str) -> Place:
        """The model and the data of a case, made when they are first asked for."""
        if name not in self._places:
            self._places[name] = Place.make(name, self.root / name, tiny=self.asked.tiny)
        return self._places[name]

    def trainer(self, name: str, levers: str, batch: int) -> Ours:
        """Our trainer of a case, made when it is first asked for, with its next batches; LEVERS names its levers."""
        if not self._trainers:
            forget_accelerate()
        if (name, levers) not in self._trainers:
            folder = self.root / "runs" / f"{name}-{levers}"
            self._trainers[name, levers] = Ours(self.place(name), folder, LEVERS[levers], batch)
        return self._trainers[name, levers].take(batch)

    def keep_only(self, name: str, levers: str | None = None) -> None:
        """Let go of the trainers of other cases, and of other levers than `levers` if that is given."""
        for key in [key for key in self._trainers if key[0] != name or levers not in (None, key[1])]:
            self._trainers.pop(key).close()
        if not self._trainers:
            torch.compiler.reset()  # what was compiled keeps the networks alive
        release()

    def check(self, holds: bool) -> bool:
        """Note something that must hold."""
        self.failed |= not holds
        return holds


def with_bare(bench: Bench, name: str, levers: str, batch: int) -> dict[str, Any]:
    """Our trainer with these levers and the bare loop of its UNet; nothing but a row if it cannot be made."""
    try:
        ours = bench.trainer(name, levers, batch)
        return {f"ours, levers {levers}": ours, f"bare, levers {levers}": Bare(ours)}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        bench.report.add(f"{name}, batch {batch}, levers {levers}", note=reason)
        return {}


def together(bench: Bench, name: str, batch: int) -> None:
    """Levers off and on, their bare loops and the script, taking turns."""
    bench.keep_only(name)
    place = bench.place(name)
    peer = peer_of(place, bench.asked.diffusers, batch)  # first: it starts while our trainers are made
    try:
        runners = with_bare(bench, name, "off", batch) | with_bare(bench, name, ON, batch)
        if peer is not None:
            runners["diffusers"] = peer
        measure(bench, place, batch, runners)
    finally:
        if peer is not None:
            peer.close()


def one_by_one(bench: Bench, name: str, batch: int) -> None:
    """The same for what fills the memory: the script alone, and then each of our trainers with its bare loop."""
    place, seconds = bench.place(name), {}
    bench.keep_only("")
    if bench.asked.diffusers is not None:
        peer = peer_of(place, bench.asked.diffusers, batch)
        try:
            seconds = measure(bench, place, batch, {"diffusers": peer})
        finally:
            peer.close()
    for levers in ("off", ON):
        bench.keep_only(name, levers)
        seconds = measure(bench, place, batch, with_bare(bench, name, levers, batch), before=seconds)


def single_lever(bench: Bench, levers: str) -> None:
    """One lever alone, at batch 4 of sd15, beside none."""
    if not GPU and levers != "channels_last":
        bench.report.add(f"lever {levers}", note="skipped: for a GPU")
        return
    bench.keep_only("sd15", "off")
    batch = 1 if bench.asked.tiny else 4
    runners = {f"ours, levers {each}": bench.trainer("sd15", each, batch) for each in ("off", levers)}
    measure(bench, bench.place("sd15"), batch, runners)


def stages_of(bench: Bench) -> list[Stage]:
    """All of them, in their order."""

    def speed(name: str, batch: int) -> Callable[[], None]:
        size = min(batch, 2) if bench.asked.tiny else batch
        return lambda: (together if CASES[name].together else one_by_one)(bench, name, size)

    return [
        ("losses", 50, lambda: check_losses(bench)),
        ("resume", 25, lambda: check_resume(bench)),
        ("sd15 4", 150, speed("sd15", 4)),
        ("syncs", 20, lambda: count_synchronisations(bench)),
        ("trace", 40, lambda: profile(bench)),
        ("sd15 16", 120, speed("sd15", 16)),
        ("ddpm 128", 80, speed("ddpm", 128)),
        ("sdxl 1", 170, speed("sdxl", 1)),
        ("compiled", 90, lambda: check_compiled(bench)),
        ("sd15 1", 100, speed("sd15", 1)),
        ("ddpm 64", 80, speed("ddpm", 64)),
        ("sdxl 4", 170, speed("sdxl", 4)),
        *((f"lever {name}", seconds, functools.partial(single_lever, bench, name)) for name, seconds in ALONE.items()),
    ]


def main() -> int:
    """Run the stages. Returns the exit code."""
    asking = parser(__doc__)
    asking.add_argument("--minutes", type=float, default=9.0)
    asking.add_argument("--diffusers", type=Path, help="a checkout of diffusers, whose scripts are the peers")
    asking.add_argument("--only", nargs="+", help="stages by name or first word: sd15, 'sdxl 1'")
    asking.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the device, dense bfloat16")
    asking.add_argument("--out", type=Path, help="folder for the trace")
    asking.add_argument("--tiny", action="store_true")
    asked = asking.parse_args()
    asked.shown = [word for word in sys.argv[1:] if word != "--docs"]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(asked, Path(root))
        bench.run(stages_of(bench))
    bench.report.finish(docs=asked.docs)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())

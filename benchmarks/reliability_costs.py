"""What exact resume costs while training: keyed randomness, the stall of a save, and the start of a resumed run.

    python benchmarks/reliability_costs.py [--steps 40] [--repeats 5]

keyed      share of a training step that is spent on drawing by keys (order, crop, flip, caption, level, noise,
           posterior, condition dropout), and on hashing and reseeding alone, on the digits recipe and on a UNet of
           50 M parameters
save       seconds that the loop stands still for a checkpoint of 20 M and of 200 M parameters (weights, two moments,
           one average), written at once and by checkpoint.asynchronous; beside them the time of the copy to memory
resume     seconds from `Trainer(cfg)` to the first step done, fresh and resumed, on the digits recipe
Prints one line of JSON per figure, medians over the repeats.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from finetune import data, images, order, seeding
from finetune.config import TrainConfig
from finetune.config_io import load
from finetune.meter import Meter
from finetune.saving import Saver
from finetune.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = {20: (128, 224, 224), 50: (160, 320, 384), 200: (320, 640, 768)}
"""Of UNets of about so many million parameters."""


def digits(folder: Path, *extra: str) -> TrainConfig:
    """The digits recipe in a folder of its own, silent and without pictures."""
    quiet = ["--report_to", "none", "--sample.sample_every", "null", "--dataloader_num_workers", "0"]
    os.chdir(ROOT)
    return load(["--config", "configs/train/digits.yaml", "--output_dir", str(folder), *quiet, *extra])


def large(folder: Path, millions: int, *extra: str) -> TrainConfig:
    """A UNet2DModel of about `millions` million parameters on the pixels of the digits, 32x32, four images a step."""
    model = [
        "--model.kind", "unet2d", "--model.block_out_channels", *map(str, CHANNELS[millions]), "--layers_per_block",
        "2", "--down_block_types", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "--up_block_types", "UpBlock2D",
        "AttnUpBlock2D", "UpBlock2D", "--space.kind", "pixel", "--conditioning.kind", "none", "--prompts=[]",
        "--train.global_batch_size", "4", "--guidance_scale", "1",
    ]  # fmt: skip
    return digits(folder, *model, *extra)


class Stopwatch:
    """Adds up the time inside functions, replaced by timed ones; nested calls count once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def timed(self, function: Callable) -> Callable:
        """`function`, with its time added up here."""

        def run(*args, **kwargs):
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        return run


@contextmanager
def replaced(watch: Stopwatch, *places: tuple[object, str]):
    """Inside, each attribute (owner, name) is timed by `watch`."""
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, watch.timed(function))
    try:
        yield
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


DRAWS = [(seeding.PositionRandom, name) for name in ("normal", "uniform", "stratified", "integers")]
KEYS = [(module, "key") for module in (seeding, data, images)]


def keyed_share(cfg: TrainConfig, steps: int, repeats: int) -> dict[str, float]:
    """Medians over `repeats` times `steps` steps: share of all keyed draws, of the hashing and reseeding in them."""
    trainer = Trainer(cfg)
    meter = Meter(trainer.accelerator, trainer.modules.objective)
    batches = iter(trainer.loader())
    trainer.train_step(batches, meter)
    shares: dict[str, list[float]] = {"draws": [], "keys": []}
    for _ in range(repeats):
        for name, places in (
            ("draws", [*DRAWS, *KEYS[1:], (order, "permutation")]),
            ("keys", [*KEYS, (seeding.PositionRandom, "_at"), (order, "permutation")]),
        ):
            watch, start = Stopwatch(), time.perf_counter()
            with replaced(watch, *places):
                for _ in range(steps):
                    trainer.train_step(batches, meter)
            shares[name].append(watch.seconds / (time.perf_counter() - start))
    parameters = sum(p.numel() for p in trainer.modules.unet.parameters()) / 1e6
    return {"parameters_millions": round(parameters, 1)} | {k: statistics.median(v) for k, v in shares.items()}


def stall(cfg: TrainConfig, repeats: int) -> dict[str, float]:
    """Median seconds of `Trainer.save`, at once and asynchronous, and of a copy of all it saves."""
    trainer = Trainer(cfg)
    meter = Meter(trainer.accelerator, trainer.modules.objective)
    batches = iter(trainer.loader())
    times: dict[str, list[float]] = {"synchronous": [], "asynchronous": [], "copy": []}
    settings = {kind: replace(cfg.checkpoint, asynchronous=kind == "asynchronous") for kind in times}
    savers = {kind: Saver(Path(cfg.output_dir), of_kind) for kind, of_kind in settings.items()}
    for _ in range(repeats):
        for kind in times:
            trainer.train_step(batches, meter)
            start = time.perf_counter()
            if kind == "copy":
                _ = [tensor.clone() for part in trainer.state.parts().values() for tensor in part.values()]
            else:
                trainer.saver = savers[kind]
                trainer.save(required=False)
            times[kind].append(time.perf_counter() - start)
            trainer.saver.wait()
    size = sum(t.numel() * t.element_size() for part in trainer.state.parts().values() for t in part.values())
    return {"megabytes": size / 1e6} | {kind: statistics.median(seconds) for kind, seconds in times.items()}


def start_up(folder: Path, repeats: int) -> dict[str, float]:
    """Median seconds to the first step done, of a fresh and of a resumed digits run."""
    times: dict[str, list[float]] = {"fresh": [], "resumed": []}
    for number in range(repeats):
        cfg = digits(folder / str(number))
        for kind in times:
            start = time.perf_counter()
            trainer = Trainer(cfg)
            trainer.train_step(iter(trainer.loader()), Meter(trainer.accelerator, trainer.modules.objective))
            times[kind].append(time.perf_counter() - start)
            trainer.save(required=True)
    return {kind: statistics.median(seconds) for kind, seconds in times.items()}


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {
            "keyed, digits": lambda: keyed_share(digits(folder / "a"), asked.steps, asked.repeats),
            "keyed, 50 M": lambda: keyed_share(large(folder / "b", 50), max(2, asked.steps // 10), asked.repeats),
            "save, 20 M": lambda: stall(large(folder / "c", 20), asked.repeats),
            "save, 200 M": lambda: stall(large(folder / "d", 200), asked.repeats),
            "resume, digits": lambda: start_up(folder / "e", asked.repeats),
        }
        for figure, measure in figures.items():
            print(json.dumps({"figure": figure, **measure(), **machine}), flush=True)


if __name__ == "__main__":
    main()

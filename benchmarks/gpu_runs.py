"""What benchmarks/gpu.py times, a block of steps each: our trainer, the bare loop of its UNet, diffusers' scripts."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from pydantic import TypeAdapter

import shapes
import standins
from figures import middle
from finetune.batching import on_device
from finetune.config import TrainConfig
from finetune.meter import Meter
from finetune.models import bind
from finetune.seeding import PositionRandom
from finetune.trainer import Trainer
from finetune.watchdog import patiently
from peer import Peer

ROUNDS = 5
BLOCK_SECONDS = 1.0
GPU = torch.cuda.is_available()
LEVERS: dict[str, dict[str, Any]] = {
    "off": {},
    "on": {"channels_last": True, "cudnn_benchmark": True, "compile": "blocks"},
    "channels_last": {"channels_last": True},
    "cudnn_benchmark": {"cudnn_benchmark": True},
    "compile blocks": {"compile": "blocks"},
    "compile unet": {"compile": "unet"},
    "cuda_graphs": {"compile": "unet", "cuda_graphs": True},
}
"""Settings of the section train by what they are called here."""


@dataclass(frozen=True)
class Case:
    """A model and what it is trained on."""

    side: int
    """Of the images, in pixels."""
    tflop: float
    """Of the UNet's forward pass, per image."""
    rows: int
    """Images: more than the script trains on, so that it does not start its loader anew within a block."""
    script: str
    """Of diffusers, below examples/."""
    arguments: tuple[str, ...] = ()
    """Of the script alone."""
    together: bool = True
    """Whether several trainers fit on the device at once."""


CASES = {
    "sd15": Case(512, 0.803, 1024, "text_to_image/train_text_to_image.py", ("--center_crop",)),
    "sdxl": Case(1024, 6.761, 160, "text_to_image/train_text_to_image_sdxl.py", ("--center_crop",), together=False),
    "ddpm": Case(
        64, 0.031, 8192, "unconditional_image_generation/train_unconditional.py",
        ("--center_crop", "--use_ema", "--num_epochs=1000", "--ddpm_num_inference_steps=1", "--eval_batch_size=1",
         "--save_images_epochs=100000", "--save_model_epochs=100000"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A case on the disk."""

    name: str
    root: Path
    tiny: bool
    side: int

    @classmethod
    def make(cls, name: str, root: Path, *, tiny: bool) -> Place:
        """Write the model, of ddpm its configuration alone, and the pictures."""
        case = CASES[name]
        side, rows = (32 if name == "ddpm" else 64, 24) if tiny else (case.side, case.rows)
        standins.pictures(root / "pictures", count=rows, different=min(rows, 64), side=side)
        if name == "ddpm":
            shape = shapes.UNETS[name] | (standins.TINY[name] if tiny else {})
            with torch.device("meta"):
                shapes.unet(name, **shape).save_config(root / "model")
        else:
            standins.pipeline(name, root / "model", tiny=tiny)
        return cls(name, root, tiny, side)

    def config(self, folder: Path, train: dict[str, Any]) -> TrainConfig:
        """Of our trainer; train: settings of that section."""
        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "data": {"train_data_dir": str(self.root / "pictures"), "resolution": self.side, "center_crop": True},
            "train": {"max_train_steps": 10**6, "gradient_accumulation_steps": 1, "mixed_precision": "bf16"} | train,
            "optimizer": {"learning_rate": 1e-6, "lr_scheduler": "constant", "lr_warmup_steps": 0},
            "tracking": {"report_to": "none", "log_every": 10**6},
            "sample": {"sample_every": None},
        }
        if self.name == "ddpm":
            names = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types")
            shape = json.loads((self.root / "model" / "config.json").read_text())
            settings |= {"model": {"kind": "unet2d"} | {name: shape[name] for name in names}, "ema": {"use_ema": True}}
        else:
            settings["data"]["random_flip"] = False
            settings["model"] = {"kind": "pretrained", "pretrained_model_name_or_path": str(self.root / "model")}
            settings["conditioning"] = {"kind": "auto", "condition_dropout": 0.0}  # as diffusers' scripts
            settings["cache"] = {"latents": True, "text": True, "folder": str(self.root / "cache")}
        return TypeAdapter(TrainConfig).validate_python(settings)


class Runner:
    """One of several trainers on the device."""

    own = peak = 0
    """Bytes of the device that are its alone: what it holds between steps, and its most in a block."""

    def step(self) -> None:
        """One step."""
        raise NotImplementedError

    def block(self, steps: int) -> float:
        """Seconds per step, of `steps` after one that is not timed."""
        others = _allocated() - self.own
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        try:
            self.step()
            _wait()
            since = time.perf_counter()
            for _ in range(steps):
                self.step()
            _wait()
            return (time.perf_counter() - since) / steps
        finally:
            if GPU:
                self.peak = torch.cuda.max_memory_allocated() - others
                torch.cuda.empty_cache()  # for the process of the script


class Ours(Runner):
    """Our trainer."""

    def __init__(self, place: Place, folder: Path, levers: dict[str, Any], batch: int) -> None:
        if not GPU:  # where the others gain nothing, and take long
            levers = {name: value for name, value in levers.items() if name == "channels_last"}
        self._before = _allocated()
        self.trainer = Trainer(place.config(folder, levers | {"global_batch_size": batch}))
        self.meter = Meter(self.trainer.accelerator, self.trainer.modules.objective)
        self._open = contextlib.ExitStack()

    def take(self, batch: int) -> Ours:
        """Take batches of this size from now on, and make the first two steps, in which kernels are chosen."""
        if self.trainer.micro_batch != batch:
            torch.compiler.reset()  # a run has one shape: nothing is to be compiled for several
        self.trainer.micro_batch = self.trainer.global_batch = batch  # the model is made once for all of them
        self._open.close()
        loaded = on_device(patiently(self.trainer.loader(), 600), self.trainer.accelerator.device)
        self._batches = self.meter.waiting(self._open.enter_context(contextlib.closing(loaded)))
        for _ in range(2):
            self.step()
        self.own = self.own or _allocated() - self._before
        return self

    def step(self) -> None:
        """One step of the loop."""
        self.trainer.train_step(self._batches, self.meter)

    def close(self) -> None:
        """End its loader."""
        self._open.close()


class Bare(Runner):
    """The least that trains the same UNet, with the levers that it has: no clipping, no average, no log."""

    def __init__(self, ours: Ours) -> None:
        """ours: has taken its batch."""
        trainer = ours.trainer
        self.own = ours.own
        self._optimizer = trainer.optimizer.optimizer
        batch, device = next(iter(trainer.loader())), trainer.accelerator.device
        random = PositionRandom(0, batch.positions, device)
        self._x0 = trainer.modules.space.x0(batch, random, device)
        self._network = bind(trainer.network, trainer.modules.conditioner(batch, random))
        alphas = torch.linspace(0.9999, 0.01, 1000, device=device)
        self._alpha, self._sigma = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]

    def step(self) -> None:
        """Forward, backward, AdamW."""
        noise = torch.randn_like(self._x0)
        time = torch.randint(1000, (len(noise),), device=noise.device)
        output = self._network(self._alpha[time] * self._x0 + self._sigma[time] * noise, time)
        (output.float() - noise).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def forget_accelerate() -> None:
    """Let the next trainer choose its precision, of which Accelerate takes one per process; the last one is gone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def release() -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if GPU else 0


def peer_of(place: Place, diffusers: Path | None, batch: int) -> Peer | None:
    """diffusers' script for this case, in a process of its own, on the same files; None without a checkout."""
    if diffusers is None:
        return None
    case, folder = CASES[place.name], place.root / f"diffusers-{batch}"
    folder.mkdir(parents=True)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    arguments = [
        f"--train_data_dir={place.root / 'pictures'}", f"--resolution={place.side}", f"--train_batch_size={batch}",
        f"--output_dir={folder / 'run'}", "--mixed_precision=bf16", "--checkpointing_steps=1000000", *case.arguments,
        f"--dataloader_num_workers={8 if GPU else 0}", "--learning_rate=1e-6", "--lr_warmup_steps=0",
    ]  # fmt: skip
    if place.name == "ddpm":
        arguments += [f"--model_config_name_or_path={place.root / 'model'}"]
    else:
        arguments += [f"--pretrained_model_name_or_path={place.root / 'model'}", "--max_train_steps=1000000"]
    return Peer(diffusers.resolve() / "examples" / case.script, arguments, folder / "log.txt")


def measure(
    bench: Any, place: Place, batch: int, runners: dict[str, Any], *, before: dict[str, list[float]] | None = None
) -> dict[str, list[float]]:
    """Let the runners take turns and report each; one that fails is reported and left out.

    before: seconds per step that were measured before, by name, which the ratios may be with. Returns those of all.
    """
    seconds, sizes = {name: [] for name in runners}, {}
    for turn in range(-1, 2 if place.tiny else ROUNDS):  # the first shows how many steps make a block
        for name, runner in list(runners.items()):
            try:
                found = runner.block(sizes.get(name, 1))
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                bench.report.add(_figure(place, batch, name), note=f"{type(error).__name__}: {reason}")
                del runners[name], seconds[name]
                release()
                continue
            if turn < 0:
                sizes[name] = 1 if place.tiny else max(2, min(10, round(BLOCK_SECONDS / found)))
            else:
                seconds[name].append(found)
    everything = (before or {}) | seconds
    for name, runner in runners.items():
        bench.report.add(_figure(place, batch, name), **_row(bench, place, batch, name, everything), **_peak(runner))
    return everything


def _figure(place: Place, batch: int, name: str) -> str:
    return f"{place.name} {place.side} px, batch {batch}: {name}"


def _row(bench: Any, place: Place, batch: int, name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    own = seconds[name]
    found: dict[str, Any] = {"images_per_second": batch / statistics.median(own)}
    found |= {"lowest": batch / max(own), "highest": batch / min(own)}
    if GPU and not place.tiny:
        found["mfu"] = found["images_per_second"] * 3 * CASES[place.name].tflop / bench.asked.peak
    others = {"over_bare": name.replace("ours", "bare"), "over_diffusers": "diffusers"}
    others |= {"over_off": "ours, levers off"} if name.startswith("ours") else {}
    for column, other in others.items():
        if other in seconds and other != name:
            ratios = middle([theirs / mine for theirs, mine in zip(seconds[other], own, strict=False)])
            found[column] = ratios["median"]
            found[f"{column}_spread"] = f"{ratios['lowest']:.3g}-{ratios['highest']:.3g}"
    return found


def _peak(runner: Any) -> dict[str, float]:
    return {"peak_gib": runner.peak / 2**30} if GPU else {}

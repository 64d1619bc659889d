"""What benchmarks/gpu.py proves and looks at: losses of every precision and lever, a resume, waits, a profile."""

from __future__ import annotations

import math
import shutil
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from finetune.config import TrainConfig
from finetune.meter import Meter
from finetune.trainer import Trainer
from gaps import Trace
from gpu_runs import GPU, forget_accelerate

STEPS = 20
EAGER: dict[str, tuple[dict[str, Any], str, float]] = {
    "float32": ({}, "", 0.0),
    "TF32": ({"allow_tf32": True}, "float32", 1e-2),
    "channels_last": ({"channels_last": True}, "float32", 1e-3),
    "bfloat16": ({"mixed_precision": "bf16"}, "float32", 5e-2),
    "float16": ({"mixed_precision": "fp16"}, "float32", 2e-2),
}
"""Settings of train by what they are called; what their losses are compared with; the largest relative difference that
they may have from it in any of STEPS steps: rounding to 8, 11 or 24 bits, which the steps carry on."""
GRAPHS = {"compile": "unet", "cuda_graphs": True}
COMPILED: dict[str, tuple[dict[str, Any], str, float]] = {
    "bfloat16": ({"mixed_precision": "bf16"}, "", 0.0),
    "compiled blocks": ({"mixed_precision": "bf16", "compile": "blocks"}, "bfloat16", 5e-2),
    "compiled UNet": ({"mixed_precision": "bf16", "compile": "unet"}, "bfloat16", 5e-2),
    "CUDA graphs": ({"mixed_precision": "bf16", **GRAPHS}, "bfloat16", 5e-2),
    "CUDA graphs, accumulating": (
        {"mixed_precision": "bf16", **GRAPHS, "gradient_accumulation_steps": 2}, "bfloat16", 5e-2
    ),
}  # fmt: skip
"""Likewise; a compiled network rounds less often than an eager one."""


def check_losses(bench: Any) -> None:
    """Losses of each of EAGER beside those that they are compared with; and the fused AdamW."""
    _check(bench, EAGER)
    difference = fused_adamw(torch.device("cuda" if GPU else "cpu"))
    holds = bench.check(difference <= 1e-5)
    bench.report.add("fused AdamW beside a loop", steps=STEPS, difference=difference, tolerance=1e-5, holds=holds)


def check_compiled(bench: Any) -> None:
    """Losses of each of COMPILED beside those of eager mode."""
    _check(bench, COMPILED)


def _check(bench: Any, runs: dict[str, tuple[dict[str, Any], str, float]]) -> None:
    losses: dict[str, list[float]] = {}
    for name, (train, against, tolerance) in runs.items():
        figure = f"losses: {name}" + (f" beside {against}" if against else "")
        if not GPU and ({"compile", "cuda_graphs", "allow_tf32"} & train.keys() or name == "float16"):
            bench.report.add(figure, note="skipped: for a GPU")
            continue
        try:
            losses[name] = _losses(bench, name, train)
        except Exception as error:
            bench.check(False)
            bench.report.add(figure, note=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        taken = sum(map(math.isfinite, losses[name]))
        found: dict[str, Any] = {"steps": taken, "first_loss": losses[name][0], "last_loss": losses[name][-1]}
        if against in losses:
            difference = largest_difference(losses[name], losses[against])
            agree = bench.check(difference <= tolerance and taken >= len(losses[name]) // 2)
            found |= {"difference": difference, "tolerance": tolerance, "holds": agree}
        bench.report.add(figure, **found)


def fused_adamw(device: torch.device) -> float:
    """The largest difference, over the largest weight, that the fused AdamW has from torch's loop after STEPS steps."""
    sides = []
    for fused in (True, False):
        random = torch.Generator().manual_seed(0)
        weights = [torch.randn(64, 64, generator=random).to(device).requires_grad_() for _ in range(8)]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=fused, foreach=False)
        for _ in range(STEPS):
            for weight in weights:
                weight.grad = torch.randn(64, 64, generator=random).to(device)
            optimizer.step()
        sides.append(torch.stack([weight.detach() for weight in weights]))
    return float((sides[0] - sides[1]).abs().max() / sides[1].abs().max())


def largest_difference(losses: list[float], others: list[float]) -> float:
    """Relative, over the steps that both took; infinite if there are none."""
    both = [(a, b) for a, b in zip(losses, others, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return max((abs(a - b) / abs(b) for a, b in both), default=math.inf)


def _losses(bench: Any, name: str, train: dict[str, Any]) -> list[float]:
    """One per global batch; not a number where the step was skipped, as float16 does while it finds its scale."""
    return _train(*_small(bench, name, train), 4 if bench.asked.tiny else STEPS)


def _train(trainer: Trainer, meter: Meter, steps: int) -> list[float]:
    batches = meter.waiting(iter(trainer.loader()))
    return [meter.read()["loss"] if trainer.train_step(batches, meter) else math.nan for _ in range(steps)]


def _small(bench: Any, name: str, train: dict[str, Any]) -> tuple[Trainer, Meter]:
    """A trainer of a small UNet with attention on 32x32 pixels, 8 images a step; always of the same weights."""
    bench.keep_only("")
    forget_accelerate()
    torch.compiler.reset()
    width = 32 if bench.asked.tiny else 128
    settings = {
        "output_dir": str(bench.root / "small" / name.replace(" ", "-")),
        "data": {
            "train_data_dir": str(bench.place("ddpm").root / "pictures"),
            "resolution": 32,
            "max_train_samples": 16 if bench.asked.tiny else 512,
            "dataloader_num_workers": 0,
        },
        "model": {
            "kind": "unet2d",
            "block_out_channels": [width, 2 * width],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        },
        "train": {"max_train_steps": 10**6, "global_batch_size": 2 if bench.asked.tiny else 8, "mixed_precision": "no"}
        | train,
        "optimizer": {"learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 0},
        "ema": {"use_ema": True},
        "tracking": {"report_to": "none", "log_every": 1},
        "sample": {"sample_every": None},
    }
    trainer = Trainer(TypeAdapter(TrainConfig).validate_python(settings))
    return trainer, Meter(trainer.accelerator, trainer.modules.objective)


def check_resume(bench: Any) -> None:
    """Steps in one go, and with a new trainer from a checkpoint in their middle: all that is trained and averaged."""
    train, half = {"mixed_precision": "bf16", "deterministic": True}, 2 if bench.asked.tiny else 5
    states = {}
    for name, parts in {"whole": [2 * half], "resumed": [half, half]}.items():
        for steps in parts:
            trainer, meter = _small(bench, name, train)
            _train(trainer, meter, steps)
            trainer.save(required=True)
            trainer.saver.wait()
        states[name] = {
            f"{part}/{key}": tensor.detach().cpu().clone()
            for part, tensors in trainer.state.parts().items()
            for key, tensor in tensors.items()
        }
        shutil.rmtree(trainer.output_dir)
    torch.use_deterministic_algorithms(False)
    whole, resumed = states.values()
    differing = [key for key in whole if not torch.equal(whole[key], resumed[key])]
    same = bench.check(not differing and whole.keys() == resumed.keys())
    bench.report.add("resume in bfloat16, deterministic", steps=2 * half, tensors=len(whole), holds=same)


def count_synchronisations(bench: Any, steps: int = 3) -> None:
    """Where a step of sd15 waits for the device, and how often: the lines of this package that torch warns of."""
    if not GPU:
        bench.report.add("waits for the device", note="skipped: for a GPU")
        return
    ours, places = bench.trainer("sd15", "off", 4), Counter()

    def note(message: Any, *_: Any) -> None:
        if "synchronizing" in str(message):
            own = [frame for frame in traceback.extract_stack() if "finetune" in Path(frame.filename).parts]
            places[f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    bench.report.add("waits for the device", per_step=sum(places.values()) / steps)
    for place, count in places.most_common():
        bench.report.add(f"waits at {place}", per_step=count / steps)


def profile(bench: Any, most: int = 5) -> None:
    """A few steps of sd15, batch 4, without levers and with all: the GPU's share, its longest gaps, its kernels."""
    for levers in ("off", "on"):
        ours = bench.trainer("sd15", levers, 1 if bench.asked.tiny else 4)
        path = (bench.asked.out or bench.root) / f"trace-{levers}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if GPU else [])]
        when = torch.profiler.schedule(wait=0, warmup=1, active=2)
        with torch.profiler.profile(activities=kinds, schedule=when) as profiler:
            for _ in range(3):
                ours.step()
                if GPU:
                    torch.cuda.synchronize()
                profiler.step()
        profiler.export_chrome_trace(str(path))
        trace = Trace.read(path)
        if not trace.device:
            bench.report.add(f"trace, levers {levers}", note="no kernels in it: for a GPU")
            continue
        bench.report.add(f"trace, levers {levers}", busy=trace.busy, milliseconds_per_step=trace.span / 2e3)
        for gap in trace.gaps(most):
            words = {"doing": _short(gap.doing), "after": _short(gap.before), "until": _short(gap.after)}
            bench.report.add(f"trace, levers {levers}: gap", microseconds=gap.microseconds, **words)
        for name, count, share in trace.kernels(most):
            bench.report.add(f"trace, levers {levers}: kernel {_short(name)}", per_step=count / 2, share=share)


def _short(name: str) -> str:
    return name.replace("|", "/")[:90]

"""Measuring a trained model on data, `finetune evaluate`. Imports no torch until the arguments are known to be right.

A metric is a function of a Subject and the options that returns what it found and writes it under --out; METRICS names
them for the command line.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config import Checkpoint as CheckpointConfig
from finetune.config import Validation
from finetune.config_choices import conditions
from finetune.config_io import load_text
from finetune.errors import ConfigError, DataError
from finetune.seeding import PositionRandom, permutation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finetune.batching import Batch
    from finetune.checkpoint import Checkpoint
    from finetune.conditioning import Conditioner
    from finetune.config import TrainConfig
    from finetune.data import TrainData
    from finetune.models import UNet
    from finetune.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained UNet, the parts it was trained with, and the data that it is measured on. Float32, no dropout."""

    cfg: TrainConfig
    unet: UNet
    conditioner: Conditioner
    objective: Objective
    data: TrainData
    facts: dict[str, Any]
    """What was measured, for the report: step, weights, data; JSON's types only."""
    device: torch.device

    def batches(self, *, num_samples: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """`num_samples` rows, drawn by the seed without repetition, as they are in epoch 0.

        The position of a sample is its row, so that what is drawn for it depends on nothing else but the seed.
        """
        from finetune.batching import collate
        from finetune.samples import report_replaced

        told: set[int] = set()
        rows = self.data.rows[permutation(seed, "evaluate", 0, len(self.data))[:num_samples]]
        for start in range(0, len(rows), batch_size):
            part = [int(row) for row in rows[start : start + batch_size]]
            samples = self.data.samples(part, [0] * len(part))
            batch = collate([((row, 0, row), sample) for row, sample in zip(part, samples, strict=True)])
            report_replaced(batch.replaced, told)
            yield batch

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """The condition of each sample, as in training but for its dropout."""
        return self.conditioner.of(batch)


def load_subject(
    run: Path, *, average: str | None = None, data: str | None = None, split: str | None = None
) -> Subject:
    """The model of a run's newest checkpoint, or of the checkpoint that `run` is, on its data or others.

    average: "ema", the first average; "weights", those of the last step; or the name of an average in the checkpoint,
    such as ema_0.999. Unset: ema if averages were kept. data: a path or Hub id of other data, prepared in the same way.
    Images are cropped at the centre and not mirrored. Raises ConfigError, DataError or CheckpointError.
    """
    import torch

    from finetune.conditioning import build_conditioner
    from finetune.data import open_data
    from finetune.ema import averaged_part
    from finetune.models import build_unet
    from finetune.modules import choose_trained
    from finetune.objective import build_objective, without_own_code
    from finetune.space import build_space

    found, folder = _checkpoint(run), _folder(run)
    cfg = _config(folder)
    measured = open_data(_on(cfg, data, split))
    trained = json.loads((folder / "run.json").read_text())
    classes = list(trained["data"].get("classes", ())) or None
    if "class_label" in conditions(cfg.conditioning) and measured.class_names != classes:
        raise ConfigError(
            f"the data have the classes {', '.join(measured.class_names or ())}, the model was trained on "
            f"{', '.join(classes or ())}: their numbers would mean something else"
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    space = build_space(cfg, device)
    conditioner = build_conditioner(cfg, classes, device, space=space)
    unet = build_unet(cfg, space, conditioner, seed=cfg.seed)
    choose_trained(cfg, unet, conditioner)
    part = averaged_part(cfg, average)
    _load_weights(cfg, found, part, unet, conditioner)
    facts = {
        "step": found.step,
        "weights": {"model": "of the last step", "optimizer": "the optimizer's average"}.get(part, part),
        "data": data or cfg.data.train_data_dir or cfg.data.dataset_name or cfg.data.dataset_config,
        "split": measured.rules.split,
        "data_fingerprint": measured.fingerprint,
        "is_training_data": measured.fingerprint == trained["data_fingerprint"],
    }
    return Subject(
        cfg=cfg,
        unet=unet.to(device).eval(),
        conditioner=conditioner,
        objective=build_objective(without_own_code(cfg.objective), clip_sample=cfg.space.kind == "pixel"),
        data=measured,
        facts=facts,
        device=device,
    )


def _folder(run: Path) -> Path:
    """The run itself, or the run that a checkpoint belongs to."""
    return run.resolve().parents[1] if (run / "manifest.json").is_file() else run


def _checkpoint(run: Path) -> Checkpoint:
    """The checkpoint to measure."""
    from finetune import checkpoint

    if (run / "manifest.json").is_file():
        return checkpoint.load(run, what="finetune evaluate")
    found = checkpoint.latest(run / "checkpoints", set_aside=False)  # it may be training
    if found is None:
        raise ConfigError(f"{run} has no checkpoint: give the output_dir of a run, or its checkpoints/step-...")
    return found


def _config(folder: Path) -> TrainConfig:
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run (a folder with config.yaml): give the output_dir of a run, or one of "
                          "its checkpoints")  # fmt: skip
    return load_text(path.read_text("utf-8"), name=str(path))


def _load_weights(cfg: TrainConfig, found: Checkpoint, part: str, unet: UNet, conditioner: Conditioner) -> None:
    """Give the modules the weights of a checkpoint, with the average `part` in the place of those that it is of."""
    from finetune.ema import by_module
    from finetune.lora import load_trained_state
    from finetune.modules import kept_modules
    from finetune.optimization import schedule_free_average

    kept = kept_modules(unet, conditioner)
    averages = {} if part == "model" else by_module(found.tensors(part))
    if part == "optimizer":
        moments, beta1 = averages, cfg.optimizer.adam_beta1
        averages = {name: schedule_free_average(found.tensors(name), moments.get(name, {}), beta1) for name in kept}
    for name, module in kept.items():  # what was not trained is in no average
        load_trained_state(module, found.tensors(name) | averages.get(name, {}))
        module.requires_grad_(False)


def _on(cfg: TrainConfig, data: str | None, split: str | None) -> TrainConfig:
    """The config with the data that are measured on, prepared without chance."""
    rules = replace(cfg.data, center_crop=True, random_flip=False, variants=None, split=split or cfg.data.split)
    if data is not None:
        rules = replace(rules, dataset_name=data, train_data_dir=None, dataset_config=None, dataset_config_name=None,
                        revision=None,
                        split=split or "train", max_train_samples=None, streaming=False,
                        shuffle_buffer_size=None, mask_column=None, alpha_mask=False, unmasked_weight=0.0)  # fmt: skip
    if rules.dataset_name is None and rules.train_data_dir is None and rules.dataset_config is None:
        raise ConfigError("the run's data were passed from Python: name the data to measure on with --data")
    # Of other data every row counts, and there is nothing that the loss of held-out ones could choose.
    everything = {"validation": Validation(), "checkpoint": CheckpointConfig()} if data or split else {}
    return replace(cfg, data=rules, **everything)


# ---------------------------------------------------------------------------------------------- bits per dimension


def check_bpd(cfg: TrainConfig) -> None:
    """Raises ConfigError for a model whose bits per dimension are not defined."""
    if cfg.space.kind != "pixel":
        raise ConfigError("--metrics bpd: bits per dimension are those of 8-bit pixels, and this model draws latents")
    if cfg.objective.kind != "ddpm":
        raise ConfigError(
            f"--metrics bpd: bits per dimension are computed for objective.kind ddpm, whose steps have a likelihood; "
            f"this model was trained with {cfg.objective.kind}"
        )


def bits(subject: Subject, batches: Iterator[Batch], *, seed: int, clip_denoised: bool, bar: Any) -> dict[str, Tensor]:
    """improved-diffusion's variational bound of all samples, float64 on the CPU.

    `total` and `prior` [N]; `vb`, `x0_mse` and `noise_mse` [N, T] from level 0 up; everything but the errors in bits
    per dimension. The noise of a sample at a level is a function of (seed, row, level). Raises DataError for images
    that are not 8-bit pixels.
    """
    import torch

    from finetune.models import bind
    from finetune.objective.likelihood import bits_per_dim, check_8_bit

    levels = len(subject.objective.process.alpha)
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        random = PositionRandom(seed, batch.positions, subject.device)
        x0 = batch.pixel_values.to(subject.device)
        _each_8_bit(batch, check_8_bit)

        def noises(random=random, shape=x0.shape) -> Iterator[Tensor]:
            for level in reversed(range(levels)):
                yield random.normal(f"bpd noise {level}", shape[1:])
                bar.update(shape[0])

        network = bind(subject.unet, subject.condition(batch))
        result = bits_per_dim(subject.objective, network, x0, noises(), clip_denoised=clip_denoised)
        found.append({name: value.double().cpu() for name, value in result.items()})
    joined = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    return {name: value.flip(1) if value.ndim == 2 else value for name, value in joined.items()}


def _each_8_bit(batch: Batch, check: Any) -> None:
    for row, image in zip(batch.rows.tolist(), batch.pixel_values, strict=True):
        try:
            check(image)
        except ValueError:
            raise DataError(
                f"row {row} is no 8-bit image (it has more than 8 bits, and is scaled in floating point): bits per "
                "dimension are defined for 8-bit pixels only; convert the data, or measure on others with --data"
            ) from None


def bpd(subject: Subject, args: argparse.Namespace) -> None:
    """Bits per dimension -> bpd.json (totals), bpd.csv (by level) and bpd.png; prints the total."""
    from tqdm.auto import tqdm

    from finetune.plots import draw_levels

    n = min(args.num_samples, len(subject.data))
    levels = len(subject.objective.process.alpha)
    batches = subject.batches(num_samples=n, batch_size=args.batch_size, seed=args.seed)
    with tqdm(total=n * levels, desc="bits per dimension", unit="level") as bar:
        result = bits(subject, batches, seed=args.seed, clip_denoised=args.clip_denoised, bar=bar)
    vb = result["vb"]
    totals = {"total": result["total"], "prior": result["prior"], "vb": vb.sum(1), "vb_of_level_0": vb[:, 0]}
    report = {
        "unit": "bits per dimension",
        **{name: mean_and_error(values) for name, values in totals.items()},
        "images": n,
        "images_of_the_data": len(subject.data),
        "levels": levels,
        "seed": args.seed,
        "clip_denoised": args.clip_denoised,
        "crop": "centre, not mirrored",
        **subject.facts,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bpd.json").write_text(json.dumps(report, indent=1) + "\n")
    columns = {name: result[name] for name in ("vb", "x0_mse", "noise_mse")}
    write_levels(columns, subject.objective.process.time, args.out / "bpd.csv")
    draw_levels(columns, args.out / "bpd.png")
    total, error = report["total"]["mean"], report["total"]["standard_error"]
    print(f"bits per dimension: {total:.4f}" + ("" if error is None else f" ± {error:.4f}") + f" of {n} images, step "
          f"{report['step']}, {report['weights']}\n{args.out / 'bpd.json'}")  # fmt: skip


def mean_and_error(values: Tensor) -> dict[str, float | None]:
    """values [N] -> their mean, and its standard error (None of a single value)."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}


def write_levels(columns: dict[str, Tensor], timesteps: Tensor, path: Path) -> None:
    """Columns [N, T] -> a CSV file of one line per level, from the least noise up: means and standard errors.

    timesteps: [T], what the network is given at each level.
    """
    names = [f"{name}{end}" for name in columns for end in ("", "_standard_error")]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["level", "timestep", *names])
        for level, timestep in enumerate(timesteps.tolist()):
            pairs = [mean_and_error(column[:, level]).values() for column in columns.values()]
            writer.writerow([level, timestep, *(value for pair in pairs for value in pair)])


# ------------------------------------------------------------------------------------------------ the command

METRICS = {"bpd": (check_bpd, bpd)}
"""For each metric: what refuses a config that it is not defined for, and what measures and reports it."""


def evaluate_main(argv: list[str] | None = None) -> None:
    """The command `finetune evaluate`. Raises ConfigError for what cannot be measured, most before torch is loaded."""
    args = _arguments(argv)
    folder = _folder(args.run)
    cfg = _config(folder)
    for metric in args.metrics:
        METRICS[metric][0](cfg)
    args.out = args.out or folder / "evaluation"
    subject = load_subject(args.run, average=args.average, data=args.data, split=args.split)
    for metric in args.metrics:
        METRICS[metric][1](subject, args)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("finetune evaluate", description="Measure a run on data, in one process.")
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, required=True, help="what to measure")
    parser.add_argument("--data", help="other data: a path or Hub id; default: those of the run")
    parser.add_argument("--split", help="default: that of the run, or train of other data")
    parser.add_argument("--average", help="ema, weights, or a name such as ema_0.999; default: ema if there is one")
    parser.add_argument("--num_samples", type=int, default=1000, help="images, drawn by the seed; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=16, help="images at a time; changes no noise")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and of the noise")
    parser.add_argument(
        "--clip_denoised", action=argparse.BooleanOptionalAction, default=True, help="clamp the predicted x0 to [-1, 1]"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/evaluation")
    args = parser.parse_args(argv)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.seed < 0:
        raise ConfigError(f"--seed must be at least 0, got {args.seed}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("finetune evaluate works in one process: start it without accelerate launch")
    return args

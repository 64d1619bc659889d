"""Averages of any width after the training, from snapshots of a few (Karras et al. 2024, section 3.2), `finetune ema`.

An average by a power function is the integral of the weights over training time times its profile
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), 0 <= tau <= t. The profile of another width or step is approached by a
weighted sum of those that are stored, by least squares; the same sum of the stored weights is then nearly its average.
Imports no torch until the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.config_io import load_text
from finetune.errors import ConfigError, FinetuneError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from finetune.checkpoint import Checkpoint
    from finetune.config import TrainConfig

WIDEST = 12**-0.5  # all steps count alike
MOST_RESIDUAL = 0.05  # of the profile; a fit that misses more of it is refused
Average = tuple[float, int]
"""A relative width, and the step at which the average was taken."""


def fit(stored: Sequence[Average], wanted: Average) -> tuple[np.ndarray, float]:
    """Coefficients [n] of the stored averages whose sum is nearest to the wanted one, and what that misses.

    Float64 least squares between the profiles, which are scaled to norm 1 before it (Karras et al. 2024, section 3.2).
    The coefficients sum to 1, which the paper does not demand: where the stored profiles fit badly, all weights would
    else be scaled by a few per cent. The residual is the norm of the difference of the profiles over that of the
    wanted one.
    """
    if wanted in stored:
        return np.array([float(average == wanted) for average in stored]), 0.0
    from finetune.ema import gamma_of

    gammas, steps = np.array([(gamma_of(width), step) for width, step in (*stored, wanted)]).T
    products = inner_product(gammas[:, None], steps[:, None], gammas, steps)
    norms = np.sqrt(np.diag(products))
    products /= np.outer(norms, norms)
    gram, right, sums = products[:-1, :-1], products[:-1, -1], norms[-1] / norms[:-1]
    system = np.block([[gram, sums[:, None]], [sums, np.zeros(1)]])  # the last unknown is the multiplier of the sum
    x = np.linalg.lstsq(system, np.append(right, 1), rcond=1e-13)[0][:-1]
    return x * sums, float(np.sqrt(max(0.0, 1 - 2 * x @ right + x @ gram @ x)))


def inner_product(gamma: np.ndarray, t: np.ndarray, other_gamma: np.ndarray, other_t: np.ndarray) -> np.ndarray:
    """Integral of the product of two profiles (Karras et al. 2024, appendix C), float64, broadcast."""
    common = np.minimum(t, other_t)
    powers = (gamma + 1) * np.log(common / t) + (other_gamma + 1) * np.log(common / other_t)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * np.exp(powers) / common


def within_reach(stored: Sequence[Average], step: int) -> str:
    """The relative widths whose average at `step` the stored ones give, in words."""
    grid = np.geomspace(0.005, WIDEST, 150)
    good = [width for width in grid if fit(stored, (float(width), step))[1] <= MOST_RESIDUAL]
    runs: list[list[float]] = []
    for width in good:
        if runs and width <= 1.04 * runs[-1][-1]:
            runs[-1].append(width)
        else:
            runs.append([width])
    return ", ".join(f"{run[0]:.3f} to {run[-1]:.3f}" for run in runs) or "none"


def reconstruct(snapshots: Sequence[Checkpoint], wanted: Average) -> tuple[dict[str, Tensor], float]:
    """The weights of the wanted average, float32 on the CPU, and the residual of its profile.

    Of the snapshots those up to the wanted step are used, so that an average does not change while the run goes on.
    Raises ConfigError for a step of which there is no snapshot, or a width that they do not reach.
    """
    from finetune.ema import part_of

    width, step = wanted
    if step not in (steps := [snapshot.step for snapshot in snapshots]):
        raise ConfigError(f"--step {step}: there is no snapshot of it, only of {', '.join(map(str, steps))}")
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    stored = [(stored_width, snapshot.step) for snapshot in used for stored_width in snapshot.state["relative_widths"]]
    coefficients, residual = fit(stored, wanted)
    if residual > MOST_RESIDUAL:
        raise ConfigError(
            f"--relative_width {width:g} at step {step} is out of reach of the {len(used)} snapshots up to it: what "
            f"comes nearest misses {residual:.1%} of its profile, more than {MOST_RESIDUAL:.0%}. In reach: "
            f"{within_reach(stored, step)}. More snapshots (a smaller ema.snapshot_every) or widths reach further."
        )
    total: dict[str, Tensor] = {}
    by_step = {snapshot.step: snapshot for snapshot in used}
    for (stored_width, at), coefficient in zip(stored, coefficients, strict=True):
        if coefficient == 0:
            continue
        for name, tensor in by_step[at].tensors(part_of(stored_width)).items():
            part = tensor.double().mul_(coefficient)
            total[name] = total[name].add_(part) if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}, residual


def ema_main(argv: list[str] | None = None) -> None:
    """The command `finetune ema`. Raises ConfigError for arguments that cannot work, most before torch is loaded."""
    args = _arguments(argv)
    cfg = load_text((args.run / "config.yaml").read_text("utf-8"), name=str(args.run / "config.yaml"))
    if not cfg.ema.snapshot_every:
        raise ConfigError(f"{args.run} kept no snapshots: train with ema.relative_widths and ema.snapshot_every")

    from finetune import checkpoint

    root = args.run / "ema_snapshots"
    snapshots = [checkpoint.load(path, what="snapshot") for path in checkpoint.folders(root)]
    if not snapshots:
        raise ConfigError(f"{root} holds no snapshot yet: ema.snapshot_every is {cfg.ema.snapshot_every} steps")
    step = snapshots[-1].step if args.step is None else args.step
    weights, residual = reconstruct(snapshots, (args.relative_width, step))
    from finetune.export import without_loading_bars

    with without_loading_bars():
        _export(_with_weights(args.run, weights), args, cfg, step=step, residual=residual)
    print(
        f"relative width {args.relative_width:g} at step {step}, from snapshots at "
        f"{sum(snapshot.step <= step for snapshot in snapshots)} steps; residual of the profile {residual:.2%}\n"
        f"pipeline: {args.out}"
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "finetune ema",
        description="Make an average of another width of a finished run that kept snapshots (ema.snapshot_every).",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's output_dir")
    parser.add_argument(
        "--relative_width", type=float, required=True, help=f"of the steps done, above 0, at most {WIDEST:.4f}"
    )
    parser.add_argument("--step", type=int, help="step of a snapshot to take the average at; default: the last")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder: the pipeline")
    args = parser.parse_args(argv)
    if not 0 < args.relative_width <= WIDEST:
        raise ConfigError(f"--relative_width must be above 0 and at most {WIDEST:.4f}, got {args.relative_width}")
    if args.out.exists():
        raise ConfigError(f"--out {args.out} exists: name a new folder")
    if not (args.run / "config.yaml").is_file():
        raise ConfigError(f"{args.run} is no run (a folder with config.yaml): give the output_dir of a finished run")
    if not (args.run / "pipeline" / "model_index.json").is_file():
        raise ConfigError(f"{args.run} is not finished: its training command, given again, goes on where it stopped")
    return args


def _with_weights(run: Path, weights: dict[str, Tensor]) -> DiffusionPipeline:
    """The run's exported pipeline with these weights in its UNet and, where it was trained, its text encoder."""
    from finetune.ema import by_module
    from finetune.pretrained import own_memory
    from finetune.sample import load_pipeline

    pipeline = load_pipeline(str(run))
    for part in pipeline.components.values():
        own_memory(part)
    # Parameters that were not trained are in no average, and stay.
    for name, tensors in by_module(weights).items():
        module = pipeline.unet if name == "model" else getattr(pipeline, name)
        if unknown := module.load_state_dict(tensors, strict=False).unexpected_keys:
            raise FinetuneError(f"{run}: the snapshots hold {unknown[0]}, which pipeline/ does not have")
    return pipeline


def _export(
    pipeline: DiffusionPipeline, args: argparse.Namespace, cfg: TrainConfig, *, step: int, residual: float
) -> None:
    """Write the pipeline to args.out; its card and config.yaml are those of a run that had kept this average."""
    from finetune.export import export

    ema = replace(cfg.ema, ema_max_decay=(), relative_widths=(args.relative_width,), snapshot_every=None)
    facts = {"relative_width": args.relative_width, "step": step, "residual": residual}
    run = json.loads((args.run / "run.json").read_text()) | {"post_hoc_average": facts}
    work = args.out.with_name(f".{args.out.name}-tmp-{os.getpid()}")
    work.mkdir(parents=True)
    try:
        lines = (args.run / "metrics.jsonl").read_text().splitlines(keepends=True)
        metrics = work / "metrics.jsonl"
        metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        # No samples: those of the run were drawn with another average.
        folder = export(pipeline, output_dir=work, cfg=replace(cfg, ema=ema), run=run, samples=None, metrics=metrics)
        folder.rename(args.out)
    finally:
        shutil.rmtree(work)

"""The standard deviation of x0, which EDM is told as sigma_data: `finetune sigma_data`.

Imports no torch until the settings are known to be right.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.config_io import load
from finetune.errors import ConfigError
from finetune.foundation import resolve

if TYPE_CHECKING:
    import torch

    from finetune.config import TrainConfig
    from finetune.data import TrainData
    from finetune.space import Space


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of x0, of all values and of each channel."""

    mean: float
    std: float
    channel_means: list[float]
    channel_stds: list[float]
    samples: int


def spread(
    cfg: TrainConfig, data: TrainData, space: Space, *, num_samples: int, batch_size: int, device: torch.device | str
) -> Spread:
    """Of the first `num_samples` samples of the run that `cfg` describes (an epoch at most), as the network sees them.

    They come from the loader of the training with its crops and mirrors (squares, as long as `data` is in no buckets,
    which depend on the UNet); latents are samples of the VAE's posterior.
    Float64 sums; a channel's deviation is from its own mean, that of all values from the mean of all.
    """
    import torch
    from tqdm.auto import tqdm

    from finetune.batching import make_loader
    from finetune.seeding import PositionRandom

    n = min(num_samples, len(data))
    on_gpu = torch.device(device).type == "cuda"
    loader = make_loader(
        data, cfg, start=0, rank=0, world_size=1, accumulation=1, micro_batch=batch_size, pin_memory=on_gpu
    )
    sums = torch.zeros(2, space.channels, dtype=torch.float64)
    done = values = 0
    with tqdm(total=n, desc="x0", unit="image", leave=False) as bar:
        for batch in loader:
            x0 = space.encode(batch.pixel_values.to(device), PositionRandom(cfg.seed, batch.positions, device))
            x0 = x0[: n - done].double().cpu()
            sums += torch.stack([x0.sum((0, 2, 3)), x0.square().sum((0, 2, 3))])
            done, values = done + len(x0), values + x0[:, 0].numel()
            bar.update(len(x0))
            if done == n:
                break
    means, squares = sums / values
    mean, square = means.mean(), squares.mean()
    return Spread(
        mean=float(mean),
        std=float((square - mean**2).clamp(min=0).sqrt()),
        channel_means=means.tolist(),
        channel_stds=(squares - means**2).clamp(min=0).sqrt().tolist(),
        samples=n,
    )


def sigma_data_main(argv: list[str] | None = None) -> None:
    """The command `finetune sigma_data`: prints the spread and the line for the recipe. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        "finetune sigma_data",
        description="Measure the standard deviation of x0 (pixels or latents, as the network sees them) over the data "
        "of a recipe (--config FILE). All options of `finetune train` are taken too.",
        allow_abbrev=False,
    )
    parser.add_argument("--num_samples", type=int, default=1024, help="images; default: %(default)s, at most an epoch")
    parser.add_argument("--batch_size", type=int, default=16, help="images encoded at a time")
    args, words = parser.parse_known_args(argv)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("finetune sigma_data works in one process: start it without accelerate launch")
    cfg = resolve(load(words))

    import torch

    from finetune.data import open_data
    from finetune.space import build_space

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    data, space = open_data(cfg), build_space(cfg, device)
    found = spread(cfg, data, space, num_samples=args.num_samples, batch_size=args.batch_size, device=device)
    squares = " (the squares of data.resolution: data.buckets needs the UNet)" if cfg.data.buckets != "none" else ""
    print(f"x0 of {found.samples} images, {cfg.space.kind} space, {space.channels}x{space.size}x{space.size}{squares}")
    print(f"  all values  mean {found.mean:8.4f}  std {found.std:.4f}")
    for channel, (mean, std) in enumerate(zip(found.channel_means, found.channel_stds, strict=True)):
        print(f"  channel {channel:<3} mean {mean:8.4f}  std {std:.4f}")
    now = f"  # now {cfg.objective.sigma_data:g}" if cfg.objective.kind == "edm" else ""
    print(f"objective: {{kind: edm, sigma_data: {found.std:.4f}}}{now}")

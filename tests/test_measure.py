"""sigma_data is the spread of what the network sees."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.batching import make_loader
from finetune.cli import main
from finetune.config_io import dump
from finetune.data import open_data
from finetune.measure import spread
from finetune.seeding import PositionRandom
from finetune.space import build_space
from tiny import config
from tiny_models import make_parts

torch.set_num_threads(1)


def images(n: int, side: int = 8) -> datasets.Dataset:
    """Pixels of three channels with the means -0.2, 0, 0.2 and the standard deviations 0.1, 0.2, 0.3 in [-1, 1]."""
    noise = np.random.RandomState(0).uniform(-(3**0.5), 3**0.5, size=(n, side, side, 3))
    x0 = noise * [0.1, 0.2, 0.3] + [-0.2, 0.0, 0.2]
    pixels = np.round((x0 + 1) * 127.5).clip(0, 255).astype(np.uint8)
    return datasets.Dataset.from_dict({"image": [Image.fromarray(p) for p in pixels]})


def test_known_spread(tmp_path):
    cfg = config(tmp_path, conditioning={"kind": "none"}, data={"dataset_name": None, "max_train_samples": None})
    data, space = open_data(cfg, dataset=images(400)), build_space(cfg)
    found = spread(cfg, data, space, num_samples=1000, batch_size=64, device="cpu")
    assert found.samples == 400, "an epoch at most"
    assert found.channel_means == pytest.approx([-0.2, 0, 0.2], abs=5e-3)
    assert found.channel_stds == pytest.approx([0.1, 0.2, 0.3], rel=0.01)
    # Of the mixture: the mean of the variances, and the variance of the means.
    assert found.std == pytest.approx((0.14 / 3 + 0.08 / 3) ** 0.5, rel=0.01)
    assert abs(found.std - np.mean(found.channel_stds)) > 0.05, "negative control"
    few = spread(cfg, data, space, num_samples=5, batch_size=64, device="cpu")
    again = spread(cfg, data, space, num_samples=5, batch_size=2, device="cpu")
    assert few.samples == again.samples == 5 and few.std == pytest.approx(again.std) != pytest.approx(found.std)


def test_latents_are_those_that_training_noises(tmp_path):
    """The spread of the samples of the VAE's posterior that the first steps of the run draw."""
    parts = make_parts(tmp_path / "parts")
    cfg = config(tmp_path, space={"kind": "latent", "vae": str(parts / "vae")}, data={"resolution": 16})
    data, space = open_data(cfg), build_space(cfg)
    loader = make_loader(
        data, cfg, start=0, rank=0, world_size=1, accumulation=1, micro_batch=20, pin_memory=False
    )
    batch = next(iter(loader))
    x0 = space.encode(batch.pixel_values, PositionRandom(cfg.seed, batch.positions)).double()
    found = spread(cfg, data, space, num_samples=20, batch_size=8, device="cpu")
    assert found.std == pytest.approx(float(x0.std(correction=0)), rel=1e-5)
    assert found.channel_stds == pytest.approx(x0.std((0, 2, 3), correction=0).tolist(), rel=1e-5)
    means = space.encode(batch.pixel_values).double()
    assert abs(found.std - float(means.std(correction=0))) > 1e-3, "negative control: the posterior's mean"


def test_command(tmp_path, capsys):
    cfg = config(tmp_path / "run", objective={"kind": "edm", "sigma_data": 1.0})
    (tmp_path / "recipe.yaml").write_text(dump(cfg))
    assert main(["sigma_data", "--config", str(tmp_path / "recipe.yaml"), "--num_samples", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "x0 of 12 images, pixel space, 3x8x8" and len(lines) == 6
    std = lines[1].split("std ")[1]
    assert lines[-1] == f"objective: {{kind: edm, sigma_data: {std}}}  # now 1"
    assert 0.1 < float(std) < 1 and not Path(cfg.output_dir).exists()
    assert main(["sigma_data", "--config", str(tmp_path / "recipe.yaml"), "--num_samples", "0"]) == 2
    assert main(["sigma_data", "--config", str(tmp_path / "recipe.yaml"), "--learning_rat", "1"]) == 2
    assert "did you mean --learning_rate?" in capsys.readouterr().err

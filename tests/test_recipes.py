"""The recipes: each loads, and those of published models have their numbers of parameters."""

from pathlib import Path

import pytest
import torch

from finetune.conditioning import build_conditioner
from finetune.config_io import load
from finetune.models import build_unet
from finetune.space import PixelSpace

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "train"


def recipe(name, *options):
    """The configuration of a recipe."""
    return load(["--config", str(RECIPES / f"{name}.yaml"), *options], env={})


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_each_loads_and_opens_with_its_command_and_what_is_known_of_it(file):
    cfg = recipe(file.stem)
    head = file.read_text().partition("output_dir:")[0]
    assert f"--config configs/train/{file.name}" in head
    assert all(f"# {word}:" in head for word in ("time", "memory", "score"))
    assert file.stem.startswith("digits") or "# Source: " in head
    assert Path(cfg.output_dir).name == file.stem or file.stem == "butterflies"


def parameters(name, *options):
    """Number of parameters of the UNet that a recipe in pixel space makes; no memory is taken."""
    cfg = recipe(name, *options)
    space = PixelSpace(channels=cfg.data.channels, size=cfg.data.resolution)
    with torch.device("meta"):
        unet = build_unet(cfg, space, build_conditioner(cfg), seed=0)
    return sum(p.numel() for p in unet.parameters())


NO_CLASS = 4 * 192  # the embedding that stands for "no class", which the published models do not have


def test_the_unets_of_improved_diffusion_have_its_numbers_of_parameters():
    assert parameters("iddpm_imagenet64_class") == 273_049_350 + NO_CLASS
    assert parameters("iddpm_imagenet64_class", "--model.layers_per_block", "2") != 273_049_350 + NO_CLASS
    unconditional = ("--conditioning.kind", "none", "--model.block_out_channels", "[128, 256, 384, 512]")
    assert parameters("iddpm_imagenet64_class", *unconditional) == 121_063_942  # its ImageNet-64 model without classes

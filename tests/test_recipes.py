"""The recipes: each loads, those of published models have their numbers of parameters, and those of Stable Diffusion
train tiny pipelines of the same layout."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny_pipelines
from finetune import lora_proof
from finetune.conditioning import build_conditioner
from finetune.config_choices import conditions
from finetune.config_io import load
from finetune.foundation import resolve
from finetune.models import build_unet
from finetune.run import train
from finetune.space import PixelSpace
from finetune.trainer import Trainer
from forked import log, prove_in_a_fork, run, whole

pretrained = tiny_pipelines.pretrained

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "train"
CARD = re.compile(r"^# \d+ GB: +(--[^\\\n]*(?:\\\n#[^\\\n]*)*)", re.M)


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


STABLE = {  # recipe of Stable Diffusion: the layout it is for, and what of the pipeline it trains
    "sd15_full": ("sd15", "StableDiffusionPipeline"),
    "sd15_lora": ("sd15", "lora"),
    "sd21_v_lora": ("sd21", "lora"),
    "sdxl_lora": ("sdxl", "lora"),
    "sdxl_full": ("sdxl", "StableDiffusionXLPipeline"),
    "sd15_dreambooth_lora": ("sd15", "lora"),
    "sd15_inpaint": ("sd15", "StableDiffusionInpaintPipeline"),
}
WHOLE = ("sd15_full", "sdxl_lora", "sdxl_full", "sd15_inpaint")  # up to the export


@pytest.fixture(scope="session")
def my_images(tmp_path_factory):
    """A folder of wide, tall and square images of noise with captions."""
    folder = tmp_path_factory.mktemp("my_images")
    for i in range(12):
        size = ((130, 160), (70, 250), (128, 128))[i % 3]
        noise = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a red {i}")
    return folder


def small(name, pipeline, images, folder, *, halved=False):
    """The recipe as it is, but for a tiny pipeline, 2 steps, pictures of 128 pixels and, unless halved, float32."""
    words = f"""--pretrained_model_name_or_path {pipeline} --train_data_dir {images} --resolution 128 --report_to none
        --max_train_steps 2 --dataloader_num_workers 0 --sample.num_inference_steps 2 --num_images 2 --log_every 1
        --output_dir {folder / "run"}""".split()
    plain = recipe(name)
    words += [] if halved else ["--mixed_precision", "no"]
    words += ["--lora.base_dtype", "float32"] if plain.lora and not halved else []
    words += ["--cache.folder", str(folder / "cache")] if plain.cache.text else []
    words += ["--validation.held_out", "0.3", "--max_images", "2"] if plain.validation.held_out else []
    if plain.prior:
        words += f"--class_data_dir {folder / 'class'} --num_class_images 2 --prior.num_inference_steps 2".split()
    return recipe(name, *words)


@pytest.mark.parametrize("name", STABLE)
def test_recipes_of_stable_diffusion_train(name, pretrained, my_images, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_proof, "_ask", prove_in_a_fork)
    kind, trained = STABLE[name]
    cfg = resolve(small(name, pretrained(kind), my_images, tmp_path))
    assert cfg.space.kind == "latent" and (cfg.lora is not None) == (trained == "lora")
    assert cfg.objective.prediction_type == ("v_prediction" if kind == "sd21" else "epsilon")
    read = {"text", "pooled_text", "size"} if kind == "sdxl" else {"text", "inpaint"} if "inpaint" in name else {"text"}
    assert set(conditions(cfg.conditioning)) == read
    if name in WHOLE:
        train(cfg)
        exported = tmp_path / "run" / "pipeline"
        if cfg.lora is None:
            assert json.loads((exported / "model_index.json").read_text())["_class_name"] == trained
        else:
            assert len(list(exported.glob("*.safetensors"))) == 1 + cfg.export.kohya
    else:
        Trainer(cfg).fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert any("validation_loss" in line for line in lines) == bool(cfg.validation.held_out)
    if cfg.prior:
        assert len(list((tmp_path / "class").iterdir())) == 2


def test_the_lora_of_a_12_gb_card_trains_in_the_precision_it_is_written_for(pretrained, my_images, tmp_path):
    cfg = small("sdxl_lora", pretrained("sdxl"), my_images, tmp_path, halved=True)
    assert (cfg.train.mixed_precision, cfg.lora.base_dtype) == ("bf16", "bfloat16")
    assert run(cfg, body=whole) == [0], log(cfg)
    assert list((tmp_path / "run" / "pipeline").glob("*.safetensors"))


def test_recipes_of_stable_diffusion_are_all_tested():
    named = {file.stem for file in RECIPES.glob("*.yaml") if recipe(file.stem).model.kind == "pretrained"}
    assert named - {"v_zero_snr", "digits_lora"} == set(STABLE)
    heads = {name: (RECIPES / f"{name}.yaml").read_text().partition("output_dir:")[0] for name in STABLE}
    assert all("# memory: estimated: " in head and "# verified: " in head for head in heads.values())
    assert all("data/my_images" in head for head in heads.values())


def test_what_a_recipe_says_to_fit_into_a_card_is_the_recipe_otherwise():
    found = [(file.stem, options) for file in RECIPES.glob("*.yaml") for options in CARD.findall(file.read_text())]
    assert "sd15_full" in dict(found)
    for name, options in found:
        plain, small = recipe(name), recipe(name, *options.replace("\\\n#", " ").split())
        # Another kind of optimizer begins with its own defaults, not with the recipe's numbers.
        for setting in ("learning_rate", "lr_scheduler", "lr_warmup_steps"):
            assert getattr(small.optimizer, setting) == getattr(plain.optimizer, setting), (name, setting)
        assert small.optimizer.kind != plain.optimizer.kind and not small.ema.use_ema

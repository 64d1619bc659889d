"""Models and data to measure with, made here: the layouts of the real ones, random weights, small enough for a CPU.

unet64      a UNet2DModel on pixels, 64x64, 15 M parameters, batches of 16: what train_unconditional.py trains
mini-sd     a StableDiffusionPipeline, 256x256, batches of 4: a UNet of 20 M parameters and the VAE of Stable Diffusion
            at an eighth of its width, sized so that encoding an image, reading its caption and training the UNet cost
            in about the proportion that they have in Stable Diffusion 1.5 at 512x512
mini-sdxl   a StableDiffusionXLPipeline likewise: two text encoders, the sizes among the conditions
Pictures are seeded, smooth and coloured, in a folder with metadata.jsonl.
"""

import json
import os
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune.config import TrainConfig
from finetune.config_io import load

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = {20: (128, 224, 224), 50: (160, 320, 384), 200: (320, 640, 768)}
"""Of UNets of about so many million parameters, for `sized`."""
WIDTH = 128  # of each text encoder
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SHAPE = {"block_out_channels": (32, 32, 64, 128, 128, 224)}
"""Of unet64, where it is not train_unconditional's own UNet."""
COLOURS = ("red", "green", "blue", "grey", "yellow", "purple")
THINGS = ("clouds", "hills", "water", "smoke", "glass", "marble")


@dataclass(frozen=True)
class Workload:
    """What a trainer is given: a model and a folder of images."""

    name: str
    model: Path
    """Folder of the pipeline; of unet64, of the UNet's config.json."""
    images: Path
    resolution: int
    batch: int

    @property
    def pretrained(self) -> bool:
        """Whether the model is a pipeline that is fine-tuned, on its latents."""
        return self.name != "unet64"


def make(name: str, root: Path) -> Workload:
    """Make one of WORKLOADS in the folder `root`, always the same."""
    workload = described(name, root)
    *_, count, build = WORKLOADS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build(workload.model)
    pictures(workload.images, count=count, size=workload.resolution)
    return workload


def described(name: str, root: Path) -> Workload:
    """The one that `make` made in `root`."""
    size, batch, *_ = WORKLOADS[name]
    return Workload(name, root / "model", root / "images", size, batch)


def pictures(folder: Path, *, count: int, size: int) -> None:
    """`count` PNG files of size x size pixels, and metadata.jsonl with their captions."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        random = np.random.RandomState(number)
        coarse = Image.fromarray(random.randint(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:05}.png")
        text = f"{random.choice(COLOURS)} {random.choice(THINGS)} over {random.choice(COLOURS)} {random.choice(THINGS)}"
        lines.append(json.dumps({"file_name": f"{number:05}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def unet64(folder: Path) -> None:
    """The UNet that train_unconditional.py builds, at a quarter of its width: 15 M parameters."""
    UNet2DModel(
        sample_size=64, layers_per_block=2, **SHAPE,
        down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    ).save_config(folder)  # fmt: skip


def mini_sd(folder: Path) -> None:
    """Stable Diffusion 1.5, narrower."""
    StableDiffusionPipeline(
        vae=vae(scaling_factor=0.18215),
        text_encoder=text_encoder(CLIPTextModel, act="quick_gelu"),
        tokenizer=tokenizer("<|endoftext|>"),
        unet=unet(block_out_channels=(32, 64, 192, 224), attention_head_dim=2, cross_attention_dim=WIDTH),
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def mini_sdxl(folder: Path) -> None:
    """Stable Diffusion XL base 1.0, narrower."""
    StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=text_encoder(CLIPTextModel, act="quick_gelu"),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, act="gelu"),
        tokenizer=tokenizer("<|endoftext|>"),
        tokenizer_2=tokenizer("!"),
        unet=unet(
            block_out_channels=(32, 64, 160),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 4),
            attention_head_dim=(1, 2, 4),
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=WIDTH + 6 * 256,
        ),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)


def vae(**settings) -> AutoencoderKL:
    """The VAE of Stable Diffusion at an eighth of its width: sides divided by 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        norm_num_groups=16,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
        **settings,
    )


def unet(**settings) -> UNet2DConditionModel:
    """A UNet2DConditionModel for the latents of 256x256 pixels."""
    return UNet2DConditionModel(sample_size=32, layers_per_block=2, norm_num_groups=16, **settings)


def tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's, by letters. pad: the end of text (CLIP), or "!" (OpenCLIP)."""
    letters = ["!", *(letter + end for letter in string.ascii_lowercase for end in ("", "</w>"))]
    vocab = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token=pad)


def text_encoder(kind: Callable, *, act: str, size: tuple[int, int, int] = (WIDTH, 6, 4)) -> torch.nn.Module:
    """A CLIP text encoder. kind: the class, with or without a projection. size: width, layers, heads."""
    vocab, (width, layers, heads) = tokenizer("!").get_vocab(), size
    return kind(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=77,
            hidden_act=act,
            projection_dim=width,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=vocab["<|endoftext|>"],
            pad_token_id=0,
        )
    )


WORKLOADS: dict[str, tuple[int, int, int, Callable[[Path], None]]] = {
    "unet64": (64, 16, 1024, unet64),
    "mini-sd": (256, 4, 64, mini_sd),
    "mini-sdxl": (256, 4, 64, mini_sdxl),
}
"""By name: side of the images in pixels, images per step, images in all, and what saves the model."""


def digits(folder: Path, *extra: str) -> TrainConfig:
    """The digits recipe in a folder of its own, without pictures and loader processes."""
    os.chdir(ROOT)
    quiet = ["--sample.sample_every", "null", "--dataloader_num_workers", "0"]
    return load(["--config", "configs/train/digits.yaml", "--output_dir", str(folder), *quiet, *extra])


def sized(folder: Path, millions: int, *extra: str) -> TrainConfig:
    """A UNet2DModel of about `millions` million parameters on the pixels of the digits, 32x32, four images a step."""
    model = [
        "--model.kind", "unet2d", "--model.block_out_channels", *map(str, CHANNELS[millions]), "--layers_per_block",
        "2", "--down_block_types", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "--up_block_types", "UpBlock2D",
        "AttnUpBlock2D", "UpBlock2D", "--space.kind", "pixel", "--conditioning.kind", "none", "--prompts=[]",
        "--train.global_batch_size", "4", "--guidance_scale", "1",
    ]  # fmt: skip
    return digits(folder, *model, *extra)

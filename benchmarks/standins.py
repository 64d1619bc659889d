"""Stable Diffusion 1.5 and XL in their full size, with random weights, as folders like the real ones; and pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import shapes
from workloads import text_encoder, tokenizer

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TINY: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32},
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": (1, 2, 2),
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": 64,
        "projection_class_embeddings_input_dim": 32 + 6 * 256,
    },
    "ddpm": {"sample_size": 32, "block_out_channels": (32, 32, 32, 32, 64, 64)},
}
"""What makes each of shapes.UNETS small enough for a CPU."""


def pipeline(name: str, folder: Path, *, tiny: bool) -> Path:
    """Save the pipeline `name`, sd15 or sdxl, into `folder`; tiny: with a UNet of TINY and like others."""
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    with torch.random.fork_rng(), torch.device(device):  # a GPU draws 2.6 billion numbers in no time
        torch.manual_seed(0)
        parts = {"unet": shapes.unet(name, **(TINY[name] if tiny else {})), "vae": _vae(name, tiny)}
        if name == "sdxl":
            size = (32, 2, 2) if tiny else (1280, 32, 20)
            parts["text_encoder_2"] = text_encoder(CLIPTextModelWithProjection, act="quick_gelu", size=size)
        size = (32, 2, 2) if tiny else (768, 12, 12)
        parts["text_encoder"] = text_encoder(CLIPTextModel, act="quick_gelu", size=size)
    if name == "sdxl":
        tokenizers = {"tokenizer": tokenizer("<|endoftext|>"), "tokenizer_2": tokenizer("!")}
        made = StableDiffusionXLPipeline(
            **parts, **tokenizers, scheduler=EulerDiscreteScheduler(**NOISE, steps_offset=1), add_watermarker=False
        )
    else:
        made = StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizer("<|endoftext|>"),
            scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    made.save_pretrained(folder)
    return folder


def _vae(name: str, tiny: bool) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4 if tiny else (128, 256, 512, 512),
        layers_per_block=1 if tiny else 2,
        latent_channels=4,
        scaling_factor=0.13025 if name == "sdxl" else 0.18215,
        force_upcast=name == "sdxl",
    )


def pictures(folder: Path, *, count: int, different: int, side: int) -> Path:
    """`count` JPEG files of side x side pixels, of which so many differ and the rest are links, with captions."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        file = folder / f"{number:05}.jpg"
        if number < different:
            coarse = Image.fromarray(np.random.RandomState(number).randint(0, 256, (8, 8, 3), np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(file)
        else:
            os.link(folder / f"{number % different:05}.jpg", file)
        lines.append(json.dumps({"file_name": file.name, "text": f"picture of kind {number % different}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder

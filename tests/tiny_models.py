"""Tiny frozen parts and configs: a VAE of factor 4, a CLIP text encoder with its tokenizer, UNets of a few thousand
parameters, in every combination of space, conditioning and model that makes sense."""

import string
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from pydantic import TypeAdapter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetune.batching import Batch
from finetune.conditioning import build_conditioner
from finetune.config import TrainConfig
from finetune.models import build_unet
from finetune.seeding import PositionRandom
from finetune.space import build_space

torch.set_num_threads(1)

PROMPTS = ("a red three", "a blue seven")
NAMES = ["zero", "one", "two"]
WIDTH, LENGTH = 16, 12  # of the text encoder

UNET2D = {
    "kind": "unet2d",
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
CONDITION = {
    **UNET2D,
    "kind": "unet2d_condition",
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "attention_head_dim": 2,
}
CROSS = {
    **CONDITION,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
COMBINATIONS = [
    (space, conditioning, model)
    for space in ("pixel", "latent")
    for conditioning in ("none", "class_label", "pooled_text", "text")
    for model in ("unet2d", "unet2d_condition")
    if (conditioning, model) != ("text", "unet2d")
]


def make_parts(folder: Path) -> Path:
    """Save vae/, text_encoder/ and tokenizer/ with random weights into `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.7,
            mid_block_add_attention=False,
        ).save_pretrained(folder / "vae")
        letters = [c + end for c in string.ascii_lowercase for end in ("", "</w>")]
        vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
        tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)
        tokenizer.save_pretrained(folder / "tokenizer")
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocab),
                hidden_size=WIDTH,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=LENGTH,
                bos_token_id=len(vocab) - 2,
                eos_token_id=len(vocab) - 1,
                pad_token_id=len(vocab) - 1,
            )
        ).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """The folder of the tiny frozen parts."""
    return make_parts(tmp_path_factory.mktemp("parts"))


def config(parts: Path, space_kind="pixel", condition="none", model_kind="unet2d", **sections) -> TrainConfig:
    """A TrainConfig of this combination at 16x16 pixels; `sections` are merged over it."""
    text = {"text_encoder": str(parts / "text_encoder"), "tokenizer": str(parts / "tokenizer")}
    extra = {"class_label": {"num_classes": 3}, "pooled_text": text, "text": text}
    shape = UNET2D if model_kind == "unet2d" else CROSS if condition == "text" else CONDITION
    settings = {
        "output_dir": str(parts / "run"),
        "data": {"resolution": 16},
        "space": {"kind": "pixel"} if space_kind == "pixel" else {"kind": "latent", "vae": str(parts / "vae")},
        "conditioning": {"kind": condition, **extra.get(condition, {})},
        "model": shape,
        "sample": {"num_inference_steps": 5, "prompts": PROMPTS if "text" in condition else ()},
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return TypeAdapter(TrainConfig).validate_python(settings)


def build(cfg: TrainConfig):
    """(unet, space, conditioner) of a config."""
    space = build_space(cfg)
    conditioner = build_conditioner(cfg, NAMES if cfg.conditioning.kind == "class_label" else None)
    return build_unet(cfg, space, conditioner, seed=0).eval(), space, conditioner


def scheduler(**arguments) -> DDPMScheduler:
    """A training scheduler."""
    return DDPMScheduler(**arguments)


def batch(positions, captions=None, class_labels=None) -> Batch:
    """A batch of noise images at these positions of the run."""
    positions = torch.as_tensor(positions)
    pixels = PositionRandom(0, positions).normal("test pixels", (3, 16, 16)).clamp(-1, 1)
    labels = None if class_labels is None else torch.as_tensor(class_labels)
    return Batch(pixels=pixels, captions=captions, class_labels=labels, rows=positions, positions=positions)

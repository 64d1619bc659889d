"""The smallest work that starts whole: images, captions, a UNet's config, Stable Diffusion and XL of random weights.

Of a few thousand parameters, as the first step is to cost nothing beside the start.
"""

import json
import string
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

IMAGES, SIDE, WIDTH = 52, 64, 16


def make(folder: Path) -> None:
    """Write images/, unet/, sd/ and sdxl/ into `folder`."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(IMAGES):
        name = f"{number:03}.png"
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "images" / name)
        lines.append(json.dumps({"file_name": name, "text": f"picture number {number}"}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    UNet2DModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).save_config(folder / "unet")
    torch.manual_seed(0)
    _sd().save_pretrained(folder / "sd")
    _sdxl().save_pretrained(folder / "sdxl")


def _tokenizer() -> CLIPTokenizer:
    letters = [c + end for c in string.ascii_lowercase + string.digits for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token="<|endoftext|>")


def _text_encoder(cls: type = CLIPTextModel) -> torch.nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "projection_dim": WIDTH, "num_attention_heads": 2}
    end = len(_tokenizer()) - 1
    return cls(CLIPTextConfig(vocab_size=end + 1, num_hidden_layers=2, bos_token_id=end - 1, eos_token_id=end, **sizes))


def _frozen() -> dict[str, object]:
    """What both pipelines have beside the UNet."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIDE,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = DDIMScheduler(**noise, clip_sample=False)
    return {"vae": vae, "text_encoder": _text_encoder(), "tokenizer": _tokenizer(), "scheduler": scheduler}


def _unet(**settings: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        **settings,
    )


def _sd() -> StableDiffusionPipeline:
    unet, none = _unet(cross_attention_dim=WIDTH), {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(unet=unet, **_frozen(), **none, requires_safety_checker=False)


def _sdxl() -> StableDiffusionXLPipeline:
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=WIDTH + 6 * 256,
    )
    second = {"text_encoder_2": _text_encoder(CLIPTextModelWithProjection), "tokenizer_2": _tokenizer()}
    return StableDiffusionXLPipeline(unet=unet, **_frozen(), **second, add_watermarker=False)

"""Stable Diffusion 1.5, 2.1 (v-prediction) and XL with random weights of a few thousand parameters, in the folder
layout of the real ones: the same classes, block types, schedulers and odd settings of the configs, tiny widths."""

import functools
import string
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

KINDS = ("sd15", "sd21", "sdxl", "inpaint")
RESOLUTION = 64  # of all of them: latents of 8x8
WIDTH, SECOND_WIDTH, PROJECTION = 16, 24, 20  # of the text encoders, and of SDXL's pooled embedding
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def _tokenizer(pad: str) -> CLIPTokenizer:
    """By letters; the last id ends a text. pad: the end of text (CLIP), or "!" (OpenCLIP, whose id is 0)."""
    letters = ["!", *(c + end for c in string.ascii_lowercase + string.digits + "," for end in ("", "</w>"))]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token=pad)


def _text_encoder(cls: type, *, width: int, layers: int, act: str) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(_tokenizer("!").get_vocab()),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=act,
        projection_dim=PROJECTION,
        bos_token_id=0,
        eos_token_id=2,  # the real ones have these wrong numbers, and transformers a rule for them
        pad_token_id=1,
    )
    encoder = cls(config)
    for name, parameter in encoder.named_parameters():  # as they start, all texts are nearly the same to it
        if "layer_norm" not in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return encoder


def _vae(**settings) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=RESOLUTION,
        **settings,
    )


def _unet(**settings) -> UNet2DConditionModel:
    shape = {
        "sample_size": RESOLUTION // 8,
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
    }
    return UNet2DConditionModel(**shape | settings)


def _stable_diffusion(cls: type[DiffusionPipeline], *, in_channels: int = 4) -> DiffusionPipeline:
    """Like 1.5: CLIP's text encoder, PNDM, epsilon."""
    return cls(
        vae=_vae(scaling_factor=0.18215),
        text_encoder=_text_encoder(CLIPTextModel, width=WIDTH, layers=3, act="quick_gelu"),
        tokenizer=_tokenizer("<|endoftext|>"),
        unet=_unet(in_channels=in_channels),
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_2() -> StableDiffusionPipeline:
    """Like 2.1: OpenCLIP's text encoder without its last layer, DDIM, v-prediction."""
    return StableDiffusionPipeline(
        vae=_vae(scaling_factor=0.18215),
        text_encoder=_text_encoder(CLIPTextModel, width=WIDTH, layers=2, act="gelu"),
        tokenizer=_tokenizer("!"),
        unet=_unet(attention_head_dim=(1, 2, 4, 4), use_linear_projection=True),
        scheduler=DDIMScheduler(
            **NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Like XL base 1.0: both text encoders, the pooled text of the second, sizes; a VAE that overflows in float16."""
    unet = _unet(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=WIDTH + SECOND_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=PROJECTION + 6 * 256,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=_text_encoder(CLIPTextModel, width=WIDTH, layers=3, act="quick_gelu"),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, width=SECOND_WIDTH, layers=3, act="gelu"),
        tokenizer=_tokenizer("<|endoftext|>"),
        tokenizer_2=_tokenizer("!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


BUILDERS = {
    "sd15": functools.partial(_stable_diffusion, StableDiffusionPipeline),
    "sd21": _stable_diffusion_2,
    "sdxl": _stable_diffusion_xl,
    "inpaint": functools.partial(_stable_diffusion, StableDiffusionInpaintPipeline, in_channels=9),
}


def make_pipeline(folder: Path, kind: str) -> Path:
    """Save the pipeline `kind` of KINDS into `folder`, always the same weights; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(KINDS.index(kind))
        BUILDERS[kind]().save_pretrained(folder)
    # The real text encoders were saved when their weights had a prefix and a buffer that transformers 5 has not.
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    if not any(name.startswith("text_model.") for name in weights):
        weights = {f"text_model.{name}": tensor for name, tensor in weights.items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """pretrained("sdxl"): the folder of that pipeline, not to be written to."""
    root = tmp_path_factory.mktemp("pretrained")

    @functools.cache
    def folder(kind: str) -> Path:
        return make_pipeline(root / kind, kind)

    return folder

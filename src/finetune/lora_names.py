"""What sd-scripts calls the layers of a UNet and of its text encoders (kohya's names, networks/lora.py there).

SD 1.x and 2.x are trained there on diffusers' UNet, SDXL on the original one, whose blocks are numbered through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffusers import UNet2DConditionModel
from torch import nn

from finetune.errors import ConfigError

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def is_sdxl(unet: nn.Module) -> bool:
    """Whether it is a UNet of SDXL's kind: with a second text encoder's pooled state and the sizes of the image."""
    return isinstance(unet, UNet2DConditionModel) and unet.config.addition_embed_type == "text_time"


def check_kohya(unet: nn.Module) -> None:
    """Raises ConfigError if sd-scripts has no names for the layers of `unet`."""
    if not has_cross_attention(unet) or unet.config.encoder_hid_dim_type is not None:
        raise ConfigError(
            "export.kohya: sd-scripts names the layers of Stable Diffusion 1.x, 2.x and SDXL; this "
            f"{type(unet).__name__} is none of them: set export.kohya to false"
        )


def has_cross_attention(unet: nn.Module) -> bool:
    """Whether it is a UNet2DConditionModel that reads a sequence."""
    if not isinstance(unet, UNet2DConditionModel):
        return False
    blocks = (*unet.config.down_block_types, unet.config.mid_block_type, *unet.config.up_block_types)
    return any("CrossAttn" in block for block in blocks if block)


def layers_of(module: nn.Module) -> list[str]:
    """The names of the linear and convolutional layers, whether or not adapters stand around them."""
    kinds = (nn.Linear, nn.Conv2d)
    names = (name for name, layer in module.named_modules() if isinstance(layer, kinds) and ".lora_" not in name)
    return [name.removesuffix(".base_layer") for name in names]


def kohya_names(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """{"unet": {"mid_block.attentions.0.proj_in": "lora_unet_...", ...}, "text_encoder": ...}, of the modules given.

    Layers that have no name there are left out. Raises ConfigError for a UNet that is unknown there.
    """
    unet = modules["unet"]
    check_kohya(unet)
    sdxl = is_sdxl(unet)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if sdxl else "lora_te", "text_encoder_2": "lora_te2"}
    named: dict[str, dict[str, str]] = {}
    for part, module in modules.items():
        public = {
            layer: text_name(layer) if part != "unet" else original_name(layer, unet) if sdxl else layer
            for layer in layers_of(module)
        }
        named[part] = {k: f"{prefixes[part]}_{name.replace('.', '_')}" for k, name in public.items() if name}
    return named


def text_name(layer: str) -> str:
    """A layer of CLIP by the name in every file: since transformers 5 the CLIPTextModel has lost its `text_model.`."""
    return layer if layer.startswith(("text_model.", "text_projection")) else f"text_model.{layer}"


def original_name(layer: str, unet: UNet2DConditionModel) -> str | None:
    """A layer of diffusers' UNet by its name in the original UNet of generative-models: input_blocks.4.1.proj_in.

    A level of n residual layers is n + 1 numbers wide on either way: down, the last is the downsampler; up, each has a
    layer, and the upsampler stands in the last after it. None for a layer that the original has not.
    """
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    match, per_block = _BLOCK.fullmatch(layer), unet.config.layers_per_block
    if match is None or not isinstance(per_block, int):
        return None
    way, block, kind, index, inner = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        inner = _RESNET[inner]
    if way == "mid":
        return f"middle_block.{1 + 2 * index if kind == 'attentions' else 2 * index}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (per_block + 1)}.0.op"
    if kind == "upsamplers":
        after = 2 if "CrossAttn" in unet.config.up_block_types[block] else 1
        return f"output_blocks.{block * (per_block + 1) + per_block}.{after}.{inner}"
    number = block * (per_block + 1) + index + (way == "down")
    return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{inner}"

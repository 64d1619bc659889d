"""How the conditions enter a UNet, in diffusers' words, and whether a pretrained UNet fits space and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from finetune.conditioning import Conditioner, pooled_is_added
from finetune.conditions import ClassLabel, Single
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.space import Space

    UNet = UNet2DModel | UNet2DConditionModel

TIME_IDS = 6  # of SDXL: original height and width, top and left of the crop, target height and width
TIME_ID_WIDTH = 256  # of the embedding of each
Parts = Mapping[str, Single]


def class_embedding_for(parts: Parts) -> tuple[str, int] | None:
    """What class_labels are: ("index", number of embeddings, the last is "no class"), ("vector", width), or None."""
    if "class_label" in parts:
        return "index", parts["class_label"].num_classes + 1
    if "pooled_text" in parts and not pooled_is_added(parts):
        return "vector", parts["pooled_text"].width
    return None


def added_embedding_for(parts: Parts) -> int | None:
    """The width of text_embeds and embedded time_ids (addition_embed_type text_time), or None if there are none."""
    if not pooled_is_added(parts) and "size" not in parts:
        return None
    return (parts["pooled_text"].width if "pooled_text" in parts else 0) + TIME_IDS * TIME_ID_WIDTH


def further_channels(parts: Parts) -> int:
    """The channels that follow those of x_t."""
    return sum(parts[kind].channels for kind in ("low_res", "inpaint") if kind in parts)


def refuse_for_unet2d(parts: Parts) -> None:
    """Raise ConfigError for conditions that a UNet2DModel cannot take."""
    if {"class_label", "pooled_text"} <= parts.keys():
        raise ConfigError(
            "a UNet2DModel has one class embedding, for either class_label or pooled_text: remove one of them, or use "
            "model.kind unet2d_condition"
        )
    if "size" in parts:
        raise ConfigError("a UNet2DModel has no embedding of sizes: remove it, or use model.kind unet2d_condition")
    if "text" in parts:
        raise ConfigError("a UNet2DModel has no cross-attention to read a text with: use model.kind unet2d_condition")


def fix_classes(unet: UNet, label: ClassLabel, *, pretrained: bool = False) -> None:
    """Hold back what is not to be learned of the class embeddings: "no class" if it is zero, or all of them.

    Raises ConfigError if a pretrained UNet has learned another embedding for "no class" than the zero it is to be.
    """
    embedding = unet.class_embedding
    if label.null == "zero":
        if pretrained and embedding.weight[label.num_classes].any():
            raise ConfigError(
                "the pretrained UNet has learned an embedding for \"no class\", and conditioning.null is zero: use "
                "null index"
            )
        embedding.padding_idx = label.num_classes  # its gradient is zero, in every optimizer
        with torch.no_grad():
            embedding.weight[label.num_classes] = 0
    embedding.weight.requires_grad_(label.trainable)


def check_channels(unet: UNet, space: Space, parts: Parts, factor: int) -> None:
    """Raise ConfigError unless the channels of a pretrained UNet fit.

    One that lacks the channels of the small image or of inpainting gets them with weights of zero: at first it computes
    what it did.
    """
    extra = further_channels(parts)
    if extra and unet.config.in_channels == space.channels:
        _widen(unet, extra)
    if unet.config.in_channels != space.channels + extra:
        beside = f" and the conditions {extra} more" if extra else ""
        raise ConfigError(
            f"the pretrained UNet has in_channels {unet.config.in_channels}, x0 has {space.channels} channels{beside}: "
            "set space and data.channels to what it was trained on, and conditioning.kind to low_res if that is a "
            "model for super-resolution, to auto or several with inpaint if it is one for inpainting"
        )
    if unet.config.out_channels != space.channels * factor:
        raise ConfigError(
            f"the pretrained UNet has out_channels {unet.config.out_channels}, the objective needs "
            f"{space.channels * factor}: twice the channels of x0 go with objective.variance learned_range, as many "
            "with any other"
        )


def _widen(unet: UNet, extra: int) -> None:
    """Let conv_in read `extra` more channels, with weights of zero."""
    old = unet.conv_in
    new = torch.nn.Conv2d(
        old.in_channels + extra, old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=new.in_channels)


def check_conditions(unet: UNet, conditioner: Conditioner) -> None:
    """Raise ConfigError unless a pretrained UNet takes exactly these conditions."""
    config, where, parts = unet.config, "the pretrained UNet", conditioner.parts
    if isinstance(unet, UNet2DModel):
        refuse_for_unet2d(parts)
    for further in ("encoder_hid_dim", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if config.get(further) is not None:
            raise ConfigError(f"{where} has {further} {config[further]}, a condition that this version cannot give it")
    if config.time_embedding_type != "positional":
        raise ConfigError(f"{where} has time_embedding_type {config.time_embedding_type}, only positional is supported")
    added, wants = config.get("addition_embed_type"), added_embedding_for(parts)
    found = (config.projection_class_embeddings_input_dim, config.addition_time_embed_dim) if added else None
    if (added, found) != (("text_time", (wants, TIME_ID_WIDTH)) if wants else (None, None)):
        raise ConfigError(
            f"{where} has addition_embed_type {added} of input {found}, conditioning {conditioner.kind} needs "
            f"{f'text_time of input {(wants, TIME_ID_WIDTH)}' if wants else 'none'}: choose the conditioning that it "
            "was trained with"
        )
    has, needs = _class_embedding(unet), class_embedding_for(parts)
    if has != needs:
        raise ConfigError(
            f"{where} has {_in_words(has)}, conditioning.kind {conditioner.kind} needs {_in_words(needs)}: choose the "
            "conditioning (and num_classes or text encoder) that it was trained with"
        )
    crosses = isinstance(unet, UNet2DConditionModel) and any("attn2" in n for n, _ in unet.named_modules())
    if crosses != ("text" in parts):
        raise ConfigError(
            f"{where} {'has' if crosses else 'has no'} cross-attention, conditioning.kind is {conditioner.kind}: "
            f"{'use text' if crosses else 'use another kind'}"
        )
    if crosses:
        width = parts["text"].width
        widths = config.cross_attention_dim
        widths = {widths} if isinstance(widths, int) else set(widths)
        if widths != {width}:
            raise ConfigError(
                f"{where} reads text of width {', '.join(map(str, widths))} (cross_attention_dim), the text encoder's "
                f"is {width}: use the text encoder that it was trained with"
            )
    if "class_label" in parts:
        fix_classes(unet, parts["class_label"], pretrained=True)


def _class_embedding(unet: UNet) -> tuple[str, int] | None:
    """What class_labels must be: ("index", number of embeddings), ("vector", width), or None."""
    config = unet.config
    if config.class_embed_type is None:
        return None if config.num_class_embeds is None else ("index", config.num_class_embeds)
    if config.class_embed_type == "identity":
        return "vector", config.time_embedding_dim or config.block_out_channels[0] * 4
    if config.class_embed_type in ("projection", "simple_projection"):
        return "vector", config.projection_class_embeddings_input_dim
    return config.class_embed_type, 1


def _in_words(embedding: tuple[str, int] | None) -> str:
    if embedding is None:
        return "no class embedding"
    form, size = embedding
    words = {"index": f"{size} class embeddings (the last: no class)", "vector": f"a class vector of width {size}"}
    return words.get(form, f"a class embedding of type {form}")

"""The UNet: a new one, made to fit the space and the conditioning, or a pretrained one, checked against them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from finetune.conditioning import Condition, Conditioner
from finetune.config import TrainConfig
from finetune.errors import ConfigError
from finetune.pretrained import load_model_config, load_pretrained
from finetune.seeding import key
from finetune.space import Space

UNet = UNet2DModel | UNet2DConditionModel


def bind(unet: torch.nn.Module, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
    """The UNet (it may be wrapped for DDP) under a condition, as network(x_t [B, C, H, W], timestep) -> [B, C, H, W].

    A UNet2DConditionModel without cross-attention still asks for encoder_hidden_states: it gets None.
    """
    bare = unet if isinstance(unet, UNet) else extract_model_from_parallel(unet)
    if isinstance(bare, UNet2DConditionModel):
        condition = {"encoder_hidden_states": None, **condition}
    return lambda x_t, timestep: unet(x_t, timestep, **condition).sample


def build_unet(cfg: TrainConfig, space: Space, conditioner: Conditioner, *, seed: int) -> UNet:
    """The UNet that cfg.model names, float32 on the CPU, reading and writing x0 of `space` [B, channels, size, size].

    New weights are a function of `seed` alone; the global random state is left as it was. Raises ConfigError if the
    model cannot be built or loaded, or does not fit the space or the conditioning.
    """
    if cfg.model.kind == "pretrained":
        return _pretrained(cfg, space, conditioner)
    _check_blocks(cfg.model, conditioner)
    _check_side(len(cfg.model.block_out_channels), space)
    arguments = _condition_arguments(cfg.model, conditioner)
    cls = UNet2DModel if cfg.model.kind == "unet2d" else UNet2DConditionModel
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(seed, "weights"))
        try:
            return cls(
                sample_size=space.size,
                in_channels=space.channels,
                out_channels=space.channels,
                **_shape_arguments(cfg.model),
                **arguments,
            )
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"model: diffusers cannot build this {cls.__name__}: {error}") from error


def _shape_arguments(model: Any) -> dict[str, Any]:
    """The settings that both classes take by the same name, and those that one of them takes."""
    names = ["block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "attention_head_dim"]
    names += ["norm_num_groups", "resnet_time_scale_shift", "dropout"]
    names += ["add_attention"] if model.kind == "unet2d" else ["mid_block_type"]
    arguments = {name: getattr(model, name) for name in names}
    if model.kind == "unet2d" and model.resnet_time_scale_shift == "scale_shift":
        # Without it diffusers leaves the group norm of the middle attention out (Nichol & Dhariwal 2021 have it).
        arguments["attn_norm_num_groups"] = model.norm_num_groups
    return arguments


def _condition_arguments(model: Any, conditioner: Conditioner) -> dict[str, Any]:
    """How the condition enters a new UNet. The pooled text is added as it is to the time embedding of a UNet2DModel,
    which must then be as wide; a UNet2DConditionModel learns a projection of it.
    """
    arguments: dict[str, Any] = {}
    if model.kind == "unet2d":
        arguments["time_embedding_dim"] = model.time_embedding_dim
    if conditioner.kind == "class_label":
        arguments["num_class_embeds"] = conditioner.num_classes + 1  # the last one is "no class"
    elif conditioner.kind == "pooled_text" and model.kind == "unet2d":
        if model.time_embedding_dim not in (None, conditioner.width):
            raise ConfigError(
                f"model.time_embedding_dim must be the width of the pooled text, {conditioner.width}, which is added "
                f"to the time embedding, got {model.time_embedding_dim}: leave it unset"
            )
        arguments |= {"class_embed_type": "identity", "time_embedding_dim": conditioner.width}
    elif conditioner.kind == "pooled_text":
        arguments |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": conditioner.width}
    elif conditioner.kind == "text":
        arguments["cross_attention_dim"] = conditioner.width
    return arguments


def _check_blocks(model: Any, conditioner: Conditioner) -> None:
    levels = len(model.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        if len(blocks := getattr(model, name)) != levels:
            raise ConfigError(
                f"model.{name} must name one block per level: model.block_out_channels has {levels} levels, "
                f"{name} has {len(blocks)}: give {levels}"
            )
    for channels in model.block_out_channels:
        if channels % model.norm_num_groups:
            raise ConfigError(
                f"model.norm_num_groups must divide every model.block_out_channels, got {model.norm_num_groups} and "
                f"{channels}: use a common divisor"
            )
    up_channels = model.block_out_channels[::-1]
    attends = [c for c, b in zip(model.block_out_channels, model.down_block_types, strict=True) if "Attn" in b]
    attends += [c for c, b in zip(up_channels, model.up_block_types, strict=True) if "Attn" in b]
    for channels in {*attends, model.block_out_channels[-1]}:
        if model.attention_head_dim is not None and channels % model.attention_head_dim:
            raise ConfigError(
                f"model.attention_head_dim must divide the channels of every level with attention, got "
                f"{model.attention_head_dim} and {channels}: use a divisor of {channels}"
            )
    _check_attention(model, conditioner)


def _check_attention(model: Any, conditioner: Conditioner) -> None:
    """Cross-attention exists exactly if there is a text sequence to attend to."""
    middle = (model.mid_block_type,) if model.kind == "unet2d_condition" else ()
    crossing = [b for b in (*model.down_block_types, *middle, *model.up_block_types) if "CrossAttn" in b]
    if crossing and conditioner.kind != "text":
        raise ConfigError(
            f"model: {crossing[0]} reads a text sequence, but conditioning.kind is {conditioner.kind}: use blocks "
            "without CrossAttn (DownBlock2D, UpBlock2D, mid_block_type UNetMidBlock2D), or conditioning.kind text"
        )
    if conditioner.kind == "text" and not crossing:
        raise ConfigError(
            "conditioning.kind text needs cross-attention to read the text with, and the model has none: use "
            "model.kind unet2d_condition with CrossAttnDownBlock2D and CrossAttnUpBlock2D"
        )


def _check_side(levels: int, space: Space) -> None:
    step = 2 ** (levels - 1)
    if space.size % step:
        side = space.size * space.factor
        unit = step * space.factor
        below, above = side // unit * unit, -(-side // unit) * unit
        choices = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"a UNet of {levels} levels halves its input {levels - 1} times: data.resolution must be a multiple of "
            f"{unit} (x0 of {step}), got {side} (x0 of {space.size}): use {choices}, or fewer levels"
        )


def _pretrained(cfg: TrainConfig, space: Space, conditioner: Conditioner) -> UNet:
    model, setting = cfg.model, "model.pretrained_model_name_or_path"
    place = {"setting": setting, "revision": model.revision, "subfolder": model.subfolder}
    name = load_model_config(UNet2DModel, model.pretrained_model_name_or_path, **place).get("_class_name")
    classes = {cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel)}
    if name not in classes:
        raise ConfigError(
            f"{setting}: {model.pretrained_model_name_or_path} (model.subfolder {model.subfolder}) holds a {name}: "
            f"only {' and '.join(classes)} can be trained"
        )
    unet = load_pretrained(classes[name], model.pretrained_model_name_or_path, variant=model.variant, **place)
    _check_pretrained(unet, space, conditioner)
    _check_side(len(unet.config.block_out_channels), space)
    # The exported pipelines take the size of their images from here. The version is ours from now on: for UNets of
    # versions before 0.9, such as Stable Diffusion 1.x, StableDiffusionPipeline would put 64 over smaller sizes.
    unet.register_to_config(sample_size=space.size, _diffusers_version=diffusers.__version__)
    return unet.train()


def _check_pretrained(unet: UNet, space: Space, conditioner: Conditioner) -> None:
    config, where = unet.config, "the pretrained UNet"
    for side in ("in_channels", "out_channels"):
        if config[side] != space.channels:
            raise ConfigError(
                f"{where} has {side} {config[side]}, x0 has {space.channels} channels: set space and data.channels to "
                "what it was trained on"
            )
    for further in ("addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if config.get(further) is not None:
            raise ConfigError(f"{where} has {further} {config[further]}, a condition that this version cannot give it")
    if config.time_embedding_type != "positional":
        raise ConfigError(f"{where} has time_embedding_type {config.time_embedding_type}, only positional is supported")
    has, needs = _class_embedding(unet), _class_embedding_for(conditioner)
    if has != needs:
        raise ConfigError(
            f"{where} has {_in_words(has)}, conditioning.kind {conditioner.kind} needs {_in_words(needs)}: choose the "
            "conditioning (and num_classes or text encoder) that it was trained with"
        )
    crosses = isinstance(unet, UNet2DConditionModel) and any("attn2" in n for n, _ in unet.named_modules())
    if crosses != (conditioner.kind == "text"):
        raise ConfigError(
            f"{where} {'has' if crosses else 'has no'} cross-attention, conditioning.kind is {conditioner.kind}: "
            f"{'use text' if crosses else 'use another kind'}"
        )
    if crosses:
        widths = config.cross_attention_dim
        widths = {widths} if isinstance(widths, int) else set(widths)
        if widths != {conditioner.width}:
            raise ConfigError(
                f"{where} reads text of width {', '.join(map(str, widths))} (cross_attention_dim), the text encoder's "
                f"is {conditioner.width}: use the text encoder that it was trained with"
            )


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


def _class_embedding_for(conditioner: Conditioner) -> tuple[str, int] | None:
    if conditioner.kind == "class_label":
        return "index", conditioner.num_classes + 1
    return ("vector", conditioner.width) if conditioner.kind == "pooled_text" else None


def _in_words(embedding: tuple[str, int] | None) -> str:
    if embedding is None:
        return "no class embedding"
    form, size = embedding
    words = {"index": f"{size} class embeddings (the last: no class)", "vector": f"a class vector of width {size}"}
    return words.get(form, f"a class embedding of type {form}")

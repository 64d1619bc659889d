"""The UNet: a new one, made to fit the space and the conditioning, or a pretrained one, checked against them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.nn import functional

from finetune.conditioning import Condition, Conditioner
from finetune.config import TrainConfig
from finetune.errors import ConfigError
from finetune.model_fit import (
    TIME_ID_WIDTH,
    TIME_IDS,
    added_embedding_for,
    check_channels,
    check_conditions,
    class_embedding_for,
    fix_classes,
    further_channels,
    refuse_for_unet2d,
)
from finetune.pretrained import load_model_config, load_pretrained
from finetune.seeding import key
from finetune.space import Space

UNet = UNet2DModel | UNet2DConditionModel
OURS = frozenset({"text_embeds", "time_ids", "low_res", "inpaint"})
"""Names in a Condition that are no arguments of a UNet."""


def bind(unet: torch.nn.Module, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
    """The UNet (it may be wrapped for DDP) under a condition, as network(x_t [B, C, H, W], timestep) -> [B, C, H, W].

    A UNet2DConditionModel without cross-attention still asks for encoder_hidden_states: it gets None. text_embeds and
    time_ids are SDXL's added_cond_kwargs; of one alone, the other is empty (text_embeds) or zeros (time_ids, which
    diffusers cannot leave out). low_res is enlarged bilinearly and follows the channels of x_t; so
    does inpaint, as it is.
    """
    bare = unet if isinstance(unet, UNet) else extract_model_from_parallel(unet)
    set_heads(bare)  # here, where every use passes, because from_pretrained does not know of them
    arguments: dict[str, Any] = {name: rows for name, rows in condition.items() if name not in OURS}
    if isinstance(bare, UNet2DConditionModel):
        arguments = {"encoder_hidden_states": None, **arguments}
    added = {name: condition[name] for name in ("text_embeds", "time_ids") if name in condition}
    if added:
        given = next(iter(added.values()))
        empty = {"text_embeds": given.new_zeros(len(given), 0), "time_ids": given.new_zeros(len(given), TIME_IDS)}
        arguments["added_cond_kwargs"] = empty | added
    low_res, inpaint = condition.get("low_res"), condition.get("inpaint")
    if inpaint is not None:
        return lambda x_t, timestep: unet(torch.cat([x_t, inpaint.to(x_t)], dim=1), timestep, **arguments).sample
    if low_res is None:
        return lambda x_t, timestep: unet(x_t, timestep, **arguments).sample

    def network(x_t: Tensor, timestep: Tensor) -> Tensor:
        enlarged = functional.interpolate(low_res, size=x_t.shape[-2:], mode="bilinear")
        return unet(torch.cat([x_t, enlarged], dim=1), timestep, **arguments).sample

    return network


def set_heads(unet: UNet) -> None:
    """Give the attention of a UNet2DModel the numbers of heads that its config states as `num_attention_heads`.

    The entry is ours: [way down and middle, way up]. A UNet2DModel itself knows one width of heads for all levels
    (attention_head_dim), which cannot say a number of heads over levels of different widths, as improved-diffusion's.
    Stock diffusers warns that it ignores the entry, and then computes something else.
    """
    heads = unet.config.get("num_attention_heads") if isinstance(unet, UNet2DModel) else None
    if heads is not None:
        for name, module in unet.named_modules():
            if isinstance(module, Attention):
                module.heads = heads[name.startswith("up_blocks")]
                module.scale = (module.inner_dim // module.heads) ** -0.5


def new_unet2d(*, heads: tuple[int, int] | None, **arguments: Any) -> UNet2DModel:
    """A new UNet2DModel(**arguments) with so many attention heads: (way down and middle, way up), or by arguments.

    Where attention_head_dim can express them it does, and the model is a stock one; else see `set_heads`. Raises
    ConfigError if a number does not divide the channels of a level with attention.
    """
    if heads is None:
        return UNet2DModel(**arguments)
    down, up = _attention_widths(arguments)
    for n, widths in zip(heads, (down, up), strict=True):
        if bad := [width for width in widths if width % n]:
            raise ConfigError(f"{n} attention heads do not divide the {bad[0]} channels of a level: use a divisor")
    head_widths = {width // n for n, widths in zip(heads, (down, up), strict=True) for width in widths}
    if len(head_widths) <= 1:
        return UNet2DModel(**arguments, attention_head_dim=head_widths.pop() if head_widths else None)
    unet = UNet2DModel(**arguments, attention_head_dim=None)
    if heads != (1, 1):
        unet.register_to_config(num_attention_heads=list(heads))
        set_heads(unet)
    return unet


def _attention_widths(arguments: dict[str, Any]) -> tuple[set[int], set[int]]:
    """Channels of the levels with attention: on the way down and in the middle, and on the way up."""
    channels = arguments["block_out_channels"]
    down = {c for c, block in zip(channels, arguments["down_block_types"], strict=True) if "Attn" in block}
    up = {c for c, block in zip(channels[::-1], arguments["up_block_types"], strict=True) if "Attn" in block}
    return down | ({channels[-1]} if arguments["add_attention"] else set()), up


def start_at_zero(unet: UNet) -> None:
    """Zero the last convolution, the second of each residual layer and the projection out of each attention.

    As in improved-diffusion (Nichol & Dhariwal 2021; Fixup, Zhang et al. 2019): every residual branch starts as
    nothing, and the output of the whole UNet is exactly 0.
    """
    zeroed = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            zeroed.append(module.conv2)
        elif isinstance(module, Attention):
            zeroed.append(module.to_out[0])
    for module in zeroed:
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)


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
    arguments |= {"sample_size": space.size, "in_channels": space.channels + further_channels(conditioner.parts)}
    arguments["out_channels"] = space.channels * cfg.objective.out_channels_factor
    arguments |= _shape_arguments(cfg.model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(seed, "weights"))
        try:
            if cfg.model.kind == "unet2d_condition":
                unet = UNet2DConditionModel(**arguments)
            else:
                heads = cfg.model.num_heads
                unet = new_unet2d(heads=None if heads is None else (heads, heads), **arguments)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"model: diffusers cannot build this {cfg.model.kind}: {error}") from error
    if cfg.model.kind == "unet2d" and cfg.model.zero_init:
        start_at_zero(unet)
    if "class_label" in conditioner.parts:
        fix_classes(unet, conditioner.parts["class_label"])
    return unet


def _shape_arguments(model: Any) -> dict[str, Any]:
    """The settings that both classes take by the same name, and those that one of them takes."""
    names = ["block_out_channels", "layers_per_block", "down_block_types", "up_block_types"]
    names += ["norm_num_groups", "resnet_time_scale_shift", "dropout"]
    names += ["add_attention"] if model.kind == "unet2d" else ["mid_block_type"]
    names += ["attention_head_dim"] if model.kind == "unet2d_condition" or model.num_heads is None else []
    arguments = {name: getattr(model, name) for name in names}
    if model.kind == "unet2d" and model.resnet_time_scale_shift == "scale_shift":
        # Without it diffusers leaves the group norm of the middle attention out (Nichol & Dhariwal 2021 have it).
        arguments["attn_norm_num_groups"] = model.norm_num_groups
    return arguments


def _condition_arguments(model: Any, conditioner: Conditioner) -> dict[str, Any]:
    """How the conditions enter a new UNet, in diffusers' words. Raises ConfigError for what its class cannot take."""
    parts = conditioner.parts
    arguments: dict[str, Any] = {}
    if model.kind == "unet2d":
        refuse_for_unet2d(parts)
        arguments["time_embedding_dim"] = model.time_embedding_dim
    form, size = class_embedding_for(parts) or (None, 0)
    if form == "index":
        arguments["num_class_embeds"] = size
    elif form == "vector" and model.kind == "unet2d":
        # Added as it is to the time embedding, which must then be as wide; a UNet2DConditionModel learns a projection.
        if model.time_embedding_dim not in (None, size):
            raise ConfigError(
                f"model.time_embedding_dim must be the width of the pooled text, {size}, which is added "
                f"to the time embedding, got {model.time_embedding_dim}: leave it unset"
            )
        arguments |= {"class_embed_type": "identity", "time_embedding_dim": size}
    elif form == "vector":
        arguments |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": size}
    if added := added_embedding_for(parts):
        arguments |= {"addition_embed_type": "text_time", "addition_time_embed_dim": TIME_ID_WIDTH}
        arguments["projection_class_embeddings_input_dim"] = added
    if "text" in parts:
        arguments["cross_attention_dim"] = parts["text"].width
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
    if model.kind == "unet2d" and None not in (model.num_heads, model.attention_head_dim):
        raise ConfigError(
            f"model.num_heads ({model.num_heads}) and model.attention_head_dim ({model.attention_head_dim}) both set "
            "the attention heads: set model.attention_head_dim to null"
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
    if crossing and "text" not in conditioner.parts:
        raise ConfigError(
            f"model: {crossing[0]} reads a text sequence, but conditioning.kind is {conditioner.kind}: use blocks "
            "without CrossAttn (DownBlock2D, UpBlock2D, mid_block_type UNetMidBlock2D), or conditioning.kind text"
        )
    if "text" in conditioner.parts and not crossing:
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
    check_channels(unet, space, conditioner.parts, cfg.objective.out_channels_factor)
    check_conditions(unet, conditioner)
    _check_side(len(unet.config.block_out_channels), space)
    # The exported pipelines take the size of their images from here. The version is ours from now on: for UNets of
    # versions before 0.9, such as Stable Diffusion 1.x, StableDiffusionPipeline would put 64 over smaller sizes.
    unet.register_to_config(sample_size=space.size, _diffusers_version=diffusers.__version__)
    return unet.train()

"""The UNet of openai/improved-diffusion: what its weights show of its shape, and the same weights for a UNet2DModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}
ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What an improved-diffusion UNet is, as far as its weights show it."""

    in_channels: int
    """3, or 6 for super-resolution."""
    out_channels: int
    """3, or 6 with learned variances."""
    num_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    """Whether each level has attention, from the finest."""
    num_classes: int | None
    use_scale_shift_norm: bool


def read_shape(weights: Mapping[str, Tensor]) -> Shape:
    """The shape of an improved-diffusion state dict. Raises KeyError where an expected weight is missing."""
    base = weights["input_blocks.0.0.weight"].shape[0]
    widths, attention, blocks = [0], [False], 0
    for n in range(1, len({key.split(".")[1] for key in weights if key.startswith("input_blocks.")})):
        if f"input_blocks.{n}.0.op.weight" in weights:  # a downsampling ends the level
            widths.append(0)
            attention.append(False)
        else:
            widths[-1] = weights[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0]
            attention[-1] |= f"input_blocks.{n}.1.qkv.weight" in weights
            blocks += 1
    scale_shift = weights["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * widths[-1]
    return Shape(
        in_channels=weights["input_blocks.0.0.weight"].shape[1],
        out_channels=weights["out.2.weight"].shape[0],
        num_channels=base,
        channel_mult=tuple(width // base for width in widths),
        num_res_blocks=blocks // len(widths),
        attention=tuple(attention),
        num_classes=weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
        use_scale_shift_norm=scale_shift,
    )


def unet2d_arguments(shape: Shape, *, size: int, dropout: float) -> dict[str, Any]:
    """The arguments of the UNet2DModel of this shape, but for its attention heads."""
    return {
        "sample_size": size,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "block_out_channels": tuple(shape.num_channels * m for m in shape.channel_mult),
        "layers_per_block": shape.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in shape.attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in shape.attention[::-1]),
        "add_attention": True,
        "dropout": dropout,
        "resnet_time_scale_shift": "scale_shift" if shape.use_scale_shift_norm else "default",
        "attn_norm_num_groups": 32,  # diffusers would leave it out with scale_shift
        "num_class_embeds": None if shape.num_classes is None else shape.num_classes + 1,
    }


def converted(weights: Mapping[str, Tensor], shape: Shape, heads: tuple[int, int]) -> dict[str, Tensor]:
    """The weights in float32 under diffusers' names; heads: (way down and middle, way up), which order the rows of qkv.

    The class embedding gets one more row of zeros: "no class". Raises ValueError for a weight without a place.
    """
    modules = dict(_modules(shape))
    result = {}
    for key, tensor in weights.items():
        module, name = key.rsplit(".", 1)
        if module not in modules:
            raise ValueError(f"the weight {key} {tuple(tensor.shape)} has no place in {shape}")
        target, tensor = modules[module], tensor.float()
        if target.endswith("to_qkv"):  # its rows are ordered [head, q k v, channel of the head]
            n = heads[target.startswith("up_blocks")]
            width = tensor.shape[0] // 3
            parts = tensor.reshape(n, 3, width // n, -1).transpose(0, 1).reshape(3, width, -1)
            for letter, part in zip("qkv", parts, strict=True):
                result[f"{target[:-3]}{letter}.{name}"] = part if name == "weight" else part.flatten()
        elif target.endswith("to_out.0") and name == "weight":
            result[f"{target}.{name}"] = tensor.squeeze(-1)
        else:
            result[f"{target}.{name}"] = tensor
    if (classes := result.get("class_embedding.weight")) is not None:
        result["class_embedding.weight"] = torch.cat([classes, torch.zeros(1, classes.shape[1])])
    return result


def _modules(shape: Shape) -> Iterator[tuple[str, str]]:
    """(improved-diffusion's name, diffusers' name) of every module with weights."""

    def layer(theirs: str, ours: str, i: int, *, attends: bool) -> Iterator[tuple[str, str]]:
        yield from ((f"{theirs}.0.{a}", f"{ours}.resnets.{i}.{b}") for a, b in RESNET.items())
        if attends:
            yield from ((f"{theirs}.1.{a}", f"{ours}.attentions.{i}.{b}") for a, b in ATTENTION.items())

    yield from ENDS.items()
    levels, n = len(shape.attention), 1
    for level, attends in enumerate(shape.attention):
        for i in range(shape.num_res_blocks):
            yield from layer(f"input_blocks.{n + i}", f"down_blocks.{level}", i, attends=attends)
        n += shape.num_res_blocks
        if level < levels - 1:
            yield f"input_blocks.{n}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            n += 1
    yield from ((f"middle_block.0.{a}", f"mid_block.resnets.0.{b}") for a, b in RESNET.items())
    yield from ((f"middle_block.1.{a}", f"mid_block.attentions.0.{b}") for a, b in ATTENTION.items())
    yield from ((f"middle_block.2.{a}", f"mid_block.resnets.1.{b}") for a, b in RESNET.items())
    n = 0
    for level, attends in enumerate(shape.attention[::-1]):
        for i in range(shape.num_res_blocks + 1):
            yield from layer(f"output_blocks.{n + i}", f"up_blocks.{level}", i, attends=attends)
        n += shape.num_res_blocks + 1
        if level < levels - 1:
            yield f"output_blocks.{n - 1}.{1 + attends}.conv", f"up_blocks.{level}.upsamplers.0.conv"

"""The conditions of a UNetPipeline: how it remembers those of the training, and what its call takes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from transformers import CLIPTextModelWithProjection

from finetune.conditioning import Conditioner, assembled
from finetune.conditions import ClassLabel, LowRes, Single, Size
from finetune.config import TrainConfig
from finetune.config_choices import CONDITIONS
from finetune.errors import ConfigError
from finetune.sdxl_texts import TwoTexts, sdxl_texts
from finetune.text_conditions import PooledText, TextSequence

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.pipelines import UNetPipeline

ARGUMENTS = {"class_label": "class_labels", "pooled_text": "prompt", "text": "prompt", "low_res": "image"}
"""The argument of UNetPipeline's call that holds a condition."""


def text_modules(conditioner: Conditioner) -> dict[str, Any]:
    """The text encoders and tokenizers, as a pipeline names them; the pooled text's own comes second."""
    text, pooled = conditioner.parts.get("text"), conditioner.parts.get("pooled_text")
    modules: dict[str, Any] = {}
    if isinstance(text, TwoTexts):
        text, pooled = text.members
    if first := text or pooled:
        modules = {"text_encoder": first.text_encoder, "tokenizer": first.tokenizer}
    if text and pooled and pooled.text_encoder is not text.text_encoder:
        modules |= {"text_encoder_2": pooled.text_encoder, "tokenizer_2": pooled.tokenizer}
    return modules


def condition_settings(conditioner: Conditioner, cfg: TrainConfig) -> dict[str, Any]:
    """What UNetPipeline must know of the conditions. Raises ConfigError if cfg.sample has a label that is no class."""
    parts = conditioner.parts
    dropped = [kind for kind, part in parts.items() if part.dropout]
    if not dropped and cfg.conditioning.kind == "sdxl":
        dropped = ["pooled_text", "text"]  # as when the UNet was trained: it has never been without the sizes
    settings: dict[str, Any] = {"conditioning": conditioner.kind}
    # A pretrained UNet was trained before, with a dropout that we do not know.
    all_known = len(dropped) == len(parts) or (not dropped and cfg.model.kind == "pretrained")
    settings["dropped"] = None if all_known else "+".join(dropped)
    settings["zero_nulls"] = "+".join(
        kind for kind, part in parts.items() if part.null == "zero" and kind not in ("low_res", "size")
    )
    if label := parts.get("class_label"):
        label.condition(cfg.sample.class_labels)
        names = list(label.class_names) if label.class_names else None
        settings |= {"num_classes": label.num_classes, "class_names": names}
    if low_res := parts.get("low_res"):
        settings["low_res_side"] = low_res.side
    if text := parts.get("text"):
        settings |= {"clip_skip": text.clip_skip or None, "chunks": text.chunks}
    return settings


def kinds_of(pipeline: UNetPipeline) -> list[str]:
    """Its conditions. Raises ConfigError for one that there is not."""
    conditioning = pipeline.config.conditioning
    kinds = [] if conditioning == "none" else conditioning.split("+")
    if unknown := set(kinds) - set(CONDITIONS):
        raise ConfigError(f"conditioning must be none or of {', '.join(CONDITIONS)}, got {unknown.pop()}")
    return kinds


def conditioner_of(pipeline: UNetPipeline) -> Conditioner:
    """The conditioner of the training."""
    config, device = pipeline.config, pipeline._execution_device
    dropped = kinds_of(pipeline) if config.dropped is None else config.dropped.split("+")
    parts: dict[str, Single] = {}
    if "text" in kinds_of(pipeline) and isinstance(pipeline.text_encoder_2, CLIPTextModelWithProjection):
        pairs = (pipeline.text_encoder, pipeline.tokenizer), (pipeline.text_encoder_2, pipeline.tokenizer_2)
        modules = [{"text_encoder": encoder, "tokenizer": tokenizer} for encoder, tokenizer in pairs]
        null = "zero" if "text" in config.zero_nulls.split("+") else "empty_prompt"
        reads = {"clip_skip": config.clip_skip, "chunks": config.chunks}
        parts = sdxl_texts(*modules, dropout=float("text" in dropped), null=null, **reads)
    for kind in [kind for kind in kinds_of(pipeline) if kind not in parts]:
        options: dict[str, Any] = {"dropout": float(kind in dropped)}  # only whether there was any counts here
        options |= {"null": "zero"} if kind in config.zero_nulls.split("+") else {}
        if kind == "class_label":
            parts[kind] = ClassLabel(config.num_classes, device=device, **options)
        elif kind == "low_res":
            channels = pipeline.unet.config.in_channels - pipeline.space().channels
            parts[kind] = LowRes(channels=channels, side=config.low_res_side, device=device, **options)
        elif kind == "size":
            parts[kind] = Size(device=device, **options)
        elif kind == "pooled_text" and pipeline.text_encoder_2 is not None:
            parts[kind] = PooledText(pipeline.text_encoder_2, pipeline.tokenizer_2, **options)
        elif kind == "pooled_text":
            parts[kind] = PooledText(pipeline.text_encoder, pipeline.tokenizer, **options)
        else:
            reads = {"chunks": config.chunks, "clip_skip": config.clip_skip}
            parts[kind] = TextSequence(pipeline.text_encoder, pipeline.tokenizer, **reads, **options)
    return assembled(parts)


def wanted_of(
    pipeline: UNetPipeline,
    given: dict[str, Any],
    sizes: tuple[tuple[int, int] | None, ...],
    batch_size: int | None,
    *,
    noise: float,
    generator: torch.Generator | list[torch.Generator] | None,
) -> tuple[Any, int]:
    """What the conditioner's `condition` takes, one per image, and the number of images.

    given: prompt, class_labels and image of the call; sizes: its original_size, crops_coords_top_left, target_size;
    noise: std of what is added to the small images. Raises ConfigError for what contradicts the pipeline or another.
    """
    kinds, name_of = kinds_of(pipeline), pipeline.config.conditioning
    takes = list(dict.fromkeys(ARGUMENTS[kind] for kind in kinds if kind in ARGUMENTS))
    if foreign := [name for name, value in given.items() if value is not None and name not in takes]:
        accepted = " and ".join(takes) or "no condition"
        raise ConfigError(f"this pipeline takes {accepted} (conditioning {name_of}), not {foreign[0]}: leave it out")
    if missing := [name for name in takes if given[name] is None]:
        raise ConfigError(f"this pipeline needs {missing[0]} (conditioning {name_of})")
    if "size" not in kinds and sizes != (None, None, None):
        raise ConfigError(f"this pipeline takes no sizes (conditioning {name_of}): leave them out")
    if "low_res" not in kinds and noise:
        raise ConfigError("there is no small image for noise_augmentation to be added to: leave it out")
    values = {name: given[name] for name in takes}
    if "image" in values:
        channels = pipeline.unet.config.in_channels - pipeline.space().channels
        values["image"] = small_images(values["image"], channels=channels)
    n = _number(values, batch_size)
    values = {name: [each] * n if isinstance(each, str | int) else each for name, each in values.items()}
    wanted = {kind: values[ARGUMENTS[kind]] for kind in kinds if kind in ARGUMENTS}
    if "low_res" in kinds:
        low_res = wanted["low_res"].expand(n, -1, -1, -1)
        if noise:
            reduced = LowRes(channels=low_res.shape[1], side=pipeline.config.low_res_side).condition(low_res)
            low_res = reduced["low_res"] + noise * randn_tensor(reduced["low_res"].shape, generator=generator)
        wanted["low_res"] = low_res
    if "size" in kinds:
        side = pipeline.unet.config.sample_size * pipeline.space().factor
        original, corner, target = sizes
        wanted["size"] = [(*(original or (side, side)), *(corner or (0, 0)), *(target or (side, side)))] * n
    return (wanted if len(kinds) > 1 else wanted[kinds[0]] if kinds else None), n


def _number(values: dict[str, Any], batch_size: int | None) -> int:
    """How many images are to be drawn of these prompts, labels and small images."""
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    counts = {name: len(value) for name, value in values.items() if not isinstance(value, str | int)}
    n = batch_size or max(counts.values(), default=1)
    for name, count in counts.items():
        if count < 1 or (count != n and (name, count) != ("image", 1)):
            raise ConfigError(
                f"batch_size ({batch_size}) must be the number of {name} ({count}), at least 1, and that of the other "
                f"conditions ({n})"
            )
    return n


def small_images(images: Image | Tensor | Sequence[Image | Tensor], *, channels: int) -> Tensor:
    """Images -> [n, channels, H, W] float32 in [-1, 1].

    images: one or several PIL images, which become RGB or grey by `channels`, or tensors [C, H, W] or [n, C, H, W]
    with values in [0, 1]. Raises ConfigError for anything else, or for images of several sizes.
    """
    if isinstance(images, Tensor):
        images = list(images) if images.ndim == 4 else [images]
    elif not isinstance(images, list | tuple):
        images = [images]
    if not images:
        raise ConfigError("image must hold at least one image")
    made = [_to_tensor(image, channels) for image in images]
    if len({tuple(image.shape) for image in made}) > 1:
        raise ConfigError("image must hold images of one size and one number of channels: resize them")
    return torch.stack(made)


def _to_tensor(image: Any, channels: int) -> Tensor:
    if not isinstance(image, Tensor):
        if not hasattr(image, "convert"):
            raise ConfigError(f"image must be PIL images or tensors, got {type(image).__name__}")
        return F.pil_to_tensor(image.convert("RGB" if channels == 3 else "L")) / 127.5 - 1
    if image.ndim != 3 or not image.is_floating_point():
        raise ConfigError(f"image must be float tensors [C, H, W], got {image.dtype} {tuple(image.shape)}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise ConfigError(f"image must lie in [0, 1], got {low:g} to {high:g}")
    return image.float() * 2 - 1

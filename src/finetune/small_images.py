"""The small images of super-resolution: from files, and side by side with what was drawn of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from finetune.batching import Batch


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and the images in the folders in the order of their names. Raises ConfigError where there is none."""
    found: list[Path] = []
    for path in paths:
        from finetune.images import EXTENSIONS

        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in inside if file.is_file() and (file == path or file.suffix.lower() in EXTENSIONS)]
        if not files:
            raise ConfigError(f"--image {path} is no image and no folder with images: correct the path")
        found += files
    return found


def read_images(files: Sequence[Path], pipeline: DiffusionPipeline) -> Tensor:
    """The images of the files as the pipeline takes them, [n, C, side, side] in [0, 1].

    RGB or grey by the channels that the pipeline reads; a larger square image is reduced by averaging, as in training.
    Raises ConfigError for one that cannot be read or has another shape.
    """
    import torch
    from torchvision.transforms.v2 import functional as F

    from finetune.config import Data
    from finetune.images import BadRow, decode, strict_pillow

    low_res = pipeline.conditioner().parts.get("low_res") if hasattr(pipeline, "conditioner") else None
    if low_res is None:
        raise ConfigError("this pipeline takes no images: leave --image out")
    made, rules = [], Data(resolution=low_res.side, channels=low_res.channels, min_side=1)
    for file in files:
        try:
            with strict_pillow():
                pixels = F.pil_to_tensor(decode(file.read_bytes(), rules).image)
            pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels.expand(low_res.channels, -1, -1)
            made.append(low_res.condition(pixels[None] * 2 - 1)["low_res"].cpu())
        except (BadRow, OSError, ConfigError) as problem:
            raise ConfigError(f"--image {file}: {problem}") from None
    return (torch.cat(made) / 2 + 0.5).clamp(0, 1)


def small_of(pipeline: DiffusionPipeline, shown: Batch) -> Tensor:
    """The small images of training samples, [B, C, side, side] in [-1, 1], without noise."""
    return pipeline.conditioner().parts["low_res"].of(shown)["low_res"]


def triples(small: Tensor, drawn: Sequence[Image], truth: Tensor) -> list[Image]:
    """Small image (enlarged without smoothing), drawn image and truth of each sample; tensors are in [-1, 1]."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    result = []
    for low, image, high in zip(small, drawn, truth, strict=True):
        low, high = (F.to_pil_image((each / 2 + 0.5).clamp(0, 1).cpu()) for each in (low, high))
        result += [low.resize(image.size, Image.Resampling.NEAREST), image, high]
    return result

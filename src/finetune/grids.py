"""Images in and out of sampling: several as one, with labels; the small ones of super-resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from finetune.batching import Batch

GRID_SIDE = 96  # smaller images are enlarged in grids, so that labels fit under them
LABEL_LINES = 2


def grid(images: Sequence[Image], labels: Sequence[str] | None = None, columns: int | None = None) -> Image:
    """Images of one size, row by row on white, each with its label under it; about square unless columns is given.

    Images smaller than GRID_SIDE are enlarged by a whole factor without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not images or len({image.size for image in images}) > 1:
        raise ValueError("a grid needs at least one image, all of one size")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"a grid needs one label per image, got {len(labels)} for {len(images)}")
    columns = columns or math.ceil(math.sqrt(len(images)))
    factor = -(-GRID_SIDE // max(images[0].size))
    width, height = (side * factor for side in images[0].size)
    font, margin = ImageFont.load_default(size=11), 4
    texts = [_wrapped(label, font, width) for label in labels or ()]
    strip = 14 * max((len(lines) for lines in texts), default=0)
    step_x, step_y = width + margin, height + strip + margin
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * step_x + margin, rows * step_y + margin), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        left, top = margin + i % columns * step_x, margin + i // columns * step_y
        canvas.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
        for line, text in enumerate(texts[i] if texts else ()):
            draw.text((left, top + height + 14 * line), text, fill="black", font=font)
    return canvas


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Words of `text` on at most LABEL_LINES lines of `width` pixels; what does not fit is cut and marked by dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = len(lines) > LABEL_LINES
    lines = lines[:LABEL_LINES]
    for i, line in enumerate(lines):
        if font.getlength(line) > width or (cut and i == LABEL_LINES - 1):
            while line and font.getlength(line + "...") > width:
                line = line[:-1]
            lines[i] = line + "..."
    return lines


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
    images = shown.pixel_values if shown.low_res is None else shown.low_res
    return pipeline.conditioner().parts["low_res"].condition(images)["low_res"]


def triples(small: Tensor, drawn: Sequence[Image], truth: Tensor) -> list[Image]:
    """Small image (enlarged without smoothing), drawn image and truth of each sample; tensors are in [-1, 1]."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    result = []
    for low, image, high in zip(small, drawn, truth, strict=True):
        low, high = (F.to_pil_image((each / 2 + 0.5).clamp(0, 1).cpu()) for each in (low, high))
        result += [low.resize(image.size, Image.Resampling.NEAREST), image, high]
    return result

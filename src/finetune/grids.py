"""Images side by side on one canvas, each with its label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

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

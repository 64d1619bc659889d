"""From the bytes of an image file to training pixels: one strict decoder, and the resize, crop and flip after it.

Nothing here looks at a global random state: where a crop lies and whether it is mirrored follows from the seed, the
epoch and the row, so any worker on any machine makes the same sample.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageFile, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from finetune.config import Data
from finetune.errors import DataError
from finetune.seeding import key

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = frozenset(".png .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff".split())
PLAIN_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"})


class BadRow(DataError):
    """Why one row cannot be used; the message continues the row's name: "cat.png" + "is empty (0 bytes)"."""


@dataclass(frozen=True)
class Decoded:
    """A decoded image and what it was in its file."""

    image: Image.Image
    """Upright, mode RGB or L (0 to 255), or F (0 to 1, grey of more than 8 bits)."""
    size: tuple[int, int]
    """Width and height of the upright image, in pixels."""
    traits: frozenset[str]
    """Which of "transparent", "more than 8 bits", "several frames", "rotated by EXIF", "CMYK" hold for the file."""
    alpha: Image.Image | None = None
    """How opaque each pixel is, mode L; None if all of them are, or unless rules.alpha_mask."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What training sees of an image."""

    pixels: torch.Tensor
    """[channels, height, width] uint8; float32 in [-1, 1] of an image of more than 8 bits: see `normalised`."""
    time_ids: tuple[int, ...]
    """SDXL's sizes (Podell et al. 2023): height and width of the upright image; top and left of the crop, in pixels of
    the resized image and, if it is mirrored, of the mirrored one; height and width of the training image."""
    low_res: torch.Tensor | None
    """[channels, side, side], as `pixels`: the same part of the small image, if there is one."""
    mask: torch.Tensor | None = None
    """[1, resolution, resolution] float32 in [0, 1]: the same part of the mask, if there is one."""


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Within this block Pillow refuses truncated files, its warnings are errors, and `max_pixels` is the only cap.

    Set here rather than in `decode`, because these switches belong to the process: two threads that set and restore
    them in turns would leave them wrong.
    """
    saved = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = saved


def decode(content: bytes, rules: Data) -> Decoded:
    """Decode the bytes of one image file; to be called within `strict_pillow`.

    The size is checked by the header, before any pixel is decoded. EXIF orientation is applied; of several frames the
    first is taken; transparency is composited on `rules.background`; CMYK is converted by its embedded ICC profile
    where it has one (the profiles of RGB and grey images are not applied, as everywhere in training data); more than
    8 bits are scaled by their mode (see `_scale_deep`). Raises BadRow.
    """
    if not content:
        raise BadRow("is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(image.size, rules)
            several = getattr(image, "is_animated", False)  # only the formats that can hold several frames have it
            image.load()
            turned = image.getexif().get(0x0112, 1) != 1  # the tag Orientation
            upright = ImageOps.exif_transpose(image)
            traits = {
                "transparent": upright.has_transparency_data,
                "more than 8 bits": _is_deep(upright),
                "several frames": several,
                "rotated by EXIF": turned,
                "CMYK": upright.mode == "CMYK",
            }
            alpha = upright.convert("RGBA").getchannel("A") if rules.alpha_mask and traits["transparent"] else None
            flat = _flatten(upright, rules)
            return Decoded(flat, upright.size, frozenset(name for name, holds in traits.items() if holds), alpha)
    except BadRow:
        raise
    except UnidentifiedImageError:
        raise BadRow(f"is not a {', '.join(FORMATS)} image (it begins with {content[:12]!r})") from None
    except Exception as error:  # Pillow raises anything from OSError to SyntaxError or struct.error on a broken file
        raise BadRow(f"cannot be decoded: {type(error).__name__}: {error}") from error


def mask_of(decoded: Decoded, content: bytes | None, rules: Data) -> Image.Image | None:
    """How much each pixel of an image counts in the loss, mode L (255: in full) or F (1); None if there are no masks.

    content: the encoded mask of data.mask_column; without one, a mask is the image's own transparency. To be called
    within `strict_pillow`. Raises BadRow.
    """
    if not rules.masked:
        return None
    mask = decoded.alpha or Image.new("L", decoded.size, 255)
    if content is not None:
        limits = {name: getattr(rules, name) for name in ("resolution", "max_pixels", "min_side", "max_aspect_ratio")}
        try:
            found = decode(content, Data(**limits, channels=1, alpha_mask=True))
        except BadRow as problem:
            raise BadRow(f"has a mask that {problem}") from None
        if found.size != decoded.size:
            sizes = [f"{width}x{height}" for width, height in (decoded.size, found.size)]
            raise BadRow(f"is {sizes[0]} and its mask {sizes[1]}: they must have one size")
        if found.alpha and found.alpha.getextrema() != (255, 255):
            raise BadRow("has a mask that is transparent in places: save it as grey, white where the image counts")
        mask = found.image
    if not rules.unmasked_weight and mask.getextrema()[1] == 0:
        raise BadRow("has a mask that leaves out all of it: there is nothing to learn from it (data.unmasked_weight)")
    return mask


def prepare(
    image: Image.Image,
    rules: Data,
    *,
    seed: int,
    epoch: int,
    row: int,
    shape: tuple[int, int] | None = None,
    small: Image.Image | None = None,
    factor: int = 1,
    mask: Image.Image | None = None,
) -> Prepared:
    """Resize to just cover the training image, crop, mirror.

    `image` is what `decode` gives. shape: height and width of the training image; without it, the square of
    `rules.resolution`. The crop and the mirroring are functions of (seed, epoch, row). An image of the right size
    without mirroring keeps every pixel. small: the same picture at 1/factor of the size, prepared alike; the crop then
    lies on whole pixels of it. mask: as `mask_of` gives it, of the size of `image`, and cut like it.
    """
    shape, original = shape or (rules.resolution, rules.resolution), (image.height, image.width)
    small_shape = shape[0] // factor, shape[1] // factor
    image = _resized(image, rules, shape)
    if mask is not None:
        mask = _resized(mask, rules, shape, mode="box")  # shares of area, so that nothing beyond its edge counts
    coarse = image if small is None else _resized(small, rules, small_shape)
    top, left = _corner(coarse, rules, small_shape, key(seed, "crop", epoch, row))
    top, left = top * factor, left * factor
    flip = bool(rules.random_flip and key(seed, "flip", epoch, row) % 2)
    seen_left = image.width - shape[1] - left if flip else left
    return Prepared(
        pixels=_cut(image, rules, (top, left), shape, flip),
        time_ids=(*original, top, seen_left, *shape),
        low_res=None if small is None else _cut(coarse, rules, (top // factor, left // factor), small_shape, flip),
        mask=None if mask is None else _weights(mask, rules, (top, left), shape, flip),
    )


def to_pixels(image: Image.Image, rules: Data, *, seed: int, epoch: int, row: int) -> torch.Tensor:
    """The pixels of `prepare`, `normalised`."""
    return normalised(prepare(image, rules, seed=seed, epoch=epoch, row=row).pixels)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape -> float32 in [-1, 1]: v becomes v / 127.5 - 1, on every device; float32 stays as it is.

    Done where the pixels are used, so that a quarter of the bytes goes through processes and onto the device.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    # A tensor, because CUDA divides by a plain number as it multiplies by its inverse, which rounds otherwise.
    return pixels / torch.full((), 127.5, device=pixels.device) - 1


def covering(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The smallest height and width in the proportions of `size` that cover `shape`, the longer truncated.

    For a square they are those of torchvision's resize of the short side.
    """
    (height, width), (high, wide) = size, shape
    if height * wide > width * high:
        return height * wide // width, wide
    return high, width * high // height


def _resized(image: Image.Image, rules: Data, shape: tuple[int, int], mode: str | None = None) -> Image.Image:
    """The image at the size that just covers `shape`; mode: another filter than that of `rules`.

    By `preparation iddpm` as improved-diffusion makes it (Nichol & Dhariwal 2021), which rounds the long side.
    """
    if rules.preparation != "iddpm":
        mode = InterpolationMode(mode or rules.image_interpolation_mode)
        size = covering((image.height, image.width), shape)
        return F.resize(image, list(size), interpolation=mode, antialias=True)
    side, _ = shape  # a square
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _corner(image: Image.Image, rules: Data, shape: tuple[int, int], drawn: int) -> tuple[int, int]:
    """Top and left of the crop; drawn: 64 random bits, which modulo n are uniform up to n / 2**64."""
    tops, lefts = image.height - shape[0], image.width - shape[1]
    if rules.preparation == "iddpm":
        return tops // 2, lefts // 2
    if rules.center_crop:
        return round(tops / 2), round(lefts / 2)  # as torchvision's center_crop
    return divmod(drawn % ((tops + 1) * (lefts + 1)), lefts + 1)


def _cut(
    image: Image.Image, rules: Data, corner: tuple[int, int], shape: tuple[int, int], flip: bool
) -> torch.Tensor:
    image = F.crop(image, *corner, *shape)
    if flip:
        image = F.horizontal_flip(image)
    pixels = F.pil_to_tensor(image)
    if pixels.dtype != torch.uint8:
        pixels = pixels.clamp(0, 1) * 2 - 1  # bicubic and lanczos overshoot; 8-bit images were clipped by the resize
    return pixels.expand(rules.channels, *shape)


def _weights(
    mask: Image.Image, rules: Data, corner: tuple[int, int], shape: tuple[int, int], flip: bool
) -> torch.Tensor:
    return ((normalised(_cut(mask, rules, corner, shape, flip)[:1]) + 1) / 2).clamp(min=rules.unmasked_weight)


def background_rgb(colour: str) -> tuple[int, int, int]:
    """The three numbers, 0 to 255, of a colour name or #rrggbb. Raises ValueError."""
    numbers = ImageColor.getrgb(colour)
    if len(numbers) != 3:
        raise ValueError(f"colour {colour!r} is itself transparent")
    return numbers


def _check_size(size: tuple[int, int], rules: Data) -> None:
    (width, height), (short, long) = size, sorted(size)
    if width * height > rules.max_pixels:
        raise BadRow(f"is {width}x{height}, more than data.max_pixels {rules.max_pixels}")
    if short < rules.min_side:
        raise BadRow(f"is {width}x{height}, with a side below data.min_side {rules.min_side}")
    if long > short * rules.max_aspect_ratio:
        raise BadRow(f"is {width}x{height}, longer than data.max_aspect_ratio {rules.max_aspect_ratio:g} allows")


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _flatten(image: Image.Image, rules: Data) -> Image.Image:
    """An opaque image: RGB or L by `rules.channels`, or F for more than 8 bits."""
    if _is_deep(image):
        return _scale_deep(image)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background_rgb(rules.background))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    elif image.mode == "CMYK" and image.info.get("icc_profile"):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    elif image.mode not in PLAIN_MODES:
        raise BadRow(f"has the colour mode {image.mode}: convert it to RGB")
    return image.convert("RGB" if rules.channels == 3 else "L")


def _scale_deep(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits -> mode F in [0, 1]: integers by 65535; floats as they are, or by 255 if above 1.

    Pillow's own convert("RGB") clips 16-bit values at 255 and truncates floats: white and black pictures, silently.
    """
    if "transparency" in image.info:
        raise BadRow(f"has the mode {image.mode} with a transparent colour: save it as 8-bit RGBA")
    values = np.asarray(image).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    white = 65535.0 if image.mode != "F" else 1.0 if high <= 1 else 255.0
    if not (low >= 0 and high <= white):  # also refuses NaN
        known = "0 to 65535" if image.mode != "F" else "0 to 1 or 0 to 255"
        raise BadRow(f"holds values from {low:g} to {high:g} (mode {image.mode}), which must lie within {known}")
    return Image.fromarray(values / white)

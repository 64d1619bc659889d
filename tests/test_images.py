"""Decoding and transforms: every kind of file gives the picture that a viewer shows, or a reason."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from finetune.config import Data
from finetune.images import BadRow, decode, strict_pillow, to_pixels
from golden_numbers import compare

SIDE = 16


def rules(**settings) -> Data:
    return Data(**{"resolution": SIDE, **settings})


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def picture(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def opened(content: bytes, **settings) -> Image.Image:
    with strict_pillow():
        return decode(content, rules(**settings)).image


def refusal(content: bytes, **settings) -> str:
    with pytest.raises(BadRow) as error:
        opened(content, **settings)
    return str(error.value)


def pixels(image: Image.Image, *, seed: int = 0, epoch: int = 0, row: int = 0, **settings) -> torch.Tensor:
    return to_pixels(image, rules(**settings), seed=seed, epoch=epoch, row=row)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_lossless_formats_keep_every_pixel(kind):
    grey = picture().convert("L")
    image = opened(encoded(grey, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(grey.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_shows_the_picture_upright(orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    upright = picture(20, 12)
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    with strict_pillow():
        decoded = decode(encoded(stored, exif=exif), rules())
    assert np.array_equal(np.asarray(decoded.image), np.asarray(upright))
    assert decoded.size == (20, 12) and ("rotated by EXIF" in decoded.traits) == (orientation > 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_equals_8_bit_within_one_percent(kind):
    values = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE)
    deep = pixels(opened(encoded(Image.fromarray((values * 257).astype(np.uint16)), kind)))
    plain = pixels(opened(encoded(Image.fromarray(values.astype(np.uint8)))))
    assert deep.shape == plain.shape == (3, SIDE, SIDE)
    assert abs(deep.mean() - plain.mean()) < 0.01 and deep.min() == -1 and deep.max() == 1
    clipped = pixels(Image.fromarray((values * 257).astype(np.uint16)).convert("RGB"))
    assert abs(clipped.mean() - plain.mean()) > 0.5  # what Pillow's own conversion would have given


def test_32_bit_integers_and_floats_are_scaled_or_refused():
    ramp = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
    as_integers = pixels(opened(encoded(Image.fromarray((ramp * 65535).astype(np.int32)), "TIFF")))
    for image in (ramp, ramp * 255):
        assert torch.allclose(pixels(opened(encoded(Image.fromarray(image), "TIFF"))), as_integers, atol=1e-4)
    for image in (ramp * 300, ramp - 0.5, np.full_like(ramp, np.nan), (ramp * 70000).astype(np.int32)):
        assert "must lie within" in refusal(encoded(Image.fromarray(image), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with a transparent colour"])
def test_transparency_shows_the_background_not_what_hides_under_it(mode):
    hidden = np.zeros((SIDE, SIDE, 4), dtype=np.uint8)
    hidden[:, 8:, 3] = 255  # left half transparent black, right half opaque black
    image, options = Image.fromarray(hidden), {}
    if mode == "P":
        indices = Image.fromarray((hidden[..., 3] > 0).astype(np.uint8)).convert("P")
        indices.putpalette([255, 0, 0, 0, 0, 0])
        image, options = indices, {"transparency": 0}
    elif mode == "RGB with a transparent colour":
        colours = np.where(hidden[..., 3:] > 0, 0, 7).astype(np.uint8).repeat(3, axis=2)
        image, options = Image.fromarray(colours), {"transparency": (7, 7, 7)}
    else:
        image = image.convert(mode)
    for colour, shown in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        flat = np.asarray(opened(encoded(image, **options), background=colour))
        assert (flat[:, :8] == shown).all() and (flat[:, 8:] == 0).all()


def test_palette_and_grey_and_one_channel():
    palette = picture().quantize(16)
    assert np.array_equal(np.asarray(opened(encoded(palette))), np.asarray(palette.convert("RGB")))
    grey = opened(encoded(picture()), channels=1)
    assert np.array_equal(np.asarray(grey), np.asarray(picture().convert("L")))
    assert pixels(grey, channels=1).shape == (1, SIDE, SIDE)


def test_cmyk_is_converted_with_and_without_a_profile():
    cyan = Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0))
    plain = np.asarray(opened(encoded(cyan, "JPEG", quality=95)))
    assert np.abs(plain[0, 0].astype(int) - (0, 255, 255)).max() < 8
    wrong = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of three channels, not four
    assert "cannot be decoded" in refusal(encoded(cyan, "JPEG", icc_profile=wrong))  # so the profile is really used


def test_animation_gives_its_first_frame():
    frames = [Image.new("L", (SIDE, SIDE), level).convert("RGB") for level in (200, 10, 90)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with strict_pillow():
        decoded = decode(content, rules())
    assert (np.asarray(decoded.image) == 200).all() and "several frames" in decoded.traits


def bomb(side: int = 13000) -> bytes:
    """A PNG whose header says side x side and whose data is short."""
    head = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    chunks = [len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_refusals_say_what_is_wrong():
    assert "empty" in refusal(b"")
    assert "is not a PNG" in refusal(b"<!DOCTYPE html><html>")
    assert "max_pixels" in refusal(bomb())
    assert "max_pixels 255" in refusal(encoded(picture()), max_pixels=255)
    assert "min_side" in refusal(encoded(picture(1, 1)))
    assert "max_aspect_ratio" in refusal(encoded(picture(4000, 1)), min_side=1)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        content = encoded(picture(64, 64), kind)
        assert "cannot be decoded" in refusal(content[: len(content) * 2 // 3]) or kind == "TIFF"
    ppm = encoded(picture(), "PPM")
    assert Image.open(io.BytesIO(ppm)).format == "PPM" and "is not a PNG" in refusal(ppm)  # readable, not allowed


def test_strict_pillow_leaves_the_process_as_it_was():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(KeyError), strict_pillow():
        assert Image.MAX_IMAGE_PIXELS is None
        raise KeyError
    assert Image.MAX_IMAGE_PIXELS == before


@pytest.mark.parametrize("settings", [{}, {"center_crop": True}, {"image_interpolation_mode": "lanczos"}])
def test_a_square_of_the_right_size_is_only_scaled(settings):
    expected = torch.from_numpy(np.array(picture())).permute(2, 0, 1) / 127.5 - 1
    result = pixels(picture(), **settings)
    assert torch.equal(result, expected) and result.dtype == torch.float32 and result.min() >= -1 and result.max() <= 1


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
def test_every_filter_resizes_flat_colours_exactly_up_and_down(mode):
    for width, height in ((64, 48), (9, 11), (SIDE, 40)):
        flat = Image.new("RGB", (width, height), (0, 51, 255))
        result = pixels(flat, image_interpolation_mode=mode)
        assert torch.allclose(result, torch.tensor([-1, -0.6, 1])[:, None, None].expand(3, SIDE, SIDE))
    deep = Image.fromarray(np.random.RandomState(0).rand(40, 40).astype(np.float32))
    assert pixels(deep, image_interpolation_mode=mode).abs().max() <= 1


def test_box_reduces_by_the_mean():
    grey = picture(32, 32)
    expected = torch.from_numpy(np.array(grey)).permute(2, 0, 1).float()
    expected = torch.nn.functional.avg_pool2d(expected, 2) / 127.5 - 1
    assert (
        pixels(grey, image_interpolation_mode="box") - expected
    ).abs().max() <= 1.01 / 127.5  # Pillow rounds twice, across and down


@pytest.mark.parametrize(("number", "name"), [(0, "a_0.png"), (1, "b_1.png"), (2, "a_2.png")])
def test_preparation_iddpm_is_that_of_improved_diffusion_bit_by_bit(golden, number, name):
    arrays = golden("iddpm_data")
    image, expected = Image.fromarray(arrays[f"in_{number}"]), torch.from_numpy(arrays[f"out_{name}"])
    image = opened(encoded(image))
    for row in range(3):
        compare("iddpm_data", f"out_{name}", pixels(image, preparation="iddpm", row=row), rtol=0)
    assert not torch.equal(pixels(image, center_crop=True, image_interpolation_mode="bicubic"), expected)
    mirrored = [pixels(image, preparation="iddpm", random_flip=True, row=row) for row in range(8)]
    assert {torch.equal(x, expected) for x in mirrored} == {torch.equal(x, expected.flip(-1)) for x in mirrored}
    assert any(torch.equal(x, expected.flip(-1)) for x in mirrored)


def test_preparation_iddpm_has_its_own_filters_and_takes_every_mode():
    with pytest.raises(ValueError, match="image_interpolation_mode is lanczos, but data.preparation iddpm has its own"):
        rules(preparation="iddpm", image_interpolation_mode="lanczos")
    for width, height in ((64, 48), (9, 11), (SIDE, 40), (31, 32)):
        flat = pixels(Image.new("L", (width, height), 51), preparation="iddpm")
        assert torch.allclose(flat, torch.full((3, SIDE, SIDE), -0.6))
    deep = Image.fromarray(np.random.RandomState(0).rand(40, 40).astype(np.float32))
    assert pixels(deep, preparation="iddpm").abs().max() <= 1


def test_crop_and_flip_belong_to_seed_epoch_and_row():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (SIDE, 1)))  # the left pixel tells where the crop is
    one = pixels(ramp, epoch=3, row=5)
    torch.manual_seed(99)
    assert torch.equal(one, pixels(ramp, epoch=3, row=5))
    for other in ({"seed": 1}, {"epoch": 4}, {"row": 6}):
        assert not torch.equal(one, pixels(ramp, **({"epoch": 3, "row": 5} | other)))
    lefts = {round(float((pixels(ramp, row=row)[0, 0, 0] + 1) * 127.5)) for row in range(2000)}
    assert lefts == set(range(200 - SIDE + 1))  # every place comes, both ends included
    flips = [not torch.equal(pixels(picture(), row=r, random_flip=True), pixels(picture())) for r in range(1000)]
    assert 450 < sum(flips) < 550
    mirrored = torch.equal(pixels(picture(), row=flips.index(True), random_flip=True), pixels(picture()).flip(-1))
    assert mirrored


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    pixels(picture(40, 20), random_flip=True)
    assert torch.equal(before[0], torch.random.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()

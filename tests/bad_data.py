"""A folder of everything that goes wrong with training images, and of what looks wrong and is not.

    corpus = make(folder, "jsonl")      images with metadata.jsonl; "csv"; "texts": a.txt beside a.png; "flat": images
    corpus.good                         {path: what it must look like}
    corpus.bad                          {what the report calls it: a part of the reason}
    make(folder, kind, bad=False)       the same without the bad ones

All good pictures are 16x16, so that at a resolution of 16 each keeps its pixels.
"""

import io
import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16
NOISE = np.random.RandomState(18).randint(0, 256, (SIDE, SIDE, 3), np.uint8)
RAMP = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE)
LARGEST = 8  # levels of 255 that JPEG may be off


@dataclass
class Corpus:
    """A folder, what of it is good, and what is bad."""

    folder: Path
    good: dict[str, tuple[np.ndarray, float]] = field(default_factory=dict)
    """Path -> ([16, 16, 3] levels 0 to 255, the largest difference that is allowed)."""
    bad: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    """Good ones that the metadata names two times."""


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, float)[:, :, None], 3, axis=2)


# -- what is good ------------------------------------------------------------------------------------------------------


def good_images() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Name -> (content, what it must look like, the largest difference)."""
    noise, flat = Image.fromarray(NOISE), np.full((SIDE, SIDE, 3), 200.0)
    found = {
        "plain.png": (encoded(noise), NOISE, 0),
        "grey.png": (encoded(Image.fromarray(RAMP.astype(np.uint8))), grey(RAMP.astype(np.uint8)), 0),
        "wrong_extension.png": (encoded(Image.new("RGB", (SIDE, SIDE), (200,) * 3), "JPEG"), flat, LARGEST),
        "UPPER.JPEG": (encoded(Image.new("RGB", (SIDE, SIDE), (200,) * 3), "JPEG"), flat, LARGEST),
        "x.png/inside.png": (encoded(noise), NOISE, 0),  # a folder with the name of an image
        "cmyk.jpg": (encoded(Image.new("CMYK", (SIDE, SIDE)), "JPEG"), np.full((SIDE, SIDE, 3), 255.0), LARGEST),
    }
    red = np.broadcast_to(np.array([255.0, 0, 0]), (SIDE, SIDE, 3))
    cyan = Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0))
    cmyk = encoded(cyan, "JPEG", icc_profile=cmyk_profile((54.29, 80.81, 69.89)))
    found["cmyk_profile.jpg"] = (cmyk, red, LARGEST)
    found |= _deep() | _transparent() | _animated()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(_turned(noise, orientation), exif=exif)
        found[f"exif_{orientation}.png"] = (content, NOISE, 0)
    return found


def _deep() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """More than 8 bits, each the same ramp; an 8-bit viewer rounds it."""
    images = {
        "deep16.png": (RAMP * 257).astype(np.uint16),
        "deep16.tif": (RAMP * 257).astype(np.uint16),
        "integers32.tif": (RAMP * 257).astype(np.int32),
        "floats_to_1.tif": (RAMP / 255).astype(np.float32),
        "floats_to_255.tif": RAMP.astype(np.float32),
    }
    kinds = {".png": "PNG", ".tif": "TIFF"}
    return {n: (encoded(Image.fromarray(v), kinds[n[-4:]]), grey(RAMP), 0.01) for n, v in images.items()}


def _transparent() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Left half transparent over hidden black, right half opaque black; on white by default."""
    hidden = np.zeros((SIDE, SIDE, 4), np.uint8)
    hidden[:, SIDE // 2 :, 3] = 255
    shown = grey(np.where(hidden[..., 3] > 0, 0, 255))
    palette = Image.fromarray((hidden[..., 3] > 0).astype(np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 0])
    return {
        "rgba.png": (encoded(Image.fromarray(hidden)), shown, 0),
        "la.png": (encoded(Image.fromarray(hidden).convert("LA")), shown, 0),
        "palette.png": (encoded(palette, transparency=0), shown, 0),
        "palette.gif": (encoded(palette, "GIF", transparency=0), shown, 0),
    }


def _animated() -> dict[str, tuple[bytes, np.ndarray, float]]:
    frames = [Image.new("L", (SIDE, SIDE), level).convert("RGB") for level in (200, 10, 90)]
    several = {"save_all": True, "append_images": frames[1:]}
    shown = np.full((SIDE, SIDE, 3), 200.0)
    return {
        "animated.gif": (encoded(frames[0], "GIF", **several), shown, 0),
        "animated.png": (encoded(frames[0], "PNG", **several), shown, 0),
        "animated.webp": (encoded(frames[0], "WEBP", lossless=True, **several), shown, 0),
        "pages.tif": (encoded(frames[0], "TIFF", **several), shown, 0),
    }


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image as a camera stores it that notes `orientation`."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    return image.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else image


def cmyk_profile(cyan: tuple[float, float, float]) -> bytes:
    """A CMYK profile (ICC.1:2001-04, a lut8 of two points per ink) by which full cyan has this Lab colour (D50)."""

    def tag(kind: bytes, content: bytes) -> bytes:
        return (kind + bytes(4) + content).ljust(-(-(8 + len(content)) // 4) * 4, b"\0")

    identity = bytes(range(256))
    black, white = bytes([0, 128, 128]), bytes([255, 128, 128])
    inks = white + black * 7 + bytes([round(cyan[0] * 255 / 100), *(round(c + 128) for c in cyan[1:])]) + black * 7
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = tag(b"mft1", bytes([4, 3, 2, 0]) + matrix + identity * 4 + inks + identity * 3)
    paper = tag(b"XYZ ", struct.pack(">3i", 63190, 65536, 54061))
    name = tag(b"desc", struct.pack(">I", 5) + b"test\0" + bytes(78))
    tags = [(b"desc", name), (b"cprt", tag(b"text", b"none\0")), (b"wtpt", paper), (b"A2B0", lut)]
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for key, content in tags:
        table += key + struct.pack(">2I", start + len(body), len(content))
        body += content
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# -- what is bad -------------------------------------------------------------------------------------------------------


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Name -> (content, a part of the reason)."""
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    found = {
        "empty.png": (b"", "is empty"),
        "page.png": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "is not a PNG"),
        "zeros.jpg": (bytes(4096), "is not a PNG"),
        "bomb90.png": (bomb(9487, whole=True), "9487x9487, more than data.max_pixels"),
        "bomb169.png": (bomb(13000, whole=True), "13000x13000, more than data.max_pixels"),
        "bomb3600.png": (bomb(60000), "60000x60000, more than data.max_pixels"),
        "bomb.gif": (_gif_head(60000), "60000x60000, more than data.max_pixels"),
        "bomb.bmp": (_bmp_head(30000), "30000x30000, more than data.max_pixels"),
        "dot.png": (encoded(Image.new("RGB", (1, 1))), "1x1, with a side below data.min_side"),
        "strip.png": (encoded(Image.new("RGB", (4000, 1))), "4000x1, with a side below data.min_side"),
        "ribbon.png": (encoded(Image.new("RGB", (800, 8))), "longer than data.max_aspect_ratio"),
        "nan.tif": (encoded(Image.fromarray(np.full((SIDE, SIDE), np.nan, np.float32)), "TIFF"), "must lie within"),
        "floats_to_300.tif": (encoded(Image.fromarray((RAMP * 300 / 255).astype(np.float32)), "TIFF"), "lie within"),
        "phone.heic": (b"\0\0\0\x18ftypheic", "has a format that is not read"),
        "cmyk_rgb_profile.jpg": (_mismatched_profile(), "cannot be decoded"),
    }
    for kind in ("png", "jpg", "webp", "gif"):
        content = encoded(noise, "JPEG" if kind == "jpg" else kind.upper())
        found[f"cut.{kind}"] = (content[: len(content) * 2 // 3], "cannot be decoded")
    return found


def bomb(side: int, *, whole: bool = False) -> bytes:
    """A PNG of side x side white pixels, one bit each; unless `whole`, its data ends after a few of them."""
    row = b"\0" + b"\xff" * (-(-side // 8))
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(row * 100) for _ in range(-(-side // 100) if whole else 1)) + packer.flush()
    head = struct.pack(">2I", side, side) + bytes([1, 0, 0, 0, 0])
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _gif_head(side: int) -> bytes:
    return (
        b"GIF89a" + struct.pack("<2H3B", side, side, 0, 0, 0) + b"," + struct.pack("<4HB", 0, 0, side, side, 0) + b"\2"
    )


def _bmp_head(side: int) -> bytes:
    colours = b"\0\0\0\0\xff\xff\xff\0"
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 1, 0, 0, 0, 0, 2, 0)
    return struct.pack("<2sIHHI", b"BM", 100, 0, 0, 14 + 40 + 8) + info + colours + bytes(40)


def _mismatched_profile() -> bytes:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return encoded(Image.new("CMYK", (SIDE, SIDE)), "JPEG", icc_profile=profile)


def add_odd_files(corpus: Corpus) -> None:
    """Links, a pipe, names and permissions: files that must not be opened, or cannot."""
    folder, outside = corpus.folder, corpus.folder.parent / f"{corpus.folder.name}_outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(encoded(Image.new("RGB", (SIDE, SIDE))))
    (folder / "link_out.png").symlink_to(outside / "secret.png")
    (folder / "linked_folder").symlink_to(outside, target_is_directory=True)
    (folder / "nowhere.png").symlink_to(folder / "absent.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    corpus.bad |= {
        "link_out.png": "is a link that leads out of the folder", "linked_folder": "is a link to a folder",
        "nowhere.png": "is a link that leads to no file", "loop.png": "is a link that leads",
        "pipe.png": "is neither a file nor a folder",
    }  # fmt: skip
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:  # a name in Latin-1
        file.write(encoded(Image.fromarray(NOISE)))
    corpus.bad["caf\\udce9.png"] = "has a name that is not UTF-8"
    if os.geteuid():  # root reads everything
        (folder / "locked.png").write_bytes(encoded(Image.fromarray(NOISE)))
        (folder / "locked.png").chmod(0)
        corpus.bad["locked.png"] = "cannot be read"


# -- the folder --------------------------------------------------------------------------------------------------------


def make(folder: Path, kind: str, *, bad: bool = True) -> Corpus:
    """Write the corpus into a new folder."""
    corpus = Corpus(folder)
    folder.mkdir(parents=True)
    for name, (content, shown, difference) in good_images().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        corpus.good[name] = shown, difference
    (folder / "link_within.png").symlink_to("plain.png")
    corpus.good["link_within.png"] = corpus.good["plain.png"]
    (folder / ".hidden.png").write_bytes(b"")
    if bad:
        for name, (content, reason) in bad_images().items():
            (folder / name).write_bytes(content)
            corpus.bad[name] = reason
        add_odd_files(corpus)
    if kind == "texts":
        _add_texts(corpus, bad)
    elif kind != "flat":
        _add_metadata(corpus, kind, bad)
    return corpus


def _add_texts(corpus: Corpus, bad: bool) -> None:
    for name in [*corpus.good, *(bad_images() if bad else [])]:
        (corpus.folder / name).with_suffix(".txt").write_text(f"about {Path(name).stem}")
    if bad:
        for name, caption, reason in (
            ("latin1", b"caf\xe9", "latin1.txt is not UTF-8"),
            ("nul", b"a\0b", "nul.txt holds a NUL"),
            ("no_caption", None, "column 'text' is null"),
        ):
            (corpus.folder / f"{name}.png").write_bytes(encoded(Image.fromarray(NOISE)))
            corpus.bad[f"{name}.png"] = reason
            if caption is not None:
                (corpus.folder / f"{name}.txt").write_bytes(caption)


def _add_metadata(corpus: Corpus, kind: str, bad: bool) -> None:
    """A line for each image, then lines that are wrong in themselves; the report names rows by file and line."""
    folder, lines, file = corpus.folder, [], f"metadata.{kind}"
    if kind == "csv":
        lines.append(b"file_name,text")
    names = [*corpus.good, "plain.png", *(bad_images() if bad else [])]
    corpus.twice = ["plain.png"]
    for name in names:
        lines.append(_line(kind, name, f"about {Path(name).stem}"))
        if name in corpus.bad and name != "phone.heic":  # it is listed as a file, for it makes no row
            corpus.bad[f"{name} ({file}:{len(lines)})"] = corpus.bad.pop(name)
    if bad:
        for line, reason in {"jsonl": _bad_json, "csv": _bad_csv}[kind]():
            if reason:
                corpus.bad[f"{file}:{len(lines) + 1}"] = reason
            lines += line.split(b"\n")
        for name, line, reason in _bad_captions() if kind == "jsonl" else ():
            (folder / name).write_bytes(encoded(Image.fromarray(NOISE)))
            lines.append(line)
            corpus.bad[f"{name} ({file}:{len(lines)})"] = reason
        (folder / "extra.png").write_bytes(encoded(Image.fromarray(NOISE)))
        corpus.bad["extra.png"] = f"is not listed in {file}"
    (folder / file).write_bytes(b"\n".join(lines) + b"\n")


def _line(kind: str, name: str, text: str) -> bytes:
    return (json.dumps({"file_name": name, "text": text}) if kind == "jsonl" else f"{name},{text}").encode()


PATHS = [
    ("missing.png", "there is no file"), ("../secret.png", "'..'"), ("x.png/../../secret.png", "'..'"),
    ("/etc/passwd.png", "absolute"), ("C:\\secret.png", "absolute"), ("https://host/a.png", "address"),
    ("x.png", "is a folder"), ("linked_folder/secret.png", "behind a link"), (".hidden.png", "is hidden"),
]  # fmt: skip


def _bad_json() -> list[tuple[bytes, str]]:
    return [(_line("jsonl", path, "x"), reason) for path, reason in PATHS] + [
        (b'{"file_name": "plain.png", "text": "cut', "not JSON"),
        (b'["plain.png", "x"]', "not an object"),
        (b'{"text": "no name"}', "file_name is not a file name: None"),
        (b'{"file_name": 5, "text": "x"}', "file_name is not a file name: 5"),
        (b'{"file_name": "plain\\u0000.png", "text": "x"}', "holds a NUL character"),
        (b'{"file_name": "plain.png", "text": "a\0b"}', "not JSON"),
        (b'{"file_name": "plain.png", "text": "caf\xe9"}', "is not UTF-8 text"),
        (b'{"file_name": "plain.png", "text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b'{"file_name": "plain.png", "text": ' + b"1" * 10_000 + b"}", "not JSON"),
    ]


def _bad_csv() -> list[tuple[bytes, str | None]]:
    return [(_line("csv", path, "x"), reason) for path, reason in PATHS] + [
        (b"plain.png", "not 2 values"),
        (b"plain.png,a,b", "not 2 values"),
        (b"plain.png,a\0b", "holds a NUL character"),
        (b"plain.png,caf\xe9", "is not UTF-8 text"),
        (b"", None),
        (b"plain.png," + b"x" * 200_000, "not CSV: field larger"),
        (b'plain.png,"two\nlines" and more', "not CSV"),
        (b'plain.png,"a quote that nobody closes', "not CSV: unexpected end"),
    ]


def _bad_captions() -> list[tuple[str, bytes, str]]:
    return [
        ("null.png", b'{"file_name": "null.png", "text": null}', "has no caption: column 'text' is null"),
        ("no_text.png", b'{"file_name": "no_text.png"}', "has no caption: column 'text' is null"),
        ("number.png", b'{"file_name": "number.png", "text": 5}', "'text' is a number where other lines have text"),
        ("list.png", b'{"file_name": "list.png", "text": ["a"]}', "'text' is a list where other lines have text"),
    ]

"""A local folder of images -> columns: flat, class sub-folders, metadata.jsonl or .csv, or a.jpg beside a.txt.

Not by load_dataset("imagefolder"), which drops images that the metadata does not list and names no line of it, follows
links and paths out of the folder, guesses splits from file names, and knows no a.txt.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from finetune.errors import DataError
from finetune.images import EXTENSIONS, FORMATS
from finetune.metadata import records

METADATA = ("metadata.jsonl", "metadata.csv")
TABLES = frozenset({".parquet", ".arrow", ".csv", ".json", ".jsonl"})
UNSUPPORTED = frozenset(".avif .heic .heif .jxl .jp2 .psd .svg .tga .ico .ppm .pgm .exr .hdr .dng .cr2 .nef".split())
SPLITS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"})
MOST_LISTED = 50


class Problem(NamedTuple):
    """One thing that is wrong with the data: where, and what."""

    name: str
    reason: str


@dataclass
class Listing:
    """The files under a folder by what they are, as sorted relative paths with "/", hidden ones left out."""

    root: Path
    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """What is not looked into or not opened: see `_walk`."""


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """The parts of data whose images come several times per epoch, each time as a row of its own (sd-scripts)."""

    names: tuple[str, ...]
    repeats: tuple[int, ...]
    wording: tuple[Mapping[str, Any], ...]
    """Settings of `captions` that a part has instead of the run's."""
    of: np.ndarray
    """[rows] int64: the part of each row."""
    first: np.ndarray
    """[rows] int64: the number of the first row of the same image and caption."""


@dataclass(frozen=True)
class Folder:
    """A folder of images, read."""

    columns: dict[str, list[Any]]
    """"image" holds paths relative to the folder."""
    class_names: list[str] | None
    """Of "label", if it is the sub-folder."""
    problems: list[Problem]
    lines: list[str] | None
    """Where the metadata tells of each row, such as "metadata.jsonl:7"; None without metadata."""
    subsets: Subsets | None = None


def scan(root: Path) -> Listing:
    """List the files under `root`, which is resolved first; links to folders are not followed."""
    listing = Listing(Path(os.path.realpath(root)))
    for path, problem in sorted(_walk(listing.root, "")):
        name, suffix = path.rsplit("/", 1)[-1], os.path.splitext(path)[1].lower()
        if problem:
            listing.problems.append(Problem(path, problem))
        elif name in METADATA or name == "metadata.parquet":
            listing.metadata.append(path)
        elif suffix in EXTENSIONS:
            listing.images.append(path)
        elif suffix == ".txt":
            listing.texts.append(path)
        elif suffix in TABLES:
            listing.tables.append(path)
        elif suffix in UNSUPPORTED:
            listing.unsupported.append(path)
    return listing


def _walk(root: Path, under: str) -> Iterator[tuple[str, str]]:
    """(path, "") of each file that may be opened, (path, reason) of what is none."""
    try:
        with os.scandir(root / under) as entries:
            found = list(entries)
    except OSError as error:
        yield under.rstrip("/") or ".", f"cannot be listed: {error.strerror}"
        return
    for entry in found:
        if entry.name.startswith("."):  # .git, .DS_Store, and the ._a.jpg that macOS leaves on foreign disks
            continue
        path = under + entry.name
        if any("\ud800" <= letter <= "\udfff" for letter in entry.name):  # how Python shows bytes that are no text
            yield path.encode("ascii", "backslashreplace").decode(), "has a name that is not UTF-8 text: rename it"
        elif entry.is_symlink():
            yield path, _refusal_of_link(os.path.join(root, path), str(root))
        elif entry.is_dir():
            yield from _walk(root, path + "/")
        else:
            odd = _is_opened(path) and not entry.is_file()  # a pipe would be waited for without end
            yield path, "is neither a file nor a folder" if odd else ""


def _refusal_of_link(path: str, root: str) -> str:
    """Why a link is not opened, or ""."""
    if os.path.isdir(path):
        return f"is a link to a folder, which is not followed ({os.path.realpath(path)}): copy that folder"
    if not _is_opened(path):
        return ""
    if not is_within(path, (root,)):
        return f"is a link that leads out of the folder of the data ({os.path.realpath(path)}): copy the file"
    return "" if os.path.isfile(path) else "is a link that leads to no file"


def _is_opened(path: str) -> bool:
    """Whether files of this name are opened by `image_bytes` or here; tables are opened by datasets."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix in EXTENSIONS or suffix == ".txt" or os.path.basename(path) in METADATA


def choose_split(listing: Listing, split: str) -> Listing:
    """The sub-folder of the split, where all images stand in sub-folders named like splits; else the folder itself."""
    tops = {path.split("/", 1)[0] if "/" in path else "" for path in listing.images}
    at_root = any("/" not in path for path in listing.metadata)
    if at_root or not tops or not tops <= SPLITS:
        return listing
    if split not in tops:
        raise DataError(f"{listing.root} has no split {split!r} (data.split); it has: {', '.join(sorted(tops))}")
    chosen = scan(listing.root / split)
    chosen.problems += [problem for problem in listing.problems if problem.name.split("/", 1)[0] not in SPLITS]
    return chosen


def unsafe_path(path: object) -> str | None:
    """Why a path that was read from a file must not be opened, or None: it has to be relative and stay below."""
    if not isinstance(path, str) or not path:
        return f"is not a file name: {path!r}"
    if "\0" in path:
        return f"holds a NUL character: {path!r}"
    if "://" in path or "::" in path:
        return f"is an address, not a local file: {path!r}"
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor:
        return f"is an absolute path: {path!r}; write it relative to the folder of the data"
    if ".." in PurePosixPath(path.replace("\\", "/")).parts:
        return f"leads out of its folder by '..': {path!r}"
    return None


def is_within(path: str, folders: tuple[str, ...]) -> bool:
    """Whether the real path of `path`, all links followed, lies in one of `folders` (real paths themselves)."""
    real = os.path.realpath(path)
    return any(real.startswith(os.path.join(folder, "")) for folder in folders)


def read_folder(listing: Listing, *, captions: bool) -> Folder:
    """The columns of an image folder, and what is wrong with it.

    "label": the sub-folder, an index into the class names, if every image stands in a direct sub-folder and there is
    no metadata column of that name. "text", if `captions` are wanted: the stripped text of a.txt beside a.jpg, None
    where only some images have one. Raises DataError where the folder contradicts itself.
    """
    root = listing.root
    for name, reason in listing.problems:
        if name in METADATA:  # to go on without it would train on other data
            raise DataError(f"{root / name} {reason}")
    metadata = [path for path in listing.metadata if "/" not in path]
    nested = [path for path in listing.metadata if "/" in path]
    stems = {os.path.splitext(path)[0] for path in listing.images}
    texts = {os.path.splitext(path)[0]: path for path in listing.texts if os.path.splitext(path)[0] in stems}
    if nested:
        raise DataError(f"{root / nested[0]} must stand in {root} itself, with file_name relative to it")
    if metadata == ["metadata.parquet"]:
        raise DataError(f"{root / metadata[0]} is not read: give metadata.jsonl or metadata.csv")
    if len(metadata) > 1:
        raise DataError(f"{root} has {' and '.join(metadata)}: keep one of them")
    if metadata and texts:
        example = next(iter(texts.values()))
        raise DataError(f"{root} has captions in {metadata[0]} and in text files ({example}, ...): keep one of them")

    formats = f"has a format that is not read: convert it to one of {', '.join(FORMATS)}"
    problems = [*listing.problems, *(Problem(path, formats) for path in listing.unsupported)]
    columns: dict[str, list[Any]] = {"image": listing.images}
    lines = None
    if metadata:
        columns, lines = _read_metadata(listing, root / metadata[0], problems)
    elif texts and captions:
        columns["text"] = [_read_text(root, path, texts, problems) for path in listing.images]
    names = None
    if columns["image"] and "label" not in columns and all(path.count("/") == 1 for path in columns["image"]):
        folders = [path.split("/", 1)[0] for path in columns["image"]]
        names = sorted(set(folders))
        index = {name: number for number, name in enumerate(names)}
        columns["label"] = [index[folder] for folder in folders]
    return Folder(columns, names, problems, lines)


def _read_text(root: Path, image: str, texts: dict[str, str], problems: list[Problem]) -> str | None:
    path = texts.get(os.path.splitext(image)[0])
    if path is None:
        return None
    try:
        text = (root / path).read_text(encoding="utf-8-sig").strip()
        if "\0" not in text:
            return text
        reason = "holds a NUL character"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text ({error.reason} at byte {error.start})"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    problems.append(Problem(image, f"has no caption: {path} {reason}"))
    return None


def _read_metadata(listing: Listing, path: Path, problems: list[Problem]) -> tuple[dict[str, list[Any]], list[str]]:
    """The columns of the metadata file, file_name as "image", and the line of each row. Appends to `problems`."""
    images, told = set(listing.images), {problem.name for problem in problems}
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    listed: set[str] = set()
    for number, record in records(path):
        line = f"{path.name}:{number}"
        reason = record if isinstance(record, str) else unsafe_path(record.get("file_name"))
        if reason:
            problems.append(Problem(line, reason if isinstance(record, str) else f"file_name {reason}"))
            continue
        name = str(PurePosixPath(record["file_name"]))
        listed.update(cell for cell in record.values() if isinstance(cell, str) and cell in images)  # such as its mask
        listed.add(name)
        if name in images:
            rows.append({**record, "image": name})
            lines.append(line)
        elif name not in told:
            problems.append(Problem(line, _why_no_image(listing.root, name)))
    problems.extend(Problem(name, f"is not listed in {path.name}") for name in sorted(images - listed))
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {"image": []} | {key: [row.get(key) for row in rows] for key in keys if key != "file_name"}
    for key, cells in columns.items():
        for row, reason in _drop_mixed(cells):
            problems.append(Problem(f"{columns['image'][row]} ({lines[row]})", f"{key!r} is {reason}"))
    return columns, lines


def _why_no_image(root: Path, name: str) -> str:
    """Why a name of the metadata is not among the images of the folder."""
    if not (root / name).exists():
        return f"there is no file {name!r}"
    if (root / name).is_dir():
        return f"{name!r} is a folder"
    if os.path.splitext(name)[1].lower() not in EXTENSIONS:
        return f"{name!r} does not have the extension of an image"
    return f"{name!r} is hidden, or behind a link to a folder: neither is looked at"


KINDS = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


def _drop_mixed(cells: list[Any]) -> Iterator[tuple[int, str]]:
    """Of a column of several kinds, make those cells None that are not of its most frequent one; yield why."""
    kinds = [cell is not None and KINDS[type(cell)] for cell in cells]
    counted = Counter(filter(None, kinds))
    usual = max(counted, key=lambda kind: (counted[kind], kind == "text"), default=None)
    for row, kind in enumerate(kinds):
        if kind and kind != usual:
            yield row, f"{kind} where other lines have {usual}: {cells[row]!r:.60}"
            cells[row] = None

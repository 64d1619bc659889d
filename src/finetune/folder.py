"""A local folder of images -> columns: flat, class sub-folders, metadata.jsonl or .csv, or a.jpg beside a.txt.

Not by load_dataset("imagefolder"), which drops images that the metadata does not list and names no line of it, follows
links and paths out of the folder, guesses splits from file names, and knows no a.txt.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from finetune.errors import DataError
from finetune.images import EXTENSIONS, FORMATS

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
    links: list[str] = field(default_factory=list)


def scan(root: Path) -> Listing:
    """List the files under `root`, which is resolved first. Raises DataError at a link to a folder (not followed)."""
    listing = Listing(Path(os.path.realpath(root)))
    for path, linked in sorted(_walk(listing.root, "")):
        name, suffix = path.rsplit("/", 1)[-1], os.path.splitext(path)[1].lower()
        if name in METADATA or name == "metadata.parquet":
            listing.metadata.append(path)
        elif suffix in EXTENSIONS:
            listing.images.append(path)
        elif suffix == ".txt":
            listing.texts.append(path)
        elif suffix in TABLES:
            listing.tables.append(path)
        elif suffix in UNSUPPORTED:
            listing.unsupported.append(path)
        if linked:
            listing.links.append(path)
    return listing


def _walk(root: Path, under: str) -> Iterator[tuple[str, bool]]:
    with os.scandir(root / under) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # .git, .DS_Store, and the ._a.jpg that macOS leaves on foreign disks
                continue
            path = under + entry.name
            if not entry.is_dir():
                yield path, entry.is_symlink()
            elif entry.is_symlink():
                raise DataError(f"{root / path} is a link to a folder, which is not followed: name that folder itself")
            else:
                yield from _walk(root, path + "/")


def choose_split(listing: Listing, split: str) -> Listing:
    """The sub-folder of the split, where all images stand in sub-folders named like splits; else the folder itself."""
    tops = {path.split("/", 1)[0] if "/" in path else "" for path in listing.images}
    at_root = any("/" not in path for path in listing.metadata)
    if at_root or not tops or not tops <= SPLITS:
        return listing
    if split not in tops:
        raise DataError(f"{listing.root} has no split {split!r} (data.split); it has: {', '.join(sorted(tops))}")
    return scan(listing.root / split)


def unsafe_path(path: object) -> str | None:
    """Why a path that was read from a file must not be opened, or None: it has to be relative and stay below."""
    if not isinstance(path, str) or not path:
        return f"is not a file name: {path!r}"
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


def read_folder(listing: Listing, *, captions: bool) -> tuple[dict[str, list[Any]], list[str] | None, list[Problem]]:
    """Columns of an image folder ("image" holds paths relative to it), its class names, and what is wrong with it.

    "label": the sub-folder, an index into the class names, if every image stands in a direct sub-folder and there is
    no metadata column of that name. "text", if `captions` are wanted: the stripped text of a.txt beside a.jpg, None
    where only some images have one. Raises DataError where the folder contradicts itself or leads out of itself.
    """
    root = listing.root
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
    _refuse_links(listing, {*listing.images, *texts.values(), *metadata})

    formats = f"has a format that is not read: convert it to one of {', '.join(FORMATS)}"
    problems = [Problem(path, formats) for path in listing.unsupported]
    columns: dict[str, list[Any]] = {"image": listing.images}
    if metadata:
        columns = _read_metadata(root / metadata[0], set(listing.images), problems)
    elif texts and captions:
        columns["text"] = [_read_text(root, texts.get(os.path.splitext(path)[0]), problems) for path in listing.images]
    names = None
    if columns["image"] and "label" not in columns and all(path.count("/") == 1 for path in columns["image"]):
        folders = [path.split("/", 1)[0] for path in columns["image"]]
        names = sorted(set(folders))
        index = {name: number for number, name in enumerate(names)}
        columns["label"] = [index[folder] for folder in folders]
    return columns, names, problems


def _refuse_links(listing: Listing, used: set[str]) -> None:
    root = str(listing.root)
    out = [path for path in listing.links if path in used and not is_within(os.path.join(root, path), (root,))]
    if out:
        shown = "\n".join(f"  {path} -> {os.path.realpath(os.path.join(root, path))}" for path in out[:MOST_LISTED])
        raise DataError(f"{len(out)} links in {root} lead out of it; copy the files instead:\n{shown}")


def _read_text(root: Path, path: str | None, problems: list[Problem]) -> str | None:
    if path is None:
        return None
    try:
        return (root / path).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        problems.append(Problem(path, f"is not UTF-8 text ({error.reason} at byte {error.start})"))
        return None


def _read_metadata(path: Path, images: set[str], problems: list[Problem]) -> dict[str, list[Any]]:
    """The columns of the metadata file, file_name as "image". Appends what is missing to `problems`."""
    records, unsafe, listed = [], [], set()
    for line, record in _records(path):
        reason = unsafe_path(record.get("file_name"))
        if reason:
            unsafe.append(f"  {path.name}:{line}: file_name {reason}")
            continue
        name = str(PurePosixPath(record["file_name"]))
        listed.add(name)
        if name in images:
            records.append({**record, "image": name})
        elif not (path.parent / name).exists():
            problems.append(Problem(f"{path.name}:{line}", f"there is no file {name!r}"))
        elif os.path.splitext(name)[1].lower() not in UNSUPPORTED:  # those are listed already
            problems.append(Problem(f"{path.name}:{line}", f"{name!r} does not have the extension of an image"))
    if unsafe:
        raise DataError(f"{len(unsafe)} lines of {path} are refused:\n" + "\n".join(unsafe[:MOST_LISTED]))
    problems.extend(Problem(name, f"is not listed in {path.name}") for name in sorted(images - listed))
    keys = dict.fromkeys(key for record in records for key in record)
    return {"image": []} | {key: [record.get(key) for record in records] for key in keys if key != "file_name"}


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) for each row of a .jsonl or .csv file. Raises DataError with the line."""
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as lines:
            yield from (_csv_records if path.suffix == ".csv" else _json_records)(path, lines)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _csv_records(path: Path, lines) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines)
    if "file_name" not in (reader.fieldnames or []):
        raise DataError(f"{path}:1: the first line must name the columns, one of them file_name")
    for record in reader:
        if None in record or None in record.values():
            raise DataError(f"{path}:{reader.line_num}: not {len(reader.fieldnames)} values as in the first line")
        yield reader.line_num, record


def _json_records(path: Path, lines) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise DataError(f'{path}:{number}: a line must be an object, such as {{"file_name": "a.png"}}')
        yield number, record

"""Images as sd-scripts lays them out: folders of which each image comes several times per epoch.

Either all images lie in sub-folders 10_name, the number being that of the repeats, or a dataset_config names the
folders (kohya_config.py). As there, only the images directly in a folder are its own, the first line of a text file is
the caption, and the folder's name, or class_tokens, is that of an image without one. Unlike there, an image without any
caption is refused, and so is one with two.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import DataError
from finetune.folder import Folder, Listing, Problem, Subsets, is_within, scan, unsafe_path
from finetune.images import FORMATS
from finetune.kohya_config import Subset
from finetune.metadata import records

log = logging.getLogger(__name__)
MOST_REPEATS = 999  # of a folder's name: 2024_summer is a year


def layout_of(listing: Listing) -> list[Subset] | None:
    """The sub-folders 10_name of a folder, if all of its images lie directly in such and there is no metadata."""
    tops = sorted({path.split("/", 1)[0] for path in listing.images})
    if listing.metadata or not tops or any(path.count("/") != 1 for path in listing.images):
        return None
    named = [re.fullmatch(r"(\d+)_(.*)", top) for top in tops]
    if not all(named):
        return None
    if not all(1 <= int(name[1]) <= MOST_REPEATS for name in named):
        log.warning("%s: the numbers before the names of its folders (%s) are not taken for repeats, as not all lie "
                    "within 1 to %d", listing.root, ", ".join(tops[:3]), MOST_REPEATS)  # fmt: skip
        return None
    return [Subset(image_dir=str(listing.root / name[0]), repeats=int(name[1]), class_tokens=name[2]) for name in named]


def read_subsets(subsets: list[Subset], *, captions: bool, root: Path | None = None) -> Folder:
    """The images of all subsets, repeated, and what is wrong with them.

    root: what the paths of "image" are relative to; unset: they are absolute. "text" is there if `captions` are
    wanted, None for an image without one. Raises DataError for a folder that is none, or holds no image.
    """
    images: list[str] = []
    texts: list[str | None] = []
    problems: list[Problem] = []
    of: list[int] = []
    first: list[int] = []
    for number, subset in enumerate(subsets):
        listing, told = _listed(subset), []
        subset = subset if captions else replace(subset, extensions=())
        read = _of_metadata if subset.metadata_file else _of_folder
        pairs = read(subset, listing, told)
        place = f"{listing.root}/" if root is None else f"{listing.root.name}/"
        problems += [Problem(place + name, reason) for name, reason in (*listing.problems, *told)]
        first += [*range(len(images), len(images) + len(pairs))] * subset.repeats
        of += [number] * (len(pairs) * subset.repeats)
        images += [place + image for image, _ in pairs] * subset.repeats
        texts += [text for _, text in pairs] * subset.repeats
    columns: dict[str, list[Any]] = {"image": images} | ({"text": texts} if captions else {})
    parts = Subsets(
        names=tuple(Path(subset.image_dir).name for subset in subsets),
        repeats=tuple(subset.repeats for subset in subsets),
        wording=tuple(subset.wording for subset in subsets),
        of=np.array(of, np.int64),
        first=np.array(first, np.int64),
    )
    return Folder(columns, None, problems, None, parts)


def _listed(subset: Subset) -> Listing:
    path = Path(subset.image_dir).expanduser()
    if not path.is_dir():
        raise DataError(f"data.dataset_config: image_dir {subset.image_dir} is not a folder (of {os.getcwd()})")
    return scan(path)


def _of_folder(subset: Subset, listing: Listing, problems: list[Problem]) -> list[tuple[str, str | None]]:
    """The images that lie directly in the folder, each with its caption."""
    own = [path for path in listing.images if "/" not in path]
    if not own:
        raise DataError(f"{listing.root} holds no images (.png, .jpg, ...) of its own: take it out of the data")
    if len(own) < len(listing.images):
        log.warning("%s: %d images in its sub-folders are not read, as in sd-scripts: list these folders by themselves",
                    listing.root, len(listing.images) - len(own))  # fmt: skip
    formats = f"has a format that is not read: convert it to one of {', '.join(FORMATS)}"
    problems += [Problem(path, formats) for path in listing.unsupported if "/" not in path]
    pairs: list[tuple[str, str | None]] = []
    longer = 0
    for image in own:
        stem, lines = os.path.splitext(image)[0], None
        names = [stem + extension for extension in subset.extensions if (listing.root / (stem + extension)).is_file()]
        if len(names) > 1:
            problems.append(Problem(image, f"has two captions, {' and '.join(names)}: keep one, or choose by "
                                           "caption_extension in a data.dataset_config"))  # fmt: skip
        elif names:
            lines = _lines(listing.root, names[0], image, problems)
            longer += bool(lines and lines[1:])
        elif subset.class_tokens is None and subset.extensions:
            problems.append(Problem(image, f"has no caption: write {' or '.join(stem + e for e in subset.extensions)}, "
                                           "or set class_tokens, which is the caption of such images"))  # fmt: skip
        pairs.append((image, subset.class_tokens if not names else lines and lines[0]))
    if longer:
        log.warning("%s: of %d text files only the first line is read, as in sd-scripts", listing.root, longer)
    return pairs


def _lines(root: Path, name: str, image: str, problems: list[Problem]) -> list[str] | None:
    """The lines of a text file that are not empty, at least one; or None with the problem noted."""
    try:
        if not is_within(str(root / name), (str(root),)):
            raise ValueError("leads out of the folder of the data: copy the file")
        text = (root / name).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("holds a NUL character")
        return [line for each in text.splitlines() if (line := each.strip())] or [""]
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text ({error.reason} at byte {error.start})"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except ValueError as error:
        reason = str(error)
    problems.append(Problem(image, f"has no caption: {name} {reason}"))
    return None


def _of_metadata(subset: Subset, listing: Listing, problems: list[Problem]) -> list[tuple[str, str | None]]:
    """The images that the metadata_file names, by path or, as older files do, without extension; caption and tags."""
    by_name = {os.path.splitext(image)[0]: image for image in listing.images} | {path: path for path in listing.images}
    glue = f"{subset.wording.get('separator', ',').rstrip()} "
    pairs: list[tuple[str, str | None]] = []
    for place, name, entry in _entries(Path(subset.metadata_file).expanduser()):
        relative = os.path.relpath(name, listing.root) if os.path.isabs(name) else name
        texts = [entry.get(each) for each in ("caption", "tags")] if isinstance(entry, dict) else [0]
        if reason := unsafe_path(relative):
            problems.append(Problem(place, f"the image {name!r} {reason}"))
        elif relative not in by_name:
            problems.append(Problem(place, f"there is no image {name!r} in {listing.root}"))
        elif not all(text is None or isinstance(text, str) for text in texts):
            problems.append(Problem(place, f"{name!r} has no caption and tags of text, as sd-scripts writes them"))
        else:
            words = [text for text in texts if text is not None]
            pairs.append((by_name[relative], glue.join(filter(None, words)) if words else None))
    if left := len(set(listing.images) - {image for image, _ in pairs}):
        log.warning("%s: %d images are not listed in %s, and not trained on", listing.root, left, subset.metadata_file)
    return pairs


def _entries(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(what a problem calls it, name of the image, what is said of it) of a metadata_file: JSON, or JSON lines."""
    if path.suffix == ".jsonl":
        for number, record in records(path):
            if isinstance(record, str) or not isinstance(record.get("image_path"), str):
                raise DataError(f"{path}:{number}: {record if isinstance(record, str) else 'has no image_path'}")
            yield f"{path.name}:{number}", record["image_path"], record
        return
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise DataError(f"data.dataset_config: metadata_file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.dataset_config: metadata_file {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"data.dataset_config: metadata_file {path} must hold one object, image by image")
    yield from ((path.name, name, entry) for name, entry in content.items())

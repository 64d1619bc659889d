"""The check before training: every row is read and decoded once, and everything that is wrong is told at once.

What it finds is kept in the user's cache, so that the next run on the same data starts without decoding it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from finetune.config import Data
from finetune.durable import write
from finetune.errors import DataError
from finetune.folder import MOST_LISTED, Problem
from finetune.images import BadRow, decode, mask_of, strict_pillow
from finetune.rows import Row, Rows, Unreadable

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # a name must not forge lines of a report
IMAGE_DIGEST = 16  # bytes of the digest of an image that are kept
CHUNK = 32  # rows that one thread reads at a time
VERSION = 5  # of what a check does and stores; raise it with either
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What the check found."""

    bad: dict[int, Problem]
    """The rows that cannot be used."""
    digests: np.ndarray
    """[rows checked] int64: identifies images, captions and label of a usable row, wherever they are stored; else 0."""
    images: np.ndarray
    """[rows checked, 16] uint8: identifies the stored bytes of the image alone of a usable row; else 0."""
    sizes: np.ndarray
    """[rows checked, 2] int32: height and width of the upright image of a usable row, in pixels; else 0."""
    facts: dict[str, Any]
    """Numbers about the usable rows, all of JSON's types."""


@dataclass(frozen=True)
class _Checked:
    """One row after its check: a problem, or what it is."""

    number: int
    problem: Problem | None
    passing: bool = False
    """Whether the problem may pass while the file stays as it is."""
    digest: int = 0
    image: bytes = bytes(IMAGE_DIGEST)
    size: tuple[int, int] = (0, 0)
    traits: frozenset[str] = frozenset()
    captions: tuple[str, ...] = ()
    label: int | None = None


def check(rows: Rows, numbers: np.ndarray, rules: Data, *, factor: int = 1, progress: bool = True) -> Report:
    """Check the rows `numbers`, or take the answer from the cache if neither data nor rules changed since.

    Decoding runs in threads: Pillow's decoders let go of Python's lock. Costs about what one epoch of decoding costs.
    """
    entry, files = _cache_entry(rows, numbers, rules, factor), _files_digest(rows, numbers)
    if known := _load(entry, files):
        return known
    checked = _check_all(rows, numbers, rules, factor, progress)
    good = [row for row in checked if not row.problem]
    bad = {row.number: row.problem for row in checked if row.problem}
    digests = np.array([row.digest for row in checked], np.int64)
    images = np.frombuffer(b"".join(row.image for row in checked), np.uint8).reshape(-1, IMAGE_DIGEST)
    sizes = np.array([row.size[::-1] for row in checked], np.int32).reshape(-1, 2)
    report = Report(bad, digests, images, sizes, _facts(rows, good, rules))
    if not any(row.passing for row in checked):
        _store(entry, files, report)
    return report


def explain(problems: list[Problem], source: str) -> str:
    """All that is wrong with the data, as one message of at most 50 lines."""
    lines = [f"  {CONTROL.sub(_escaped, f'{name}: {reason}')}" for name, reason in problems[:MOST_LISTED]]
    more = len(problems) - len(lines)
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)} in {source}:"
    return "\n".join([count, *lines, *([f"  ... and {more} more"] if more else [])])


def _escaped(control: re.Match[str]) -> str:
    return control[0].encode("unicode_escape").decode()


def _check_all(rows: Rows, numbers: np.ndarray, rules: Data, factor: int, progress: bool) -> list[_Checked]:
    """What each row is. A repeated image is checked once, and what that found stands for all of its rows."""
    same = numbers if rows.subsets is None else rows.subsets.first[numbers]
    _, once, of = np.unique(same, return_index=True, return_inverse=True)
    numbers = numbers[once]
    chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
    checked: list[_Checked] = []
    bar = tqdm(total=len(numbers), desc="check data", unit="image", delay=2, disable=None if progress else True)
    with bar, strict_pillow(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for found in threads.map(
            lambda chunk: [_check_row(rows, row, rules, factor) for row in rows.read(chunk)], chunks
        ):
            checked += found
            bar.update(len(found))
    return [checked[i] for i in of]


def _check_row(rows: Rows, row: Row, rules: Data, factor: int) -> _Checked:
    try:
        captions, label = rows.captions(row), rows.label(row)
        content = rows.image_bytes(row)
        decoded = decode(content, rules)
        mask = rows.mask_bytes(row)
        mask_of(decoded, mask, rules)
        small = rows.image_bytes(row.small) if row.small else b""
        if row.small:
            _check_pair(decode(small, rules).size, decoded.size, factor)
    except BadRow as problem:
        return _Checked(row.number, Problem(row.name, str(problem)), passing=isinstance(problem, Unreadable))
    images = [hashlib.blake2b(image).digest() for image in (content, small) if image]
    masks = [hashlib.blake2b(mask, person=b"mask").digest()] if mask else []
    return _Checked(
        row.number,
        None,
        digest=rows.digest(row, images + masks),
        image=images[0][:IMAGE_DIGEST],
        size=decoded.size,
        traits=decoded.traits,
        captions=captions or (),
        label=label,
    )


def _check_pair(small: tuple[int, int], size: tuple[int, int], factor: int) -> None:
    """Raise BadRow unless the small image is exactly `factor` times smaller, so that one crop is another's."""
    if (small[0] * factor, small[1] * factor) != size:
        raise BadRow(
            f"is {size[0]}x{size[1]} and its small image {small[0]}x{small[1]}, which must be smaller by the factor of "
            f"conditioning low_res, {factor}, on both sides"
        )


def _facts(rows: Rows, good: list[_Checked], rules: Data) -> dict[str, Any]:
    facts: dict[str, Any] = {"rows": len(good)}
    if not good:
        return facts
    good = list({row.number: row for row in good}.values())  # what follows counts repeated images once
    for side, index in (("width", 0), ("height", 1)):
        sizes = [row.size[index] for row in good]
        facts[side] = {"min": min(sizes), "median": statistics.median_low(sizes), "max": max(sizes)}
    facts["upscaled"] = sum(min(row.size) < rules.resolution for row in good)
    facts["duplicates"] = len(good) - len({row.digest for row in good})
    facts["traits"] = dict(sorted(Counter(trait for row in good for trait in row.traits).items()))
    if rows.caption_columns or rows.instance_prompt is not None:
        captions = [caption for row in good for caption in row.captions]
        lengths = [len(caption) for caption in captions]
        facts["captions"] = {
            "count": len(captions),
            "different": len(set(captions)),
            "empty": lengths.count(0),
            "characters": {"min": min(lengths), "median": statistics.median_low(lengths), "max": max(lengths)},
        }
    if rows.subsets is not None:
        counts = Counter(int(rows.subsets.of[row.number]) for row in good)
        parts = zip(rows.subsets.names, rows.subsets.repeats, strict=True)
        facts["subsets"] = [
            {"name": name, "images": counts[part], "repeats": repeats} for part, (name, repeats) in enumerate(parts)
        ]
    if rows.class_names is not None:
        counts = Counter(row.label for row in good)
        facts["classes"] = {name: counts[index] for index, name in enumerate(rows.class_names)}
    return facts


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _files_digest(rows: Rows, numbers: np.ndarray) -> str:
    """Of the size and time of every file that the rows name."""
    states = [_size_and_time(path) for paths in rows.paths() for path in paths[numbers]]
    return _digest(np.array(states, np.int64).tobytes())


def _size_and_time(path: str | None) -> tuple[int, int]:
    if path is None:
        return -1, -1
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL character
        return -2, -2
    return state.st_size, state.st_mtime_ns


def _cache_entry(rows: Rows, numbers: np.ndarray, rules: Data, factor: int) -> Path:
    """The cache file for these rows and these rules; under the home of the Hugging Face caches (HF_HOME)."""
    settings = (rules.resolution, rules.channels, rules.background, rules.max_pixels, rules.min_side)
    what = (
        VERSION, PIL.__version__, rows.dataset._fingerprint, rows.folders, rows.image_column, rows.caption_columns,
        rows.label_column, rows.class_names, settings, rules.max_aspect_ratio, _digest(numbers.tobytes()),
        rows.low_res_column, factor, rows.label_from_filename, rows.mask_column, rules.alpha_mask,
        rules.unmasked_weight, rows.instance_prompt,
        *(() if rows.subsets is None else (rows.subsets.names, rows.subsets.repeats, rows.subsets.wording)),
    )  # fmt: skip
    name = f"{_digest(repr(what).encode())}.safetensors"
    return Path(datasets.config.HF_CACHE_HOME) / "finetune" / "datacheck" / name


def _load(entry: Path, files: str) -> Report | None:
    """The stored report, if it is whole and of files as they are now."""
    try:
        with safe_open(entry, framework="numpy") as stored:
            known = json.loads(stored.metadata()["report"])
            arrays = [stored.get_tensor(name) for name in ("digests", "images", "sizes")]
        if [_digest(array.tobytes()) for array in arrays] != known["contents"]:
            raise ValueError("its content is not what was written")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        logger.warning("the stored check of the data, %s, cannot be read and is made anew: %s", entry, error)
        return None
    bad = {number: Problem(name, reason) for number, name, reason in known["bad"]}
    return Report(bad, *arrays, known["facts"]) if known["files"] == files else None


def _store(entry: Path, files: str, report: Report) -> None:
    """Write all or nothing. A cache that cannot be written costs the next run some time, and this one nothing.

    files: as they were before they were read, so that one that changes meanwhile is checked again by the next run.
    """
    bad = [[number, *problem] for number, problem in report.bad.items()]
    tensors = {"digests": report.digests, "images": report.images, "sizes": report.sizes}
    contents = [_digest(array.tobytes()) for array in tensors.values()]
    known = {"bad": bad, "facts": report.facts, "files": files, "contents": contents}
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        aside = entry.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}")
        write(aside, [save(tensors, metadata={"report": json.dumps(known)})])
        aside.replace(entry)
    except OSError as error:
        logger.warning("the check of the data cannot be kept for the next run: %s", error)


def refuse_or_warn(problems: list[Problem], source: str, rules: Data) -> None:
    """Raise DataError with all problems, or list them as a warning if data.on_error is skip."""
    if problems and rules.on_error == "error":
        raise DataError(
            f"{explain(problems, source)}\nRepair or remove them, or leave them out with data.on_error skip"
        )
    if problems:
        logger.warning("%s\nThey are not trained on (data.on_error skip).", explain(problems, source))

"""The check before training: every row is read and decoded once, and everything that is wrong is told at once.

What it finds is kept in the user's cache, so that the next run on the same data starts without decoding it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
from tqdm import tqdm

from finetune.config import Data
from finetune.errors import DataError
from finetune.folder import MOST_LISTED, Problem
from finetune.images import BadRow, decode, strict_pillow
from finetune.rows import Row, Rows

CHUNK = 32  # rows that one thread reads at a time
VERSION = 1  # of what a check does and stores; raise it with either
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What the check found."""

    bad: dict[int, Problem]
    """The rows that cannot be used."""
    fingerprint: str
    """Identifies the content of the usable rows in their order: images, captions, labels. No paths, no settings."""
    facts: dict[str, Any]
    """Numbers about the usable rows, all of JSON's types."""


@dataclass(frozen=True)
class _Checked:
    """One row after its check: a problem, or what it is."""

    number: int
    stamp: bytes
    problem: Problem | None
    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    traits: frozenset[str] = frozenset()
    captions: tuple[str, ...] = ()
    label: int | None = None


def check(rows: Rows, numbers: np.ndarray, rules: Data, *, factor: int = 1, progress: bool = True) -> Report:
    """Check the rows `numbers`, or take the answer from the cache if neither data nor rules changed since.

    Decoding runs in threads: Pillow's decoders let go of Python's lock. Costs about what one epoch of decoding costs.
    """
    entry = _cache_entry(rows, numbers, rules, factor)
    known = _load(entry)
    if known is not None and (known["files"] is None or known["files"] == _stamps(rows, numbers)):
        bad = {number: Problem(name, reason) for number, name, reason in known["bad"]}
        return Report(bad, known["fingerprint"], known["facts"])
    checked = _check_all(rows, numbers, rules, factor, progress)
    bad = {row.number: row.problem for row in checked if row.problem}
    good = [row for row in checked if not row.problem]
    report = Report(bad, _digest(row.digest for row in good), _facts(rows, good, rules))
    listed = [[number, *problem] for number, problem in bad.items()]
    files = _digest(row.stamp for row in checked) if any(row.stamp for row in checked) else None
    _store(entry, {"bad": listed, "fingerprint": report.fingerprint, "facts": report.facts, "files": files})
    return report


def explain(problems: list[Problem], source: str) -> str:
    """All that is wrong with the data, as one message of at most 50 lines."""
    lines = [f"  {name}: {reason}" for name, reason in problems[:MOST_LISTED]]
    more = len(problems) - len(lines)
    return "\n".join([f"{len(problems)} problems in {source}:", *lines, *([f"  ... and {more} more"] if more else [])])


def _check_all(rows: Rows, numbers: np.ndarray, rules: Data, factor: int, progress: bool) -> list[_Checked]:
    chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
    checked: list[_Checked] = []
    bar = tqdm(total=len(numbers), desc="check data", unit="image", delay=2, disable=None if progress else True)
    with bar, strict_pillow(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for found in threads.map(
            lambda chunk: [_check_row(rows, row, rules, factor) for row in rows.read(chunk)], chunks
        ):
            checked += found
            bar.update(len(found))
    return checked


def _check_row(rows: Rows, row: Row, rules: Data, factor: int) -> _Checked:
    stamp = _stamp(rows, row)  # before reading: a file that changes meanwhile is checked again by the next run
    try:
        captions, label = rows.captions(row), rows.label(row)
        content = rows.image_bytes(row)
        decoded = decode(content, rules)
        small = rows.image_bytes(row.small) if row.small else b""
        if row.small:
            _check_pair(decode(small, rules).size, decoded.size, factor)
    except BadRow as problem:
        return _Checked(row.number, stamp, Problem(row.name, str(problem)))
    digest = rows.digest(row, content, small)
    return _Checked(row.number, stamp, None, digest, decoded.size, decoded.traits, captions or (), label)


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
    for side, index in (("width", 0), ("height", 1)):
        sizes = [row.size[index] for row in good]
        facts[side] = {"min": min(sizes), "median": statistics.median_low(sizes), "max": max(sizes)}
    facts["upscaled"] = sum(min(row.size) < rules.resolution for row in good)
    facts["traits"] = dict(sorted(Counter(trait for row in good for trait in row.traits).items()))
    if rows.caption_columns:
        captions = [caption for row in good for caption in row.captions]
        lengths = [len(caption) for caption in captions]
        facts["captions"] = {
            "count": len(captions),
            "different": len(set(captions)),
            "empty": lengths.count(0),
            "characters": {"min": min(lengths), "median": statistics.median_low(lengths), "max": max(lengths)},
        }
    if rows.class_names is not None:
        counts = Counter(row.label for row in good)
        facts["classes"] = {name: counts[index] for index, name in enumerate(rows.class_names)}
    return facts


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _stamps(rows: Rows, numbers: np.ndarray) -> str:
    """A digest of the size and time of every file that the rows name."""
    chunks = (rows.read(numbers[start : start + 1000]) for start in range(0, len(numbers), 1000))
    return _digest(_stamp(rows, row) for chunk in chunks for row in chunk)


def _stamp(rows: Rows, row: Row) -> bytes:
    """Number, size and time of the row's files; empty if the data set itself holds the images."""
    if row.small is not None:
        return _stamp(rows, replace(row, small=None)) + _stamp(rows, row.small)
    if row.content is not None:
        return b""
    try:
        state = os.stat(rows.file(row))
    except (BadRow, OSError) as problem:
        return f"{row.number} {problem}\n".encode()
    return f"{row.number} {state.st_size} {state.st_mtime_ns}\n".encode()


def _cache_entry(rows: Rows, numbers: np.ndarray, rules: Data, factor: int) -> Path:
    """The cache file for these rows and these rules; under the home of the Hugging Face caches (HF_HOME)."""
    settings = (rules.resolution, rules.channels, rules.background, rules.max_pixels, rules.min_side)
    what = (
        VERSION, PIL.__version__, rows.dataset._fingerprint, rows.folders, rows.image_column, rows.caption_columns,
        rows.label_column, rows.class_names, settings, rules.max_aspect_ratio, _digest([numbers.tobytes()]),
        rows.low_res_column, factor, rows.label_from_filename,
    )  # fmt: skip
    return Path(datasets.config.HF_CACHE_HOME) / "finetune" / "datacheck" / f"{_digest([repr(what).encode()])}.json"


def _load(entry: Path) -> dict[str, Any] | None:
    try:
        return json.loads(entry.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("the stored check of the data, %s, cannot be read and is made anew: %s", entry, error)
        return None


def _store(entry: Path, report: dict[str, Any]) -> None:
    """Write all or nothing. A cache that cannot be written costs the next run some time, and this one nothing."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False, encoding="utf-8") as file:
            json.dump(report, file)
        os.replace(file.name, entry)
    except OSError as error:
        logger.warning("the check of the data cannot be kept for the next run: %s", error)


def refuse_or_warn(problems: list[Problem], source: str, rules: Data) -> None:
    """Raise DataError with all problems, or list them as a warning if data.on_error is skip."""
    if problems and rules.on_error == "error":
        raise DataError(
            f"{explain(problems, source)}\nRepair or remove them, or leave them out with data.on_error skip"
        )
    if problems:
        logger.warning("%s\nThey are left out (data.on_error skip).", explain(problems, source))

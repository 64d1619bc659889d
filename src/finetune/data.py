"""The training data: opened, checked, and named by its content. Rows by number, samples by (row, epoch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from finetune.config import Data, TrainConfig
from finetune.datacheck import check, explain, refuse_or_warn
from finetune.errors import ConfigError, DataError
from finetune.images import BadRow, background_rgb, decode, strict_pillow, to_pixels
from finetune.rows import Row, Rows, rows_of
from finetune.seeding import key, permutation
from finetune.sources import open_source


@dataclass(frozen=True)
class Sample:
    """One training example."""

    pixels: torch.Tensor
    """[channels, resolution, resolution] float32 in [-1, 1]."""
    caption: str | None
    label: int | None


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """The usable rows of the data and the rules that make samples of them. Picklable, for loader processes."""

    table: Rows
    rules: Data
    seed: int
    rows: np.ndarray
    """[n] int64: the numbers of the usable rows, ascending."""
    fingerprint: str
    """Hexadecimal; the same wherever the same images, captions and labels are stored, in the same order."""
    facts: dict[str, Any]
    """What a reader should know of the data; JSON's types only."""

    def __len__(self) -> int:
        """The number of samples of one epoch."""
        return len(self.rows)

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class label; None unless conditioning.kind is class_label."""
        return None if self.table.class_names is None else list(self.table.class_names)

    def image_bytes(self, row: int) -> bytes:
        """The image of a row as it is stored, encoded."""
        return self.table.image_bytes(self.table.read([row])[0])

    def captions(self, row: int) -> tuple[str, ...] | None:
        """The captions of a row, of which each epoch draws one; None unless the conditioning is text."""
        return self.table.captions(self.table.read([row])[0])

    def samples(self, rows: Sequence[int], epochs: Sequence[int]) -> list[Sample]:
        """Make the sample of each row in its epoch. Raises DataError if a row changed since it was checked."""
        with strict_pillow():
            return [self._sample(row, int(e)) for row, e in zip(self.table.read(rows), epochs, strict=True)]

    def _sample(self, row: Row, epoch: int) -> Sample:
        try:
            image = decode(self.table.image_bytes(row), self.rules).image
            options, label = self.table.captions(row), self.table.label(row)
        except BadRow as problem:
            raise DataError(f"{row.name} {problem}; it was usable when the data was checked") from None
        pixels = to_pixels(image, self.rules, seed=self.seed, epoch=epoch, row=row.number)
        caption = None if options is None else options[key(self.seed, "caption", epoch, row.number) % len(options)]
        return Sample(pixels, caption, label)


def open_data(cfg: TrainConfig, *, dataset: Dataset | None = None, progress: bool = True) -> TrainData:
    """Open and check the data that `cfg.data` names, or `dataset` from Python.

    Captions are read if conditioning.kind is text or pooled_text, labels if it is class_label. In runs of several
    processes let the main one go first: it checks the data, the others find the answer in the cache. Raises DataError
    with everything that is wrong; with data.on_error skip, only if no usable row is left.
    """
    rules, kind = cfg.data, cfg.conditioning.kind
    try:
        background_rgb(rules.background)
    except ValueError as error:
        raise ConfigError(f"data.background: {error}; give a name such as white, or #rrggbb") from None
    text = kind in ("text", "pooled_text")
    source = open_source(rules, dataset, captions=text)
    if not len(source.dataset):
        raise DataError(explain(source.problems, source.name) if source.problems else f"{source.name} has no rows")
    table = rows_of(source, rules, captions=text, labels=kind == "class_label")
    if kind == "class_label" and (cfg.conditioning.num_classes or len(table.class_names)) < len(table.class_names):
        raise DataError(
            f"{source.name} has {len(table.class_names)} classes, more than conditioning.num_classes "
            f"{cfg.conditioning.num_classes}: unset it, or give at least as many"
        )
    numbers = _draw_rows(len(table), rules.max_train_samples, cfg.seed, source.name)
    report = check(table, numbers, rules, progress=progress)
    problems = [*source.problems, *report.bad.values()]
    refuse_or_warn(problems, source.name, rules)
    usable = numbers[~np.isin(numbers, list(report.bad))]
    if not len(usable):
        raise DataError(f"{source.name} has no usable row")
    facts = {"rows_found": len(table), "left_out": len(problems)} | report.facts
    return TrainData(table=table, rules=rules, seed=cfg.seed, rows=usable, fingerprint=report.fingerprint, facts=facts)


def _draw_rows(found: int, wanted: int | None, seed: int, name: str) -> np.ndarray:
    if wanted is None:
        return np.arange(found, dtype=np.int64)
    if wanted > found:
        raise DataError(f"data.max_train_samples {wanted} is more than the {found} rows of {name}")
    return np.sort(permutation(seed, "max_train_samples", 0, found)[:wanted])

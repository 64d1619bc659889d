"""The training data: opened, checked, and named by its content. Rows by number, samples by (row, epoch)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from finetune.config import Data, TrainConfig
from finetune.config_choices import conditions
from finetune.data_changes import fingerprint
from finetune.datacheck import check, explain, refuse_or_warn
from finetune.errors import ConfigError, DataError
from finetune.folder import Problem
from finetune.images import BadRow, background_rgb, decode, mask_of, prepare, strict_pillow
from finetune.order import InTurns, Order, RowOrder, UnitOrder, Units
from finetune.rows import Row, Rows, rows_of
from finetune.seeding import key, permutation
from finetune.shards import Shards
from finetune.sources import Source, open_source

log = logging.getLogger(__name__)
FIRST_ROWS = 16  # rows of a stream that are checked before training
REPLACEMENTS = 16  # rows that are tried in the place of one; if half of all are bad, all fail once in 65,536 times


class Replaced(NamedTuple):
    """A row that turned unusable after the check, and was replaced in one sample (data.on_error skip)."""

    row: int
    used: int
    """The row that stands in for it."""
    reason: str
    """Names the row, or its file, and what is wrong with it."""


@dataclass(frozen=True)
class Sample:
    """One training example."""

    row: int
    """Its number in the data set."""

    pixels: torch.Tensor
    """[channels, resolution, resolution] float32 in [-1, 1]."""
    caption: str | None
    label: int | None
    time_ids: tuple[int, ...]
    """Sizes: see `images.Prepared`."""
    low_res: torch.Tensor | None
    """The small image, if the data has one: see `images.Prepared`."""
    mask: torch.Tensor | None = None
    """How much each pixel counts, in a masked loss: see `images.Prepared`."""
    loss_weight: float | None = None
    """What its loss counts, with prior preservation."""
    replaced: Replaced | None = None
    """Set if `row` stands in for another one."""


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """The usable rows of the data and the rules that make samples of them. Picklable, for loader processes."""

    table: Rows
    rules: Data
    seed: int
    rows: np.ndarray | Units
    """[n] int64: the numbers of the usable rows, ascending; of a stream, those that are not known to be unusable."""
    digests: np.ndarray
    """[rows found] int64: what identifies the images, captions and label of a row of `rows`; 0 for all others."""
    fingerprint: str
    """Hexadecimal; the same wherever the same images, captions and labels are stored, in the same order; of a stream,
    wherever the same files are: by their footers and sizes. Class images do not count."""
    factor: int
    """Side of an image over that of the small image of data.low_res_column; 1 without one."""
    facts: dict[str, Any]
    """What a reader should know of the data; JSON's types only."""
    class_images_from: int | None = None
    """The first row that is a class image of prior preservation, as are all after it; None without."""
    class_weight: float = 1.0
    """What the loss of a class image counts."""

    def __len__(self) -> int:
        """The number of samples of one epoch; with class images, as many of them as of the others."""
        return len(self.rows) if self.class_images_from is None else 2 * self._instances

    @property
    def _instances(self) -> int:
        return int(np.searchsorted(self.rows, self.class_images_from))

    def order(self, *, global_batch: int) -> Order:
        """Which row comes when: of a stream as its row groups are read, else in one permutation of all."""
        if isinstance(self.rows, Units):
            buffer_size = self.table.dataset.buffer_size
            return UnitOrder(self.rows, seed=self.seed, buffer_size=buffer_size, global_batch=global_batch)
        if self.class_images_from is not None:
            own, others = self.rows[: self._instances], self.rows[self._instances :]
            return InTurns(RowOrder(own, seed=self.seed), RowOrder(others, seed=key(self.seed, "class images")))
        return RowOrder(self.rows, seed=self.seed)

    @property
    def content(self) -> str:
        """Hexadecimal; as `fingerprint`, and of the numbers of the rows, which crops and captions are drawn by."""
        where = np.flatnonzero(self.digests).tobytes()
        if self.class_images_from is not None:
            where += self.digests[self.class_images_from :].tobytes()
        return hashlib.blake2b(self.fingerprint.encode() + where, digest_size=16).hexdigest()

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

    def name(self, row: int) -> str:
        """What a message calls a row."""
        return self.table.name(self.table.read([row])[0])

    def with_order_of(self, then: np.ndarray) -> TrainData:
        """The data as a run goes on with it that began with the digests `then`; only for data.on_error skip.

        Rows that turned unusable since keep their places in the order, and are replaced when they are drawn; rows that
        were unusable then stay left out. No row may hold anything else (`data_changes.changes`).
        """
        now = self.digests
        assert len(then) == len(now) and ((then == now) | (then == 0) | (now == 0)).all()
        own = then[: self.class_images_from]
        return replace(self, rows=np.flatnonzero(then), digests=then, fingerprint=fingerprint(own))

    def samples(self, rows: Sequence[int], epochs: Sequence[int]) -> list[Sample]:
        """Make the sample of each row in its epoch.

        A row that turned unusable since it was checked is a DataError; with data.on_error skip another row stands in
        for it, which follows from (seed, epoch, row), so that every process and every resume makes the same of it.
        Training says so once per row: see `report_replaced`.
        """
        with strict_pillow():
            return [self._sample(row, int(e)) for row, e in zip(self.table.read(rows), epochs, strict=True)]

    def _sample(self, row: Row, epoch: int) -> Sample:
        try:
            return self._made(row, epoch)
        except BadRow as problem:
            checked = "" if isinstance(self.rows, Units) else "; it was usable when the data was checked"
            reason = f"{self.table.name(row)} {problem}{checked}"
        if self.rules.on_error == "error":
            raise DataError(reason)
        for attempt in range(REPLACEMENTS):
            drawn = key(self.seed, "replacement", epoch, row.number, attempt) % len(self.rows)
            other = int(self.rows[drawn])
            try:
                made = self._made(self.table.read([other])[0], epoch)
            except BadRow:
                continue
            return replace(made, replaced=Replaced(row.number, other, reason))
        raise DataError(f"{reason}; nor can any of the {REPLACEMENTS} rows be used that were drawn in its place")

    def _made(self, row: Row, epoch: int) -> Sample:
        decoded = decode(self.table.image_bytes(row), self.rules)
        mask = mask_of(decoded, self.table.mask_bytes(row), self.rules)
        small = decode(self.table.image_bytes(row.small), self.rules).image if row.small else None
        options, label = self.table.captions(row), self.table.label(row)
        place = {"seed": self.seed, "epoch": epoch, "row": row.number}
        made = prepare(decoded.image, self.rules, **place, small=small, factor=self.factor, mask=mask)
        weight = None if self.class_images_from is None else 1.0
        if weight and row.number >= self.class_images_from:
            weight = self.class_weight
        caption = None if options is None else options[key(self.seed, "caption", epoch, row.number) % len(options)]
        return Sample(row.number, made.pixels, caption, label, made.time_ids, made.low_res, made.mask, weight)


def report_replaced(replaced: Sequence[Replaced], told: set[int]) -> None:
    """Log each replaced row that is not in `told` yet, and add it; for the training process, batch by batch.

    As an error: of processes other than the main one nothing less is shown, and each reads rows of its own.
    """
    for row, used, reason in replaced:
        if row not in told:
            log.error("%s. Replaced when it is drawn (data.on_error skip), this time by row %d.", reason, used)
            told.add(row)


def open_data(cfg: TrainConfig, *, dataset: Dataset | None = None, progress: bool = True) -> TrainData:
    """Open and check the data that `cfg.data` names, or `dataset` from Python.

    Captions are read if a text is among the conditions, labels if class_label is. In runs of several
    processes let the main one go first: it checks the data, the others find the answer in the cache. Raises DataError
    with everything that is wrong; with data.on_error skip, only if no usable row is left.
    """
    rules, parts = cfg.data, conditions(cfg.conditioning)
    try:
        background_rgb(rules.background)
    except ValueError as error:
        raise ConfigError(f"data.background: {error}; give a name such as white, or #rrggbb") from None
    text = bool({"text", "pooled_text"} & parts.keys())
    source = open_source(rules, dataset, captions=text)
    if not len(source.dataset):
        raise DataError(explain(source.problems, source.name) if source.problems else f"{source.name} has no rows")
    table = rows_of(source, rules, captions=text, labels="class_label" in parts)
    num_classes = parts["class_label"].num_classes if "class_label" in parts else None
    if num_classes and num_classes < len(table.class_names):
        raise DataError(
            f"{source.name} has {len(table.class_names)} classes, more than conditioning.num_classes "
            f"{num_classes}: unset it, or give at least as many"
        )
    factor = parts["low_res"].factor if rules.low_res_column else 1
    if isinstance(table.dataset, Shards):
        return _open_stream(table, source, cfg, factor)
    numbers = _draw_rows(len(table), rules.max_train_samples, cfg.seed, source.name)
    report = check(table, numbers, rules, factor=factor, progress=progress)
    problems = _all_problems(source, report.bad)
    refuse_or_warn(problems, source.name, rules)
    digests = np.zeros(len(table), np.int64)
    digests[numbers] = report.digests
    usable = np.flatnonzero(digests)
    if not len(usable):
        raise DataError(f"{source.name} has no usable row")
    facts = {"rows_found": len(table), "left_out": len(problems)} | report.facts
    return TrainData(
        table=table,
        rules=rules,
        seed=cfg.seed,
        rows=usable,
        digests=digests,
        fingerprint=fingerprint(digests),
        factor=factor,
        facts=facts,
    )


def _open_stream(table: Rows, source: Source, cfg: TrainConfig, factor: int) -> TrainData:
    """The rest of `open_data` for shards: of their rows only the first few are read, to fail now rather than later."""
    rules, rows, found = cfg.data, table.dataset.units, len(table)
    if rules.max_train_samples is not None:
        _require_rows(found, rules.max_train_samples, source.name)
        rows = rows.drawn(rules.max_train_samples, cfg.seed)
    refuse_or_warn(list(check(table, rows[:FIRST_ROWS], rules, factor=factor).bad.values()), source.name, rules)
    what = (rules.image_column, table.caption_columns, table.label_column, table.class_names, rules.low_res_column)
    what += tuple(filter(None, (rules.mask_column, table.instance_prompt)))
    content = hashlib.blake2b(repr((table.dataset.footers, what)).encode(), digest_size=16)
    content.update(rows.starts.tobytes() + rows.counts.tobytes())
    facts = {
        "rows_found": found,
        "rows": len(rows),
        "left_out": 0,
        "shards": len(table.dataset.files),
        "row_groups": len(rows.counts),
    }
    return TrainData(
        table=table,
        rules=rules,
        seed=cfg.seed,
        rows=rows,
        digests=np.zeros(0, np.int64),
        fingerprint=content.hexdigest(),
        factor=factor,
        facts=facts,
    )


def _all_problems(source: Source, bad: dict[int, Problem]) -> list[Problem]:
    """Those of the source and of the rows, which are named by their lines of the metadata too; each told once."""
    told = {problem.name for problem in source.problems}
    named = [
        Problem(f"{name} ({source.lines[row]})" if source.lines else name, reason)
        for row, (name, reason) in bad.items()
    ]
    return [*source.problems, *(problem for problem in named if problem.name not in told)]


def _draw_rows(found: int, wanted: int | None, seed: int, name: str) -> np.ndarray:
    if wanted is None:
        return np.arange(found, dtype=np.int64)
    _require_rows(found, wanted, name)
    return np.sort(permutation(seed, "max_train_samples", 0, found)[:wanted])


def _require_rows(found: int, wanted: int, name: str) -> None:
    if wanted > found:
        raise DataError(f"data.max_train_samples {wanted} is more than the {found} rows of {name}")

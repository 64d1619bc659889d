"""The training data: opened, checked, and named by its content. Rows by number, samples by (row, epoch)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from finetune.buckets import BucketOrder, Buckets, fill, summary
from finetune.cached import CachedLatents
from finetune.captions import caption_of, whole
from finetune.config import Data, TrainConfig
from finetune.config_choices import conditions
from finetune.data_changes import fingerprint
from finetune.datacheck import IMAGE_DIGEST, check, explain, refuse_or_warn
from finetune.errors import ConfigError, DataError
from finetune.folder import Problem
from finetune.images import BadRow, background_rgb, decode, mask_of, prepare, strict_pillow
from finetune.order import InTurns, Order, RowOrder, UnitOrder, Units
from finetune.rows import Row, Rows, rows_of
from finetune.samples import Replaced, Sample
from finetune.seeding import key, permutation
from finetune.shards import Shards
from finetune.sources import Source, open_source

log = logging.getLogger(__name__)
FIRST_ROWS = 16  # rows of a stream that are checked before training
REPLACEMENTS = 16  # rows that are tried in the place of one; if half of all are bad, all fail once in 65,536 times


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
    images: np.ndarray
    """[rows found, 16] uint8: what identifies the stored bytes of the image of a usable row, and nothing else; 0 for
    all others; of a stream, nothing."""
    sizes: np.ndarray
    """[rows found, 2] int32: height and width of the image of a row of `rows`, in pixels; 0 for all others. Of a
    stream, nothing."""
    fingerprint: str
    """Hexadecimal; the same wherever the same images, captions and labels are stored, in the same order; of a stream,
    wherever the same files are: by their footers and sizes. Class images do not count."""
    factor: int
    """Side of an image over that of the small image of data.low_res_column; 1 without one."""
    facts: dict[str, Any]
    """What a reader should know of the data; JSON's types only."""
    held_out: TrainData | None = None
    """The rows that are kept from training, none of which is among `rows`; cropped at the centre, not mirrored."""
    buckets: Buckets | None = None
    """The shapes of the training images; None: all are squares."""
    latents: CachedLatents | None = None
    """Where samples have their moments from, and no pixels then."""
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

    def in_buckets(self, multiple: int) -> TrainData:
        """The data with the buckets of data.buckets, if there are to be any, sides of which are multiples of `multiple`
        (`modules.Modules.side_multiple`). Raises ConfigError or DataError: see `buckets.fill`.
        """
        if self.rules.buckets == "none":
            return self
        filled = fill(self.sizes, self.rows, self.rules, multiple=multiple)
        found = summary(filled, self.sizes)
        return replace(self, buckets=filled, facts=self.facts | {"buckets": found, "upscaled": found["upscaled"]})

    def steps(self, epochs: int, *, global_batch: int) -> int:
        """Optimizer steps after which each row has come `epochs` times, or more often."""
        if self.buckets is not None:
            return BucketOrder(self.buckets, seed=self.seed, global_batch=global_batch).steps(epochs)
        return -(-epochs * len(self) // global_batch)

    def order(self, *, global_batch: int) -> Order:
        """Which row comes when: of a stream as its row groups are read, of buckets batch by batch, else in one
        permutation of all."""
        if self.buckets is not None:
            return BucketOrder(self.buckets, seed=self.seed, global_batch=global_batch)
        if isinstance(self.rows, Units):
            buffer_size = self.table.dataset.buffer_size
            return UnitOrder(self.rows, seed=self.seed, buffer_size=buffer_size, global_batch=global_batch)
        if self.class_images_from is not None:
            own, others = self.rows[: self._instances], self.rows[self._instances :]
            return InTurns(RowOrder(own, seed=self.seed), RowOrder(others, seed=key(self.seed, "class images")))
        return RowOrder(self.rows, seed=self.seed)

    @property
    def content(self) -> str:
        """Hexadecimal; as `fingerprint`, and of the numbers of the rows, which crops and captions are drawn by, and of
        the rows held out."""
        where = np.flatnonzero(self.digests).tobytes()
        beside = b"" if self.held_out is None else self.held_out.content.encode()
        if self.class_images_from is not None:
            beside += self.digests[self.class_images_from :].tobytes()
        return hashlib.blake2b(self.fingerprint.encode() + where + beside, digest_size=16).hexdigest()

    @property
    def kept(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps, to tell what changed and to go on in the same order: the digests of the rows that
        are trained on and, under "held_out", of those that are not; of buckets, the sizes too."""
        kept = {"digests": self.digests} | ({} if self.held_out is None else {"held_out": self.held_out.digests})
        return kept | ({} if self.rules.buckets == "none" else {"sizes": self.sizes})

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class label; None unless conditioning.kind is class_label."""
        return None if self.table.class_names is None else list(self.table.class_names)

    def image_bytes(self, row: int) -> bytes:
        """The image of a row as it is stored, encoded."""
        return self.table.image_bytes(self.table.read([row])[0])

    def captions(self, row: int) -> tuple[str, ...] | None:
        """The captions of a row, of which each epoch draws one, as it reads if no tag is shuffled or dropped; None
        unless the conditioning is text."""
        found = self.table.read([row])[0]
        options = self.table.captions(found)
        return options and tuple(whole(caption, self.table.wording(found)) for caption in options)

    def name(self, row: int) -> str:
        """What a message calls a row."""
        return self.table.name(self.table.read([row])[0])

    def with_order_of(self, then: Mapping[str, np.ndarray]) -> TrainData:
        """The data as a run goes on with it that began with `then`, its `kept`; only for data.on_error skip.

        Rows that turned unusable since keep their places in the order, and are replaced when they are drawn; rows that
        were unusable then stay left out. No row may hold anything else (`data_changes.changes`).
        """
        digests, now = then["digests"], self.digests
        own = digests[: self.class_images_from]
        assert len(digests) == len(now) and ((digests == now) | (digests == 0) | (now == 0)).all()
        known = {"rows": np.flatnonzero(digests), "digests": digests, "fingerprint": fingerprint(own)}
        if self.held_out is not None:
            known["held_out"] = self.held_out.with_order_of({"digests": then["held_out"]})
        return replace(self, **known, sizes=then.get("sizes", self.sizes))

    def shape(self, row: int) -> tuple[int, int]:
        """Height and width of the training image of a row, in pixels."""
        side = self.rules.resolution
        return (side, side) if self.buckets is None else self.buckets.shape(row)

    @property
    def image_numbers(self) -> np.ndarray:
        """[rows found] uint64: the first half of `images`."""
        return np.ascontiguousarray(self.images[:, :8]).view("<u8")[:, 0]

    def holding_out(self, share: float) -> TrainData:
        """These data without the rows whose image is held out, which become `held_out`.

        An image is held out if and only if the 64 bits that its bytes hash to are, as a number, among the lowest
        `share` of all: whatever its caption, its label and the other rows are. Raises DataError if there are not two
        different images on each side, without which there is no standard error.
        """
        chosen = self.image_numbers < share * 2.0**64
        sides = []
        for side, what in ((~chosen, "to train on"), (chosen, "held out")):
            digests = np.where(side, self.digests, 0)
            if (found := len(np.unique(self.image_numbers[digests != 0]))) < 2:
                raise DataError(
                    f"validation.held_out {share:g} leaves {found} different images {what}, as their bytes decide it, "
                    "and a standard error takes two: set another share, or give more images"
                )
            rows = np.flatnonzero(digests)
            sides.append(replace(self, rows=rows, digests=digests, fingerprint=fingerprint(digests)))
        train, held_out = sides
        rules = replace(self.rules, center_crop=True, random_flip=False, variants=None)
        facts = self.facts | {"held_out": len(held_out)}
        return replace(train, facts=facts, held_out=replace(held_out, rules=rules))

    def samples(self, rows: Sequence[int], epochs: Sequence[int]) -> list[Sample]:
        """Make the sample of each row in its epoch.

        A row that turned unusable since it was checked is a DataError; with data.on_error skip another row of its
        bucket stands in for it, which follows from (seed, epoch, row), so that every process and every resume makes the
        same of it. Training says so once per row: see `samples.report_replaced`.
        """
        with strict_pillow():
            return [self._sample(row, int(e)) for row, e in zip(self._rows(rows), epochs, strict=True)]

    def _rows(self, numbers: Sequence[int]) -> list[Row]:
        return (self.table if self.latents is None else self.latents.table).read(numbers)

    def _sample(self, row: Row, epoch: int) -> Sample:
        try:
            return self._made(row, epoch)
        except BadRow as problem:
            checked = "" if isinstance(self.rows, Units) else "; it was usable when the data was checked"
            reason = f"{self.table.name(row)} {problem}{checked}"
        if self.rules.on_error == "error":
            raise DataError(reason)
        alike = self.rows if self.buckets is None else self.buckets.rows[self.buckets.of_row[row.number]]
        for attempt in range(REPLACEMENTS):
            drawn = key(self.seed, "replacement", epoch, row.number, attempt) % len(alike)
            other = int(alike[drawn])
            try:
                made = self._made(self._rows([other])[0], epoch)
            except BadRow:
                continue
            return replace(made, replaced=Replaced(row.number, other, reason))
        raise DataError(f"{reason}; nor can any of the {REPLACEMENTS} rows be used that were drawn in its place")

    def _made(self, row: Row, epoch: int) -> Sample:
        options, label = self.table.captions(row), self.table.label(row)
        words = {"seed": self.seed, "epoch": epoch, "row": row.number}
        caption = None if options is None else caption_of(options, self.table.wording(row), **words)
        known = {"row": row.number, "caption": caption, "label": label, "loss_weight": self._loss_weight(row.number)}
        if self.latents is not None:
            moments, time_ids = self.latents.read(row.number, epoch)
            return Sample(**known, pixels=None, time_ids=time_ids, low_res=None, moments=moments)
        decoded = decode(self.table.image_bytes(row), self.rules)
        mask = mask_of(decoded, self.table.mask_bytes(row), self.rules)
        small = decode(self.table.image_bytes(row.small), self.rules).image if row.small else None
        turn = epoch if self.rules.variants is None else epoch % self.rules.variants
        place = {"seed": self.seed, "epoch": turn, "row": row.number, "shape": self.shape(row.number)}
        made = prepare(decoded.image, self.rules, **place, small=small, factor=self.factor, mask=mask)
        shown = {"pixels": made.pixels, "time_ids": made.time_ids, "low_res": made.low_res, "mask": made.mask}
        return Sample(**known, **shown)

    def _loss_weight(self, row: int) -> float | None:
        if self.class_images_from is None:
            return None
        return self.class_weight if row >= self.class_images_from else 1.0


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
    source = open_source(rules, dataset, captions=text, labels="class_label" in parts)
    if not len(source.dataset):
        raise DataError(explain(source.problems, source.name) if source.problems else f"{source.name} has no rows")
    table = rows_of(source, rules, captions=text, labels="class_label" in parts, wording=cfg.captions)
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
    digests, images = np.zeros(len(table), np.int64), np.zeros((len(table), IMAGE_DIGEST), np.uint8)
    sizes = np.zeros((len(table), 2), np.int32)
    digests[numbers], images[numbers], sizes[numbers] = report.digests, report.images, report.sizes
    usable = np.flatnonzero(digests)
    if not len(usable):
        raise DataError(f"{source.name} has no usable row")
    facts = {"rows_found": len(table), "left_out": len(problems)} | report.facts
    data = TrainData(
        table=table,
        rules=rules,
        seed=cfg.seed,
        rows=usable,
        digests=digests,
        sizes=sizes,
        fingerprint=fingerprint(digests),
        factor=factor,
        facts=facts,
        images=images,
    )
    return data.holding_out(cfg.validation.held_out) if cfg.validation.held_out else data


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
        sizes=np.zeros((0, 2), np.int32),
        fingerprint=content.hexdigest(),
        factor=factor,
        facts=facts,
        images=np.zeros((0, IMAGE_DIGEST), np.uint8),
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

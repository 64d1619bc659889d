"""Aspect-ratio buckets: images keep about their proportions, and every global batch is of one shape.

The shapes have about resolution^2 pixels, as in SDXL (Podell et al. 2023, appendix I); each image is resized to just
cover the shape that crops it least, and cropped. diffusers' find_nearest_bucket compares the differences of areas, so
that small buckets win over better fitting ones, and its generate_aspect_ratio_buckets knows eleven proportions.

The order. A bucket of n rows gives them as an endless stream of permutations of its own, in batches of the global batch
G. By the end of epoch e = 1, 2, ... it has given ceil(n * e / G) batches: each of its rows at least e times, and what
the last batch holds beyond that counts for the next epoch. The batches that all buckets give in an epoch come in one
permutation. So nothing is dropped or padded, each row comes once before any of its bucket comes again, and what step s
holds is a function of (seed, s), whatever the number of processes. In a bucket of fewer than G rows some come more than
once in a batch, cropped anew each time, and it gives a batch in one of about G / n epochs.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from finetune.config import Data
from finetune.errors import ConfigError, DataError
from finetune.seeding import permutation

FINEST = 16  # steps per side of the square, unless data.bucket_step says otherwise: the 64 pixels of SDXL at 1024
MOST_NAMED = 10


@dataclass(frozen=True)
class Buckets:
    """Which row is trained in which shape."""

    step: int
    """All sides are multiples of it, in pixels."""
    shapes: np.ndarray
    """[b, 2] int64: height and width of each bucket, ascending; only of those that hold rows."""
    of_row: np.ndarray
    """[rows found] int32: the bucket of each row, -1 for a row that is not used."""

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """Of each bucket, its rows [n] int64, ascending."""
        return [np.flatnonzero(self.of_row == bucket) for bucket in range(len(self.shapes))]

    def shape(self, row: int) -> tuple[int, int]:
        """Height and width in which a row is trained."""
        height, width = self.shapes[self.of_row[row]]
        return int(height), int(width)


def sides(resolution: int, step: int, *, shortest: int, longest: int) -> np.ndarray:
    """All shapes [b, 2] (height, width; ascending) with sides from shortest to longest that are multiples of `step`,
    and resolution^2 pixels up to a tenth more or less.

    With 64 pixels at 1024 they are SDXL's (512 to 2048), which has up to a tenth less, and those of up to a tenth more.
    """
    multiples = np.arange(step, longest + 1, step)
    multiples = multiples[multiples >= shortest]
    pixels = np.outer(multiples, multiples)
    heights, widths = np.nonzero(10 * np.abs(pixels - resolution**2) <= resolution**2)
    return np.stack([multiples[heights], multiples[widths]], axis=1)


def kept(sizes: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The share of each image that is not cropped; sizes and shape: [n, 2] or [2], height and width -> [n]."""
    taller, wider = sizes[:, 0] * shape[..., 1], sizes[:, 1] * shape[..., 0]
    return np.minimum(taller, wider) / np.maximum(taller, wider)


def assign(sizes: np.ndarray, shapes: np.ndarray, resolution: int) -> np.ndarray:
    """The index of the shape that crops each image least; sizes: [n, 2] int64, height and width -> [n].

    Of equally good shapes it is the one whose pixels are nearest to resolution^2, then the taller one.
    """
    off = np.abs(shapes.prod(axis=1) - resolution**2)
    best, found = np.zeros(len(sizes)), np.zeros(len(sizes), np.int64)
    for index in np.lexsort((-shapes[:, 0], off)):
        share = kept(sizes, shapes[index])
        found[better := share > best] = index
        best[better] = share[better]
    return found


def fill(sizes: np.ndarray, rows: np.ndarray, rules: Data, *, multiple: int) -> Buckets:
    """Put rows into buckets. sizes: [rows found, 2], height and width of the images. rows: [n], those to be used.

    multiple: what the sides must be multiples of for VAE and UNet. Raises ConfigError if there is only one shape, or
    data.bucket_step does not fit; DataError if data.bucket_upscale false leaves images without a bucket.
    """
    resolution, step = rules.resolution, _step(rules, multiple)
    shapes = sides(resolution, step, shortest=rules.shortest_side, longest=rules.longest_side)
    if len(shapes) < 2:
        raise ConfigError(
            f"data.buckets auto finds no shape but the square with sides that are multiples of {step} from "
            f"{rules.shortest_side} to {rules.longest_side}: raise data.resolution or data.bucket_max_side, or set "
            "data.buckets none"
        )
    of_images = sizes[rows].astype(np.int64)
    # A row that turned unusable since a run began without keeping sizes is replaced when it is drawn: by any shape.
    of_images[of_images == 0] = resolution
    wanted = shapes[assign(of_images, shapes, resolution)]
    if not rules.bucket_upscale:
        wanted = np.minimum(wanted, of_images // step * step)
        if len(small := rows[wanted.min(axis=1) == 0]):
            named = ", ".join(map(str, small[:MOST_NAMED]))
            more = f" and {len(small) - MOST_NAMED} more" if len(small) > MOST_NAMED else ""
            raise DataError(
                f"rows {named}{more} have a side below {step} pixels, the smallest that data.bucket_upscale false "
                f"leaves as it is: set data.bucket_upscale true, or leave them out by data.min_side {step} with "
                "data.on_error skip"
            )
    used, bucket = np.unique(wanted, axis=0, return_inverse=True)
    of_row = np.full(len(sizes), -1, np.int32)
    of_row[rows] = bucket.reshape(-1)
    return Buckets(step, used, of_row)


def _step(rules: Data, multiple: int) -> int:
    """data.bucket_step, or the default."""
    resolution = rules.resolution
    steps = [step for step in range(multiple, resolution + 1, multiple) if resolution % step == 0]
    if rules.bucket_step is None:
        return next(step for step in steps if step * FINEST >= resolution)
    if rules.bucket_step not in steps:
        raise ConfigError(
            f"data.bucket_step must be a multiple of {multiple}, by which VAE and UNet reduce the image, and divide "
            f"data.resolution {resolution}, got {rules.bucket_step}: use {', '.join(map(str, steps))}"
        )
    return rules.bucket_step


def summary(buckets: Buckets, sizes: np.ndarray) -> dict[str, Any]:
    """What a reader should know of the buckets, JSON's types only. sizes: as of `fill`. Shapes are width x height."""
    rows = np.flatnonzero(buckets.of_row >= 0)
    of_images, of_buckets = sizes[rows].astype(np.int64), buckets.shapes[buckets.of_row[rows]]
    known = of_images[:, 0] > 0
    of_images, of_buckets = of_images[known], of_buckets[known]
    cropped = 1 - kept(of_images, of_buckets)
    return {
        "step": buckets.step,
        "images": {f"{w}x{h}": len(rows) for (h, w), rows in zip(buckets.shapes, buckets.rows, strict=True)},
        "cropped": {"mean": round(float(cropped.mean()), 4), "max": round(float(cropped.max()), 4)},
        "upscaled": int((of_images < of_buckets).any(axis=1).sum()),
    }


class BucketOrder:
    """Batches of one shape each, as described at the top."""

    def __init__(self, buckets: Buckets, *, seed: int, global_batch: int) -> None:
        """global_batch: of all processes."""
        self.rows, self.seed, self.batch = buckets.rows, seed, global_batch
        self._names = [f"order of bucket {width}x{height}" for height, width in buckets.shapes]
        self._batch_at = lru_cache(1)(self._bucket_and_number)
        self._epoch = lru_cache(1)(self._permuted_batches)
        self._time = lru_cache(2 * len(self.rows))(self._permuted_rows)

    def __len__(self) -> int:
        """The number of rows."""
        return sum(map(len, self.rows))

    def steps(self, epochs: int) -> int:
        """Batches by the end of so many epochs: then each row has come as often, or more often."""
        return sum(self._given(epochs))

    def place(self, position: int) -> tuple[int, int]:
        """See `order.Order`; the time is that of the row, of which the rows of other buckets may have had more."""
        step, within = divmod(position, self.batch)
        bucket, number = self._batch_at(step)
        rows = self.rows[bucket]
        time, index = divmod(number * self.batch + within, len(rows))
        return time, int(rows[self._time(bucket, time)[index]])

    def _bucket_and_number(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many batches it gave before."""
        latest = step * self.batch // len(self)  # later epochs begin after this step
        epoch = bisect_right(range(latest + 1), step, key=self.steps) - 1
        batches, ends = self._epoch(epoch)
        at = int(batches[step - self.steps(epoch)])
        bucket = int(np.searchsorted(ends, at, side="right"))
        return bucket, self._given(epoch + 1)[bucket] - int(ends[bucket]) + at

    def _given(self, epochs: int) -> list[int]:
        """The batches of each bucket by the end of so many epochs."""
        return [-(-len(rows) * epochs // self.batch) for rows in self.rows]

    def _permuted_batches(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The batches of an epoch in their order, numbered bucket by bucket; [b] where the numbers of each end."""
        new = np.subtract(self._given(epoch + 1), self._given(epoch))
        return permutation(self.seed, "order of buckets", epoch, int(new.sum())), np.cumsum(new)

    def _permuted_rows(self, bucket: int, time: int) -> np.ndarray:
        return permutation(self.seed, self._names[bucket], time, len(self.rows[bucket]))

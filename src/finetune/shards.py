"""Rows in Parquet shards, on the disk or on the Hub, read when they are wanted: a row group at a time.

Opening reads the footer of each shard and no data. A `Shards` then stands where a `datasets.Dataset` of encoded images
would: it has columns and a length, and gives rows by number. What it holds of the data at any time are the row groups
read last, together at most `buffer_size` rows, or one row group where that has more.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Value
from tqdm import tqdm

from finetune.errors import DataError
from finetune.order import Units

log = logging.getLogger(__name__)
READERS = 16  # footers that are read at a time: on the Hub each takes its round trips
END = 1 << 16  # bytes at the end of a shard that are read first: most footers are shorter


@dataclass(frozen=True)
class _Footer:
    """What the end of a shard says."""

    counts: list[int]
    """Rows of each row group."""
    features: Features
    """The columns as `datasets` describes them, by what it wrote into the schema or by their types."""
    size: int
    """Bytes of the file."""
    digest: bytes
    """Of the footer and the size of the file."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The rows of Parquet files in their order, by number. Picklable; each process holds its own row groups."""

    files: tuple[str, ...]
    """Paths, or hf:// addresses with a commit."""
    sizes: tuple[int, ...]
    """Bytes of each file."""
    units: Units
    """The row groups of all files that are not empty."""
    places: np.ndarray
    """[u, 2] int64: file and row group of each unit."""
    features: Features
    footers: str
    """Hexadecimal digest of all footers: the same wherever the same files are, in the same order."""
    buffer_size: int
    images: tuple[str, ...] = ()
    """The columns that are given as {"bytes", "path"}."""
    _held: OrderedDict[int, pa.Table] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.units)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """The rows with these numbers, as columns. To be called by one thread at a time. Raises DataError."""
        rows = [self._row(number) for number in numbers]
        columns = {name: [row[name] for row in rows] for name in self.column_names}
        return columns | {name: [_image(value) for value in columns[name]] for name in self.images}

    @property
    def column_names(self) -> list[str]:
        """The columns, without those that `select_columns` left out."""
        return list(self.features)

    @property
    def _fingerprint(self) -> str:
        """As of a `datasets.Dataset`: changes with the data."""
        return self.footers

    def file_of(self, number: int) -> str:
        """The shard that holds the row with this number."""
        unit = int(np.searchsorted(self.units.ends, number, side="right"))
        return self.files[int(self.places[unit, 0])]

    def select_columns(self, columns: Sequence[str]) -> Shards:
        """The same rows with these columns alone: the others are not read."""
        return replace(self, features=Features({name: self.features[name] for name in columns}), _held=OrderedDict())

    def with_images(self, column: str) -> Shards:
        """The same rows with `column`, which holds bytes or {"bytes", "path"}, given as the latter."""
        return replace(self, images=(*self.images, column), _held=OrderedDict())

    def _row(self, number: int) -> dict[str, Any]:
        unit = int(np.searchsorted(self.units.ends, number, side="right"))
        table = self._unit(unit)
        return table.slice(number - int(self.units.starts[unit]), 1).to_pylist()[0]

    def _unit(self, unit: int) -> pa.Table:
        """A row group, from those that are held or from its file. The one used least recently makes room."""
        if unit in self._held:
            self._held.move_to_end(unit)
            return self._held[unit]
        count = int(self.units.counts[unit])
        while self._held and sum(map(len, self._held.values())) + count > self.buffer_size:
            self._held.popitem(last=False)
        self._held[unit] = table = self._read(unit, count)
        return table

    def _read(self, unit: int, count: int) -> pa.Table:
        number, group = map(int, self.places[unit])
        first = int(self.units.starts[unit])
        what = f"{self.files[number]}, row group {group} (rows {first} to {first + count - 1} of the data)"
        try:
            with _open(self.files[number]) as opened:
                if (size := opened.seek(0, 2)) != self.sizes[number]:
                    raise DataError(
                        f"{self.files[number]} changed since it was opened: it has {size} bytes now, not "
                        f"{self.sizes[number]}"
                    )
                file = pq.ParquetFile(opened, pre_buffer=True, page_checksum_verification=True)
                return file.read_row_group(group, columns=self.column_names, use_threads=False)
        except DataError:
            raise
        except Exception as error:  # pyarrow, fsspec, the Hub client and httpx share no base class
            raise DataError(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def open_shards(
    files: Sequence[str], *, buffer_size: int, declared: Mapping[str, Any] | None = None, progress: bool = True
) -> Shards:
    """Read the footers of Parquet files, which must have the same columns of the same types.

    declared: features from elsewhere, such as a data set's card; of these, class names count for columns of integers.
    Raises DataError.
    """
    with ThreadPoolExecutor(READERS) as threads:
        found = threads.map(_footer, files)
        hidden = None if progress else True
        footers = list(tqdm(found, "open shards", total=len(files), unit="file", delay=2, disable=hidden))
    first = footers[0].features
    for file, footer in zip(files, footers, strict=True):
        if footer.features != first:
            raise DataError(
                f"{file} has other columns than {files[0]}:\n  {footer.features}\n  {first}\n"
                "Write both with the same columns, types and class names, or move one out of the data set"
            )
    places = [
        (number, group, count)
        for number, footer in enumerate(footers)
        for group, count in enumerate(footer.counts)
        if count
    ]
    if not places:
        raise DataError(f"{files[0]} and all other shards ({len(files)}) have no rows")
    table = np.array(places, np.int64)
    if 2 * (largest := int(table[:, 2].max())) > buffer_size and len(table) > 1:
        log.warning(
            "row groups of up to %d rows are held whole and come one after another, not mixed: "
            "data.shuffle_buffer_size %d does not hold two. Raise it, or write the data with smaller row groups (a "
            "hundred images, say)",
            largest,
            buffer_size,
        )
    digest = hashlib.blake2b(b"".join(footer.digest for footer in footers), digest_size=16)
    return Shards(
        files=tuple(files),
        sizes=tuple(footer.size for footer in footers),
        units=Units(np.cumsum(table[:, 2]) - table[:, 2], table[:, 2]),
        places=table[:, :2],
        features=_with_class_names(first, declared or {}),
        footers=digest.hexdigest(),
        buffer_size=buffer_size,
    )


def _open(file: str) -> IO[bytes]:
    """A file for reading at any place; one on the Hub by the ranges that are asked for, with the client's retries."""
    return fsspec.filesystem("hf").open(file, "rb", cache_type="none") if file.startswith("hf://") else open(file, "rb")


def _footer(file: str) -> _Footer:
    try:
        with _open(file) as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - END))
            end = opened.read(END)
            length = int.from_bytes(end[-8:-4], "little") + 8  # the last 8 bytes: length of the footer, and PAR1
            if length > len(end):
                opened.seek(max(0, size - length))
                end = opened.read(length)
        end = end[-length:]
        parsed = pq.ParquetFile(pa.BufferReader(end))  # which needs no more of a file than its footer
        counts = [parsed.metadata.row_group(group).num_rows for group in range(parsed.num_row_groups)]
        digest = hashlib.blake2b(size.to_bytes(8, "little") + end, digest_size=16).digest()
        return _Footer(counts, Features.from_arrow_schema(parsed.schema_arrow), size, digest)
    except Exception as error:  # as in Shards._read
        raise DataError(f"{file} is not a Parquet file that can be read: {type(error).__name__}: {error}") from error


def _with_class_names(features: Features, declared: Mapping[str, Any]) -> Features:
    """The columns of integers that are declared as classes, as such."""
    classes = {
        name: declared[name]
        for name, feature in features.items()
        if isinstance(declared.get(name), ClassLabel) and isinstance(feature, Value) and "int" in feature.dtype
    }
    return Features(features | classes)


def _image(value: bytes | dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return value and {"bytes": value.get("bytes"), "path": value.get("path")}

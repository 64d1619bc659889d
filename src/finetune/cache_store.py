"""What frozen models made, kept on the disk: records by the content they were made of, in few files.

A folder holds shards; a shard is a safetensors file of records of one shape:

    keys       [n, 2] int64       128 bits each, of everything that the record was made of
    data       [n, *shape]        float16 or float32
    sizes      [n, s] int32       whole numbers that belong to a record
    checksums  [n] int64          CRC-32 of data and sizes of each
    head       [2] int64          CRC-32 of keys and checksums; when it was written, in seconds

A shard has its name as soon as all of it is on the disk, and never changes. Its time of modification is that in `head`:
one with another time was touched by somebody, and is read through before it is used. Beside it lies an empty file
.used, whose time is that of the last start which used one of its records.

Records are read by position (pread), each checked by its sum, and not through a memory map: what a map has shown stays
in the resident memory of every process, and a file that is cut meanwhile ends the process by SIGBUS, without a word.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.durable import fsync, safetensors, write
from finetune.errors import DataError

log = logging.getLogger(__name__)
SUFFIX = ".safetensors"
SHARD_BYTES = 64 << 20  # of records that are held in memory before they are written
SHARD_SECONDS = 60.0  # after which they are written in any case: what a killed process loses
OPEN_FILES = 64  # of the shards that a process reads from, kept open at a time
_TYPES = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8"}


class Damaged(Exception):
    """What a file holds is not what was written."""


@dataclass(frozen=True)
class Shard:
    """One file of records."""

    path: str
    count: int
    shape: tuple[int, ...]
    """Of the data of one record."""
    dtype: str
    """Of the data, as numpy writes it."""
    numbers: int
    """Sizes of one record."""
    starts: tuple[int, int, int]
    """Where data, sizes and checksums begin, in bytes from the start of the file."""


@dataclass(frozen=True)
class Shelf:
    """The records of a folder as they were when it was opened."""

    shards: tuple[Shard, ...]
    first: np.ndarray
    """[n] int64, ascending: the first half of each key."""
    second: np.ndarray
    """[n] int64: the other half."""
    places: np.ndarray
    """[n, 2] int32: shard, and number within it, of each."""

    def find(self, keys: np.ndarray) -> np.ndarray:
        """keys [m, 2] int64 -> [m, 2] int32: shard, and number within it, of each record; -1 where there is none."""
        found = np.full((len(keys), 2), -1, np.int32)
        if len(self.first) and len(keys):
            at = np.minimum(np.searchsorted(self.first, keys[:, 0]), len(self.first) - 1)
            known = (self.first[at] == keys[:, 0]) & (self.second[at] == keys[:, 1])
            found[known] = self.places[at[known]]
        return found

    def mark_used(self, places: np.ndarray) -> None:
        """Note that a start uses the records at `places`, [m, 2] of `find`."""
        for number in np.unique(places[:, 0]):
            try:
                Path(self.shards[number].path).with_suffix(".used").touch()
            except OSError:
                log.debug("no note of the use of %s", self.shards[number].path)  # a cache that may only be read


class Records:
    """Reads records by their places. Picklable; each process opens files of its own, at most OPEN_FILES."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the end of Python, `os` may be gone
        for descriptor in self.__dict__.get("_files", {}).values():
            close(descriptor)

    def read(self, shard: int, index: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """The data of a record, as it is stored, and its sizes. Raises DataError if it is not what was written."""
        file = self.shards[shard]
        try:
            return _record(self._open(shard), file, index)
        except (OSError, Damaged) as problem:
            if isinstance(problem, Damaged):
                for each in self.shards:  # all are read through by the next start: one is seldom damaged alone
                    _stamp(Path(each.path), 0)
            raise DataError(
                f"the cache file {file.path} cannot be read any more: {problem}. Give the same command again: it makes "
                "what is damaged anew"
            ) from None

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]


class Writer:
    """Writes records into new shards of a folder, some SHARD_BYTES at a time; the rest when its block is left.

    Also when it is left by an error: what was made is kept. Raises DataError if the disk does not take it.
    """

    def __init__(self, folder: Path, *, dtype: str) -> None:
        """dtype: float16 or float32."""
        self.folder, self.dtype = folder, np.dtype(dtype)
        self._held: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray, tuple[int, ...]]]] = {}
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def add(self, key: np.ndarray, data: np.ndarray, sizes: Sequence[int] = ()) -> None:
        """key: [2] int64. data: of any shape, rounded to the dtype. sizes: as many for all records of a shape."""
        data = np.ascontiguousarray(data, dtype=self.dtype)
        self._held.setdefault(data.shape, []).append((key, data, tuple(sizes)))
        self._bytes += data.nbytes
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is held, one shard for each shape."""
        try:
            for records in self._held.values():
                _write_shard(self.folder, records)
        except OSError as error:
            raise DataError(
                f"the cache cannot be written: {error}. Make room (`finetune cache --prune`), name another place by "
                "cache.folder, or train without it (cache.latents false, cache.text false)"
            ) from error
        finally:
            self._held, self._bytes, self._since = {}, 0, time.monotonic()


def open_shelf(folder: Path) -> Shelf:
    """The records in `folder`, of those that it holds whole.

    What is damaged is left out and its file removed, with a warning; the whole records of a damaged file are kept.
    """
    found: list[tuple[Shard, np.ndarray]] = []
    for path in shards_of(folder):
        try:
            found.append(read_shard(path))
        except Damaged as problem:
            log.warning("the cache file %s is damaged (%s): what it held is made anew", path, problem)
            with contextlib.suppress(OSError):  # no room, or a folder that may only be read: all of it is made anew
                found += _saved_from(path)
        except FileNotFoundError:
            log.debug("%s was removed meanwhile", path)
    keys = np.concatenate([np.zeros((0, 2), np.int64), *(keys for _, keys in found)])
    lengths = [len(keys) for _, keys in found]
    shard = np.repeat(np.arange(len(found), dtype=np.int32), lengths)
    index = np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in lengths)])
    order = np.argsort(keys[:, 0], kind="stable")
    places = np.stack([shard, index], 1)[order]
    return Shelf(tuple(each for each, _ in found), keys[order, 0], keys[order, 1], places)


def read_shard(path: Path) -> tuple[Shard, np.ndarray]:
    """A shard and its keys, [n, 2] int64. Read through if it was touched since it was written. Raises Damaged."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        state = os.fstat(file)
        shard, keys, checksums, written = _head(file, path, state.st_size)
        if int(state.st_mtime) != written:
            if not _whole(file, shard).all():
                raise Damaged("a record is not what was written")
            _stamp(path, written)
    finally:
        os.close(file)
    return shard, keys


def shards_of(folder: Path) -> list[Path]:
    """The files of a folder that hold records."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))


def _head(file: int, path: Path, size: int) -> tuple[Shard, np.ndarray, np.ndarray, int]:
    """The shard that an open file is, its keys and checksums, and when it was written. Raises Damaged."""
    try:
        length = int.from_bytes(_bytes(file, 8, 0), "little")
        if length > size:
            raise Damaged("its header is too long")
        header, start = json.loads(_bytes(file, length, 8)), 8 + length
        places = {name: header[name] for name in ("keys", "data", "sizes", "checksums", "head")}
        at = {name: start + int(place["data_offsets"][0]) for name, place in places.items()}
        if size != start + max(int(place["data_offsets"][1]) for place in places.values()):
            raise Damaged(f"it has {size:,} bytes, not as many as were written")
        count, *shape = map(int, places["data"]["shape"])
        parts = {
            name: np.frombuffer(_bytes(file, 8 * n, at[name]), "<i8")
            for name, n in (("keys", 2 * count), ("checksums", count), ("head", 2))
        }
        numbers, dtype = int(places["sizes"]["shape"][1]), _TYPES[places["data"]["dtype"]]
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise Damaged(f"its header cannot be read: {error}") from None
    total, written = map(int, parts["head"])
    if _sum(parts["keys"], parts["checksums"]) != total:
        raise Damaged("its list of records is not what was written")
    starts = (at["data"], at["sizes"], at["checksums"])
    shard = Shard(str(path), count, tuple(shape), dtype, numbers, starts)
    return shard, parts["keys"].reshape(-1, 2), parts["checksums"], written


def _record(file: int, shard: Shard, index: int) -> tuple[np.ndarray, tuple[int, ...]]:
    dtype = np.dtype(shard.dtype)
    size = dtype.itemsize * math.prod(shard.shape)
    data_at, sizes_at, checksums_at = shard.starts
    data = _bytes(file, size, data_at + index * size)
    sizes = _bytes(file, 4 * shard.numbers, sizes_at + 4 * shard.numbers * index)
    if _sum(data, sizes) != int.from_bytes(_bytes(file, 8, checksums_at + 8 * index), "little"):
        raise Damaged(f"record {index} is not what was written")
    return np.frombuffer(data, dtype).reshape(shard.shape), tuple(np.frombuffer(sizes, "<i4").tolist())


def _bytes(file: int, size: int, at: int) -> bytes:
    found = os.pread(file, size, at)
    if len(found) != size:
        raise Damaged("it is cut short")
    return found


def _whole(file: int, shard: Shard) -> np.ndarray:
    """[n] bool: whether each record is what was written."""
    good = np.ones(shard.count, bool)
    for index in range(shard.count):
        try:
            _record(file, shard, index)
        except Damaged:
            good[index] = False
    return good


def _saved_from(path: Path) -> Iterator[tuple[Shard, np.ndarray]]:
    """The whole records of a damaged shard as a new one, in whose favour it is removed."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        shard, keys, _, _ = _head(file, path, os.fstat(file).st_size)
        good = np.flatnonzero(_whole(file, shard))
        records = [(keys[index], *_record(file, shard, index)) for index in good]
    except Damaged:
        records = []
    finally:
        os.close(file)
    if records:
        yield read_shard(_write_shard(path.parent, records))
    remove(path)


def remove(path: Path) -> int:
    """Remove a shard and the note of its use; returns the bytes that are free now."""
    size = path.stat().st_size if path.exists() else 0
    for each in (path, path.with_suffix(".used")):
        each.unlink(missing_ok=True)
    return size


def _write_shard(folder: Path, records: Sequence[tuple[np.ndarray, np.ndarray, tuple[int, ...]]]) -> Path:
    import torch

    keys = np.stack([key for key, _, _ in records]).astype("<i8")
    data = np.stack([data for _, data, _ in records])
    sizes = np.array([sizes for _, _, sizes in records], "<i4").reshape(len(records), -1)
    checksums = np.array([_sum(*parts) for parts in zip(data, sizes, strict=True)], "<i8")
    written = int(time.time())
    head = np.array([_sum(keys, checksums), written], "<i8")
    parts = {"keys": keys, "data": data, "sizes": sizes, "checksums": checksums, "head": head}
    folder.mkdir(parents=True, exist_ok=True)
    name = secrets.token_hex(8)
    aside, path = folder / f".{name}.tmp", folder / f"{name}{SUFFIX}"
    try:
        write(aside, safetensors({name: torch.from_numpy(part) for name, part in parts.items()}))
        _stamp(aside, written)
        path.with_suffix(".used").touch()
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync(folder)
    return path


def _stamp(path: Path, written: int) -> None:
    with contextlib.suppress(OSError):  # of somebody else's file: it is read through by every start
        os.utime(path, (time.time(), written))


def _sum(*parts: np.ndarray | bytes) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part if isinstance(part, bytes) else np.ascontiguousarray(part), value)
    return value

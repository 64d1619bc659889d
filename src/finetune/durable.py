"""Files that are on the disk, and not only in memory, when a function returns; tensors as the bytes of such a file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

SPARE = 1.2  # free space asked for, over what will be written: others write too
_PIECE = 1 << 24  # bytes that are summed and written at a time: few enough to stay in the processor's cache

# safetensors' names of the types, in the order in which it stores them: the widest first, so that all are aligned.
_TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, int]:
    """Create file `path` from `chunks`, on the disk and with the mode that the umask says.

    Returns its size and the CRC-32 of what was meant to be written, which is not read back for it: what the file then
    holds can be compared with it. Not buffered: a process forked meanwhile has nothing to flush a second time.
    Raises OSError, such as for a full disk or a file that exists.
    """
    size = crc = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in _pieces(chunks):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
            while piece:  # a disk that is nearly full takes a part
                piece = piece[os.write(descriptor, piece) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, crc


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes, at most _PIECE at a time: many small chunks are put together, no large one is copied."""
    gathered = bytearray()
    for chunk in chunks:
        small = len(chunk) < _PIECE // 16
        if gathered and (not small or len(gathered) + len(chunk) > _PIECE):
            yield memoryview(gathered)
            gathered = bytearray()
        if small:
            gathered += chunk
        else:
            yield from (memoryview(chunk)[start : start + _PIECE] for start in range(0, len(chunk), _PIECE))
    if gathered:
        yield memoryview(gathered)


def safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes that safetensors' own save_file writes for `tensors`, one tensor after another.

    Own code: save_file computes no checksum, flushes nothing to the disk, and makes files of mode 0600 whatever the
    umask. Memory beside the tensors: one of them, if it is on a GPU or not contiguous.
    """
    assert sys.byteorder == "little", "the format is little-endian, and the bytes are taken as they are"
    places, end = {}, 0
    types = list(_TYPES)
    names = sorted(tensors, key=lambda name: (types.index(tensors[name].dtype), name))
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        places[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(places, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        if tensors[name].numel():
            yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def need_space(folder: Path, size: int) -> None:
    """Raise OSError (disk full) unless the file system of `folder` has room for `size` bytes and some to spare."""
    free = shutil.disk_usage(folder).free
    if free < SPARE * size:
        needed = f"{SPARE * size / 1e6:.1f} MB are needed on the disk, {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, needed, str(folder))


def to_disk(folder: Path) -> None:
    """Flush everything in `folder`, and it, to the disk; files get the modes that the umask says."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors writes 0600 whatever the umask
        fsync(path)


def fsync(path: Path) -> None:
    """Flush one file, or the names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc_of(file: Path) -> int:
    """CRC-32 of a file: finds damage, not forgery, at ten times the speed of sha256."""
    value = 0
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_PIECE):
            value = zlib.crc32(chunk, value)
    return value

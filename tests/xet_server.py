"""Xet storage for the fake Hub: takes xorbs (packed chunks) and shards (which chunks make up which file), rebuilds each
file and holds it to the SHA-256 that its shard states. The BLAKE3 names of xorbs are taken as they come.

Binary formats as in the public specification of Xet (huggingface/xet-core, spec/); all numbers are little-endian.
"""

import hashlib
import struct

NO_COMPRESSION, LZ4, GROUPED_LZ4 = range(3)
ROW = 48
"""Bytes of the header of a shard and of every row of its tables."""
BOOKEND = b"\xff" * 32
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


class XetStorage:
    """Xorbs by name, and what the shards say of them."""

    def __init__(self) -> None:
        self.xorbs: dict[str, list[bytes]] = {}

    def add_xorb(self, name: str, body: bytes) -> None:
        """Keep the chunks of a serialized xorb. Raises ValueError if it is not whole."""
        self.xorbs[name] = read_xorb(body)

    def add_shard(self, body: bytes) -> dict[str, bytes]:
        """SHA-256 -> content of each file that a shard describes. Raises ValueError, also for a xorb not yet here."""
        files = {}
        for sha256, segments in read_shard(body):
            content = b""
            for name, size, first, last in segments:
                if len(chunks := self.xorbs.get(name, [])[first:last]) != last - first:
                    raise ValueError(f"the xorb {name} with chunks {first} to {last} is not here")
                content += (part := b"".join(chunks))
                if len(part) != size:
                    raise ValueError(f"chunks {first} to {last} of {name} hold {len(part)} bytes, not {size}")
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError(f"the chunks of {sha256} do not make up this file")
            files[sha256] = content
        return files


def read_xorb(body: bytes) -> list[bytes]:
    """The chunks of a xorb: each has a header of version, packed size (3 bytes), scheme, size (3 bytes)."""
    chunks, at = [], 0
    while at < len(body) and body[at : at + 7] != b"XETBLOB":  # what follows it is an index of what stands before
        packed_size, size = (int.from_bytes(body[at + i : at + i + 3], "little") for i in (1, 5))
        version, scheme, packed = body[at], body[at + 4], body[at + 8 : at + 8 + packed_size]
        chunk = packed if scheme == NO_COMPRESSION else lz4_frame(packed)
        chunk = ungrouped(chunk) if scheme == GROUPED_LZ4 else chunk
        if version != 0 or len(chunk) != size:
            raise ValueError(f"chunk {len(chunks)}: version {version}, {len(chunk)} bytes instead of {size}")
        chunks.append(chunk)
        at += 8 + packed_size
    return chunks


def read_shard(body: bytes) -> list[tuple[str, list[tuple[str, int, int, int]]]]:
    """(SHA-256, [(name of a xorb, size, first chunk, end of chunks), ...]) of each file in a shard."""
    files, at = [], ROW
    while body[at : at + 32] != BOOKEND:
        flags, count = struct.unpack_from("<II", body, at + 32)
        if not flags & HAS_SHA256:
            raise ValueError("a file without its SHA-256")
        rows = [body[at + ROW * i :][:ROW] for i in range(1, count + 1)]
        segments = [(_hexadecimal(row[:32]), *struct.unpack_from("<III", row, 36)) for row in rows]
        at += ROW * (1 + count * (2 if flags & HAS_VERIFICATION else 1))
        files.append((_hexadecimal(body[at : at + 32]), segments))
        at += ROW
    return files


def _hexadecimal(digest: bytes) -> str:
    """A digest as Xet writes it: four numbers of 64 bits, not 32 bytes."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def ungrouped(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte, which makes numbers of 4 bytes easier to compress."""
    out, at = bytearray(len(data)), 0
    for first in range(4):
        size = len(range(first, len(data), 4))
        out[first::4] = data[at : at + size]
        at += size
    return bytes(out)


def lz4_frame(data: bytes) -> bytes:
    """Decompress an LZ4 frame of independent or linked blocks, without checksums and dictionaries."""
    magic, flags = struct.unpack_from("<IB", data)
    if magic != 0x184D2204 or flags & 0b0001_0101:
        raise ValueError(f"an LZ4 frame of another kind: {data[:7].hex()}")
    at, out = 7 + (8 if flags & 0b1000 else 0), bytearray()
    while size := int.from_bytes(data[at : at + 4], "little"):
        block = data[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        if size >> 31:
            out += block
        else:
            _lz4_block(block, out)
        at += 4 + len(block)
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    """Append what a block stands for: sequences of literals and of a copy from what was written before."""
    at = 0

    def length(number: int) -> int:
        nonlocal at
        more = number == 15
        while more:
            number, more, at = number + block[at], block[at] == 255, at + 1
        return number

    while at < len(block):
        token = block[at]
        at += 1
        literals = length(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at == len(block):
            return
        start = len(out) - int.from_bytes(block[at : at + 2], "little")
        at += 2
        copied = length(token & 15) + 4
        if not 0 <= start < len(out):
            raise ValueError("a copy of what was not written yet")
        pattern = out[start : start + copied]
        out += (pattern * (copied // len(pattern) + 1))[:copied]  # a copy may overlap what it writes

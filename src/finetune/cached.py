"""What is read of the caches while training: the latents of a row, the embedding of a text; and the keys of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune.cache_store import Records, Shelf
from finetune.images import BadRow
from finetune.seeding import key

if TYPE_CHECKING:
    from finetune.data import TrainData
    from finetune.rows import Rows

VERSION = 1  # of how pixels and texts become records; raise it with a change of either


@dataclass(frozen=True)
class CachedLatents:
    """The moments of each row and variant, found by the row's number and never by a step. Picklable."""

    records: Records
    places: np.ndarray
    """[rows found, variants, 2] int32: shard, and number within it; -1 for a row that could not be read."""
    table: Rows
    """What else there is of a row, without its image."""

    def read(self, row: int, epoch: int) -> tuple[Tensor, tuple[int, ...]]:
        """Mean and log-variance of the row in that epoch, [2c, h, w] as stored, and its time_ids: `images.Prepared`.

        Raises BadRow for a row that could not be read when the latents were made, DataError for a damaged file.
        """
        shard, index = self.places[row, epoch % self.places.shape[1]].tolist()
        if shard < 0:
            raise BadRow("has no cached latents: it could not be read when they were made")
        data, sizes = self.records.read(shard, index)
        return torch.from_numpy(data.copy()), sizes


@dataclass(frozen=True)
class CachedTexts:
    """The embeddings of texts."""

    records: Records
    shelf: Shelf
    of: str
    """What is read of which text: see `text_keys`."""

    def read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings of those of `texts` that are stored, float32. Raises DataError for a damaged file."""
        found = {}
        for text, (shard, index) in zip(texts, self.shelf.find(text_keys(texts, self.of)).tolist(), strict=True):
            if shard >= 0:
                found[text] = torch.from_numpy(self.records.read(shard, index)[0].astype(np.float32))
        return found


def usable_rows(data: TrainData) -> np.ndarray:
    """The rows of `data` without those that turned unusable in a run that goes on."""
    return data.rows[data.images[data.rows].any(1)]


def latent_keys(data: TrainData) -> tuple[np.ndarray, np.ndarray]:
    """What the latents of `data` are made of, of each usable row and variant.

    Returns [n, 2] int64 (row, variant) and [n, 2] int64 keys: 128 bits of the image's digest, of all that shapes its
    pixels, and of the draws of crop and flip where they have a say; not of captions, labels or the file's name.
    """
    rules, seed = data.rules, data.seed
    fixed = (VERSION, rules.resolution, rules.channels, rules.image_interpolation_mode, rules.preparation,
             rules.background, rules.center_crop)  # fmt: skip
    crops = not rules.center_crop and rules.preparation != "iddpm"
    places, keys = [], []
    for row in usable_rows(data).tolist():
        image = data.images[row].tobytes()
        for variant in range(rules.variants or 1):
            crop = key(seed, "crop", variant, row) if crops else None
            flip = bool(rules.random_flip and key(seed, "flip", variant, row) % 2)
            places.append((row, variant))
            keys.append(_key(image, repr((fixed, data.shape(row), crop, flip))))
    return np.array(places, np.int64).reshape(-1, 2), _stacked(keys)


def text_keys(texts: Iterable[str], of: str) -> np.ndarray:
    """[n, 2] int64. of: identifies the tokenizer and what is read of the encoder, whose weights name the folder."""
    return _stacked([_key(text.encode("utf-8", "surrogatepass"), of) for text in texts])


def _key(content: bytes, beside: str) -> bytes:
    head = len(content).to_bytes(8, "little")
    return hashlib.blake2b(head + content + beside.encode(), digest_size=16).digest()


def _stacked(keys: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), "<i8").reshape(-1, 2)

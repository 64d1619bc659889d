"""Filling the caches before training: what is there is used, the rest is made by all processes, each its share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from finetune.batching import loader_processes, stacked
from finetune.cache_store import Records, Shelf, Writer, open_shelf
from finetune.cached import VERSION, CachedLatents, CachedTexts, latent_keys, text_keys, usable_rows
from finetune.conditioning import texts_of
from finetune.datacheck import IMAGE_DIGEST
from finetune.durable import need_space
from finetune.errors import ConfigError, DataError
from finetune.frozen import home
from finetune.images import BadRow, Prepared, decode, normalised, prepare, strict_pillow
from finetune.processes import Processes, largest
from finetune.text_conditions import ENCODER_BATCH, Text

if TYPE_CHECKING:
    from finetune.config import TrainConfig
    from finetune.data import TrainData
    from finetune.modules import Modules
    from finetune.rows import Row
    from finetune.space import LatentSpace

log = logging.getLogger(__name__)
BATCH_PIXELS = 1 << 19  # encoded at a time, always in batches of one shape: 8 images of 256 pixels, 2 of 512
BATCHES_BEHIND = 8  # that are encoded before the oldest of them is written
PLAN_LINE = "{kind}: {reused:,} reused, {made:,} made, {megabytes:,.1f} MB"


@dataclass(frozen=True)
class _Filled:
    """A folder of the cache that holds all that could be made."""

    shelf: Shelf
    places: np.ndarray
    """[n, 2] int32: where the record of each key lies; -1 for one that could not be made."""
    reused: int
    """Different records that were there."""

    def line(self, kind: str) -> str:
        """What was reused and made, and what it takes."""
        there = np.unique(self.places[self.places[:, 0] >= 0], axis=0)
        counts = np.bincount(there[:, 0], minlength=len(self.shelf.shards)).tolist()
        sizes = [np.dtype(shard.dtype).itemsize * int(np.prod(shard.shape)) for shard in self.shelf.shards]
        total = sum(count * size for count, size in zip(counts, sizes, strict=True))
        return PLAN_LINE.format(kind=kind, reused=self.reused, made=len(there) - self.reused, megabytes=total / 1e6)


def cache_folder(folder: str | None) -> Path:
    """Where caches are kept: `folder`, the setting cache.folder, or its default."""
    return Path(folder).expanduser() if folder is not None else home() / "cache"


def fill_caches(
    cfg: TrainConfig, data: TrainData, modules: Modules, accelerator: Processes, captions: set[str] | None = None
) -> tuple[TrainData, str]:
    """Make what cfg.cache asks for and is not there yet; the data then read it, and so do the text conditions.

    captions: all different ones of the data's own rows, if they have been read.
    To be called by all processes. Returns the data and what was done, in words. Raises DataError for an image whose
    latents cannot be made or kept, and ConfigError for weights that cannot be read.
    """
    lines = []
    if cfg.cache.latents:
        data, line = _with_latents(cfg, data, modules.space, accelerator)
        lines.append(line)
    texts = texts_of(modules.conditioner) if cfg.cache.text else []
    if texts and data.table.words_change:
        raise ConfigError(
            f"cache.text: {cfg.data.dataset_config} shuffles or drops tags, so that every epoch has new captions and "
            "no embedding would be used twice: remove shuffle_caption and caption_tag_dropout_rate there, or cache.text"
        )
    found: set[str] = set()
    if texts:
        found |= data.table.texts(usable_rows(data)) if captions is None else captions
        found |= set() if data.held_out is None else data.held_out.table.texts(usable_rows(data.held_out))
    for part in texts:
        lines.append(_with_texts(cfg, part, list(dict.fromkeys(["", *sorted(found)])), accelerator))
    for part in modules.frozen:
        part.put_aside()
    return data, "; ".join(lines)


def _with_latents(
    cfg: TrainConfig, data: TrainData, space: LatentSpace, accelerator: Processes
) -> tuple[TrainData, str]:
    places, keys = latent_keys(data)
    folder = _folder(cfg, "latents", cfg.space.vae, space.weights.identity())

    def make(share: np.ndarray) -> None:
        make_latents(cfg, data, places[share], keys[share], space, folder)

    filled = _filled("latents", folder, keys, make, accelerator)
    by_row = np.full((len(data.images), data.rules.variants or 1, 2), -1, np.int32)
    by_row[places[:, 0], places[:, 1]] = filled.places
    latents = CachedLatents(Records(filled.shelf.shards), by_row, data.table.without_images())
    return replace(data, latents=latents), filled.line("latents")


def _with_texts(cfg: TrainConfig, part: Text, texts: list[str], accelerator: Processes) -> str:
    of = repr((VERSION, part.reads, _tokenizer_digest(part.tokenizer)))
    folder = _folder(cfg, "text", part.weights.name, part.weights.identity())
    keys = text_keys(texts, of)

    def make(share: np.ndarray) -> None:
        _make_texts([texts[index] for index in share], keys[share], part, folder, cfg.cache.stored_dtype)

    filled = _filled(part.kind, folder, keys, make, accelerator)
    part.stored = CachedTexts(Records(filled.shelf.shards), filled.shelf, of)
    return filled.line(part.kind)


def _folder(cfg: TrainConfig, kind: str, name: str, identity: str) -> Path:
    """The folder for what this model makes, with a note of what that is."""
    folder = cache_folder(cfg.cache.folder) / kind / f"{identity}-{cfg.cache.stored_dtype}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.txt").write_text(Path(name).name if Path(name).is_dir() else name, "utf-8")
    except OSError as error:
        if not folder.is_dir():  # one that may only be read serves those who need no more
            raise ConfigError(f"cache.folder: nothing can be kept in {folder}: {error}; name another place") from None
    return folder


def _filled(
    what: str, folder: Path, keys: np.ndarray, make: Callable[[np.ndarray], None], accelerator: Processes
) -> _Filled:
    """See that `folder` has a record for each key; make: writes those with these indices."""
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)  # repeats of an image share one
    different = keys[first]
    shelf, places = _found(folder, different, accelerator)
    reused = int((places[:, 0] >= 0).sum())
    # All share the work; what a process then does not see lies on the disk of another machine, and each makes its own.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    ranks = [(accelerator.process_index, accelerator.num_processes), (accelerator.local_process_index, local)]
    for rank, processes in ranks:
        missing = np.sort(first[places[:, 0] < 0])
        if not largest(accelerator, len(missing)):
            break
        with accelerator.all_together():
            make(missing[rank::processes])
        shelf, places = _found(folder, different, accelerator)
    if reused == len(different):
        log.info("cache hit: %s, all %d found in %s", what, reused, folder)
    if accelerator.is_local_main_process:
        shelf.mark_used(places[places[:, 0] >= 0])
    return _Filled(shelf, places[which.reshape(-1)], reused)


def _found(folder: Path, keys: np.ndarray, accelerator: Processes) -> tuple[Shelf, np.ndarray]:
    with accelerator.local_main_process_first():  # it puts right what is damaged
        shelf = open_shelf(folder)
    return shelf, shelf.find(keys)


# -- latents ----------------------------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """Prepared pictures of one shape."""

    indices: list[int]
    pixels: torch.Tensor | None
    """[n, channels, height, width], see `images.Prepared`; None if no picture could be made."""
    time_ids: list[tuple[int, ...]]
    problems: list[str]
    """Of each row without a picture, its name and what is wrong with it."""


class _Pictures(Dataset):
    """The prepared pixels of rows and variants, or what is wrong with the row."""

    def __init__(self, data: TrainData, places: np.ndarray) -> None:
        self.data, self.places = data, places

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Prepared | str]]:
        """Pictures that are read together."""
        rows = self.data.table.read(self.places[indices, 0])
        variants = self.places[indices, 1].tolist()
        with strict_pillow():
            return [(i, self._made(row, variant)) for i, row, variant in zip(indices, rows, variants, strict=True)]

    def _made(self, row: Row, variant: int) -> Prepared | str:
        data, number = self.data, row.number
        try:
            content = data.table.image_bytes(row)
            if hashlib.blake2b(content).digest()[:IMAGE_DIGEST] != data.images[number].tobytes():
                raise BadRow("was changed since it was checked: start again")
            image = decode(content, data.rules).image
            place = {"seed": data.seed, "epoch": variant, "row": number}
            return prepare(image, data.rules, **place, shape=data.shape(number))
        except BadRow as problem:
            return f"{data.table.name(row)} {problem}"


def _together(found: Sequence[tuple[int, Prepared | str]]) -> _Made:
    good = {index: picture for index, picture in found if isinstance(picture, Prepared)}
    pixels = stacked([picture.pixels for picture in good.values()]) if good else None
    problems = [problem for _, problem in found if isinstance(problem, str)]
    return _Made(list(good), pixels, [picture.time_ids for picture in good.values()], problems)


def encode_batch(resolution: int) -> int:
    """How many images are encoded at a time: a latent must not depend on what else was missing."""
    return max(1, min(16, BATCH_PIXELS // resolution**2))


def make_latents(
    cfg: TrainConfig, data: TrainData, places: np.ndarray, keys: np.ndarray, space: LatentSpace, folder: Path
) -> None:
    """Encode these rows and variants, [n, 2], and write them to `folder` under `keys`. Raises DataError.

    Held in memory: as many batches of images as are loaded ahead, and at most a shard of records. Records are written
    in a thread, some batches behind what is encoded.
    """
    if not len(places):
        return
    size, dtype, device = encode_batch(cfg.data.resolution), cfg.cache.stored_dtype, torch.device(space.weights.device)
    _need_space(folder, len(places) * 2 * space.channels * space.size**2 * np.dtype(dtype).itemsize)
    batches = _of_one_shape([data.shape(int(row)) for row in places[:, 0]], size)
    on_gpu = device.type == "cuda"
    how = loader_processes(cfg, on_gpu=on_gpu, processes=1)
    loader = DataLoader(_Pictures(data, places), batch_sampler=batches, collate_fn=_together, pin_memory=on_gpu, **how)
    waiting: deque[Future[None]] = deque()

    def keep(made: _Made, moments: torch.Tensor, finite: torch.Tensor) -> None:
        if not all(good := finite.tolist()):
            row = int(places[made.indices[good.index(False)], 0])
            raise DataError(_not_finite(data.name(row), cfg.space.vae, dtype))
        for index, record, time_ids in zip(made.indices, moments.cpu().numpy(), made.time_ids, strict=True):
            writer.add(keys[index], record, time_ids)

    with (
        tqdm(total=len(places), desc="cache latents", unit="image", delay=2, disable=None) as bar,
        Writer(folder, dtype=dtype) as writer,
        ThreadPoolExecutor(1) as thread,
    ):
        for made in loader:
            bar.update(len(made.indices) + len(made.problems))
            if made.problems and cfg.data.on_error == "error":
                raise DataError(made.problems[0])
            if made.pixels is None:
                continue
            pixels = normalised(made.pixels.to(device, non_blocking=True))
            filled = torch.cat([pixels, pixels[:1].expand(size - len(pixels), -1, -1, -1)])
            moments = space.moments(filled).to(getattr(torch, dtype))[: len(pixels)]
            waiting.append(thread.submit(keep, made, moments, moments.isfinite().flatten(1).all(1)))
            while len(waiting) > BATCHES_BEHIND:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()


def _of_one_shape(shapes: Sequence[tuple[int, int]], size: int) -> list[list[int]]:
    """The indices of `shapes` in batches of at most `size`, in each of which all shapes are equal."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index, shape in enumerate(shapes):
        alike.setdefault(shape, []).append(index)
    return [same[start : start + size] for same in alike.values() for start in range(0, len(same), size)]


def _not_finite(row: str, vae: str, dtype: str) -> str:
    wider = " set cache.dtype float32, which holds larger numbers," if dtype == "float16" else ""
    return (
        f"{row}: the VAE {vae} makes latents of it that are not finite in {dtype}:{wider} use another VAE, or leave "
        "the row out"
    )


# -- texts ------------------------------------------------------------------------------------------------------------


def _make_texts(texts: Sequence[str], keys: np.ndarray, part: Text, folder: Path, dtype: str) -> None:
    with tqdm(total=len(texts), desc="cache texts", unit="text", delay=2, disable=None) as bar:
        with Writer(folder, dtype=dtype) as writer:
            for start in range(0, len(texts), ENCODER_BATCH):
                chunk = texts[start : start + ENCODER_BATCH]
                rows = part.embeddings(chunk).to(getattr(torch, dtype))
                bar.update(len(chunk))
                for key, text, row in zip(keys[start:], chunk, rows, strict=False):
                    if not row.isfinite().all():
                        raise DataError(f"the text encoder's embedding of {text!r} is not finite in {dtype}")
                    writer.add(key, row.numpy())


def _tokenizer_digest(tokenizer: Any) -> str:
    """The same for tokenizers that make the same numbers of a text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    rest = {name: value for name, value in state.items() if name not in ("padding", "truncation")}  # of its last call
    what = (json.dumps(rest, sort_keys=True), tokenizer.model_max_length, tokenizer.pad_token_id)
    return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()


# -- small parts ------------------------------------------------------------------------------------------------------


def _need_space(folder: Path, size: int) -> None:
    try:
        need_space(folder, size)
    except OSError as error:
        raise DataError(
            f"the cache does not fit: {error}. Make room (`finetune cache --prune`), name another place by "
            "cache.folder, or train without it (cache.latents false)"
        ) from None

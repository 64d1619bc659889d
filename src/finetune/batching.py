"""Samples -> batches: which sample comes when, who makes it, and how the loader's processes behave.

Position p of the run (counting samples from 0) holds the row that comes at p % n in epoch p // n, where n is the number
of usable rows (see order.py; of buckets, see buckets.py). Optimizer step s takes the positions s*G .. s*G + G-1 of the
global batch G = accumulation * world_size * micro_batch, whoever computes them: micro-step a of process r takes the
micro_batch positions from s*G + (a * world_size + r) * micro_batch. So every row comes exactly once per epoch, batches
run on across the end of an epoch, and a run goes on from any step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from finetune.config import TrainConfig
from finetune.data import TrainData
from finetune.images import normalised
from finetune.order import Order
from finetune.samples import Replaced, Sample
from finetune.watchdog import LOADER_POLL

Item = TypeVar("Item")
Place = tuple[int, int, int]  # position in the run, epoch, row
HOST = ("rows", "positions", "class_labels")  # what of a batch is not moved onto the device
IMPORTS = ["finetune.batching"]  # what each loader process needs, and so pays for once


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one process."""

    pixels: torch.Tensor | None
    """[B, channels, height, width] uint8, or float32 in [-1, 1] if an image has more than 8 bits; None with cached
    latents."""
    captions: list[str] | None
    class_labels: torch.Tensor | None
    """[B] int64."""
    rows: torch.Tensor
    """[B] int64: number of the row in the data set that the sample is made of."""
    positions: torch.Tensor
    """[B] int64: position of the sample in the run."""
    time_ids: torch.Tensor | None = None
    """[B, 6] float32, SDXL's sizes in pixels: see `images.Prepared`."""
    small: torch.Tensor | None = None
    """[B, channels, side, side], as `pixels`: the small images of data.low_res_column."""
    moments: torch.Tensor | None = None
    """[B, 2c, h, w] float16 or float32, of the VAE's posterior, with cached latents: `space.LatentSpace.moments`."""
    mask: torch.Tensor | None = None
    """[B, 1, height, width] float32 in [0, 1]: how much each pixel counts in a masked loss."""
    loss_weight: torch.Tensor | None = None
    """[B] float32: what the loss of each sample counts, with prior preservation."""
    replaced: tuple[Replaced, ...] = ()
    """The rows that turned unusable, for which others of `rows` stand in: see `data.report_replaced`."""

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def pixel_values(self) -> torch.Tensor | None:
        """[B, channels, height, width] float32 in [-1, 1], where `pixels` are; None with cached latents."""
        return None if self.pixels is None else normalised(self.pixels)

    @cached_property
    def low_res(self) -> torch.Tensor | None:
        """[B, channels, side, side] float32 in [-1, 1], where `small` is."""
        return None if self.small is None else normalised(self.small)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; called by the DataLoader."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`, without waiting for the copy if it is in page-locked memory.

        Rows, positions and class labels stay: the host reads them in every step, and would have to wait for them.
        """
        moved = {name: tensor for name, tensor in self.tensors.items() if name not in HOST}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in moved.items()})


class TrainDataset(Dataset):
    """The samples of the data by (position, epoch, row); the positions are only carried along."""

    def __init__(self, data: TrainData) -> None:
        self.data = data

    def __getitem__(self, place: Place) -> tuple[Place, Sample]:
        """One sample. Raises DataError."""
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[Place]) -> list[tuple[Place, Sample]]:
        """Samples that are read together, as the DataLoader asks for them: one read of the data set, not B."""
        _, epochs, rows = zip(*places, strict=True)
        return list(zip(places, self.data.samples(rows, epochs), strict=True))


class EndlessSampler(Sampler[list[Place]]):
    """The micro-batches of one process from step `start` on, without end, each as a list of (position, epoch, row)."""

    def __init__(
        self,
        order: Order,
        *,
        micro_batch: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        start: int = 0,
    ) -> None:
        """start: the optimizer step (global batch) to begin with."""
        assert len(order) > 0 and 0 <= rank < world_size and min(micro_batch, accumulation) > 0 and start >= 0
        self.order, self.micro_batch, self.accumulation = order, micro_batch, accumulation
        self.world_size, self.rank, self.start = world_size, rank, start

    def __iter__(self) -> Iterator[list[Place]]:
        micro_step = self.start * self.accumulation
        while True:
            first = (micro_step * self.world_size + self.rank) * self.micro_batch
            yield [self._place(position) for position in range(first, first + self.micro_batch)]
            micro_step += 1

    def _place(self, position: int) -> Place:
        return position, *self.order.place(position)


def collate(samples: list[tuple[Place, Sample]]) -> Batch:
    """Stack samples into a Batch."""
    places, made = zip(*samples, strict=True)
    captions = [sample.caption for sample in made]
    labels = [sample.label for sample in made]
    return Batch(
        pixels=None if made[0].pixels is None else stacked([sample.pixels for sample in made]),
        captions=None if captions[0] is None else captions,
        class_labels=None if labels[0] is None else torch.tensor(labels),
        rows=torch.tensor([sample.row for sample in made]),
        positions=torch.tensor([position for position, _, _ in places]),
        time_ids=torch.tensor([sample.time_ids for sample in made], dtype=torch.float32),
        small=None if made[0].low_res is None else stacked([sample.low_res for sample in made]),
        moments=None if made[0].moments is None else torch.stack([sample.moments for sample in made]),
        mask=None if made[0].mask is None else torch.stack([sample.mask for sample in made]),
        loss_weight=None if made[0].loss_weight is None else torch.tensor([sample.loss_weight for sample in made]),
        replaced=tuple(sample.replaced for sample in made if sample.replaced),
    )


def stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Prepared images of one shape in a tensor: normalised if they are not all of 8 bits, or not all of more."""
    alike = len({image.dtype for image in images}) == 1
    return torch.stack([image if alike else normalised(image) for image in images])


def first_batch(data: TrainData, n: int) -> Batch:
    """The first n usable rows (all, if there are fewer) as in epoch 0, to be shown and not trained on."""
    rows = data.rows[:n]
    places = [(position, 0, int(row)) for position, row in enumerate(rows)]
    return collate(list(zip(places, data.samples(rows, [0] * len(rows)), strict=True)))


def default_workers(*, processes: int, on_gpu: bool) -> int:
    """Loader processes per training process: its share of the cores less one, at most 8; none without a GPU.

    Without a GPU training itself keeps every core busy: a loader process would take from it what it gives, and cost
    its start and the way of every batch between processes on top. 0 is always valid: the training process loads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // processes - 1)) if on_gpu else 0


def make_loader(
    data: TrainData,
    cfg: TrainConfig,
    *,
    start: int,
    rank: int,
    world_size: int,
    accumulation: int,
    micro_batch: int,
    pin_memory: bool,
) -> DataLoader:
    """The endless loader of one process, from optimizer step `start` on; to be iterated once, for the whole run.

    It is not to be given to Accelerator.prepare, which would divide it among the processes a second time. Making and
    iterating it draws nothing from torch's global random state. pin_memory: training is on a GPU.
    """
    sampler = EndlessSampler(
        data.order(global_batch=accumulation * world_size * micro_batch),
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world_size,
        rank=rank,
        start=start,
    )
    how = loader_processes(cfg, processes=world_size, on_gpu=pin_memory)
    return DataLoader(
        TrainDataset(data),
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=pin_memory,
        timeout=LOADER_POLL if how["num_workers"] else 0,
        **how,
    )


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`, in the same order; closing it closes `batches`.

    On a GPU the next one is copied, on a stream of its own, while the step that takes this one computes.
    """
    with closing(batches):
        if device.type != "cuda":
            yield from (batch.to(device) for batch in batches)
            return
        for batch, copied in one_ahead(_being_copied(batches, device)):
            user = torch.cuda.current_stream(device)
            user.wait_event(copied)
            for tensor in batch.tensors.values():
                if tensor.is_cuda:
                    tensor.record_stream(user)  # else the next copy is given its memory while it is still being read
            yield batch


def _being_copied(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    """Each batch as it will be on the device, and the event of its being there."""
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = batch.to(device)
        yield moved, stream.record_event()


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each read before the one in front of it is given.

    What goes wrong with the one ahead is raised when it is asked for: who never asks for it, never hears of it.
    """
    ahead = next(items, None)
    while ahead is not None:
        now, failed = ahead, None
        try:
            ahead = next(items, None)
        except Exception as error:  # whatever the data or a loader process raises
            failed = error
        yield now
        if failed is not None:
            raise failed


def loader_processes(cfg: TrainConfig, *, processes: int, on_gpu: bool) -> dict[str, Any]:
    """The arguments of a DataLoader that say who loads. processes: of the training, in all."""
    workers = cfg.data.dataloader_num_workers
    if workers is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # set by the launcher: processes on this machine
        workers = default_workers(processes=local, on_gpu=on_gpu)
    return {
        "num_workers": workers,
        "generator": torch.Generator(),  # the loader seeds its processes; without it, from torch's global state
        "worker_init_fn": _init_worker,
        "multiprocessing_context": _process_context() if workers else None,
    }


def _process_context() -> multiprocessing.context.BaseContext:
    """How loader processes are started: never by a plain fork, which copies held locks of threads and a CUDA context.

    A fork server, where there is one, imports torch once in a clean process and forks the workers from there; `spawn`
    imports it in each of them, several seconds of CPU time apiece.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    return context


def _init_worker(worker: int) -> None:
    """Outlive the signals that a terminal or a scheduler sends to all processes: the training process saves first.

    The second SIGTERM counts, so that a hung worker still ends when the training process gives it up.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """torch's own watch looks at the parent process, which is the fork server, and that outlives a killed trainer."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def _ignore_once(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)

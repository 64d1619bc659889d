"""The order of samples and the loader: what is drawn depends on the position in the run, and on nothing else."""

import io
import itertools
import multiprocessing
import os
import random
import signal

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

import finetune.batching
from finetune.batching import EndlessSampler, TrainDataset, collate, default_workers, make_loader
from finetune.config import TrainConfig
from finetune.data import open_data
from finetune.errors import DataError, ProcessError
from finetune.order import RowOrder
from finetune.watchdog import patiently

ROWS = 10


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path)
    return open_data(config(), dataset=pictures(), progress=False)


def config(**settings) -> TrainConfig:
    return TrainConfig(
        output_dir="unused",
        data={"resolution": 8, "random_flip": True, "caption_column": ["text", "other"], **settings},
        conditioning={"kind": "pooled_text", "text_encoder": "unused", "tokenizer": "unused"},
        sample={"prompts": ["unused"]},
    )


def pictures() -> Dataset:
    columns = {"image": [], "text": [f"one {n}" for n in range(ROWS)], "other": [f"two {n}" for n in range(ROWS)]}
    for number in range(ROWS):
        file = io.BytesIO()
        noise = np.random.RandomState(number).randint(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(noise).save(file, "PNG")
        columns["image"].append({"bytes": file.getvalue(), "path": None})
    return Dataset.from_dict(columns)


def batches(data, count: int, *, workers: int = 0, start: int = 0, **layout) -> list:
    layout = {"rank": 0, "world_size": 1, "accumulation": 1, "micro_batch": 4} | layout
    cfg = config(dataloader_num_workers=workers)
    return list(itertools.islice(patiently(make_loader(data, cfg, start=start, pin_memory=False, **layout), 60), count))


def same(one, other) -> bool:
    tensors = ("pixel_values", "rows", "positions")
    return one.captions == other.captions and all(torch.equal(getattr(one, t), getattr(other, t)) for t in tensors)


def places(count: int, rows=range(ROWS), seed: int = 0, **settings) -> list:
    sampler = EndlessSampler(RowOrder(np.array(rows), seed=seed), **({"micro_batch": 4} | settings))
    return list(itertools.islice(sampler, count))


def test_each_row_comes_once_per_epoch_in_an_order_of_its_own():
    rows = [3, 5, 8, 13, 21, 34, 55]
    flat = list(itertools.chain(*places(7 * 3, rows)))  # 84 samples, 12 epochs, batches run across their ends
    assert [position for position, _, _ in flat] == list(range(84))
    epochs = [[row for _, epoch, row in flat if epoch == e] for e in range(12)]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12
    assert all(epoch == position // 7 for position, epoch, _ in flat)
    assert [row for _, _, row in itertools.chain(*places(21, rows, seed=1))] != [row for _, _, row in flat]


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = places(1, [1, 2, 3], micro_batch=8)
    assert [epoch for _, epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("world_size, accumulation, micro_batch", [(2, 3, 2), (4, 1, 3), (1, 4, 3), (3, 2, 2)])
def test_processes_and_accumulation_share_the_positions_of_one_process(world_size, accumulation, micro_batch):
    steps = 5
    layout = {"world_size": world_size, "accumulation": accumulation, "micro_batch": micro_batch}
    ranks = [places(steps * accumulation, rank=rank, **layout) for rank in range(world_size)]
    alone = places(steps, micro_batch=12)
    for step in range(steps):
        window = slice(step * accumulation, (step + 1) * accumulation)
        parts = [place for rank in ranks for batch in rank[window] for place in batch]
        assert sorted(parts) == alone[step]


def test_start_is_skipping():
    layout = {"world_size": 2, "rank": 1, "accumulation": 2}
    assert places(8, start=3, **layout) == places(14, **layout)[6:]
    assert places(1, start=10**12)[0][0][0] == 4 * 10**12  # at once, however far


def test_batches_hold_what_belongs_to_their_rows(data):
    for batch in batches(data, 5):
        assert batch.pixel_values.shape == (4, 3, 8, 8) and batch.pixel_values.dtype == torch.float32
        assert batch.pixel_values.abs().max() <= 1 and len(batch) == 4 and batch.class_labels is None
        for row, caption in zip(batch.rows.tolist(), batch.captions, strict=True):
            assert caption in (f"one {row}", f"two {row}")
    dataset = TrainDataset(data)
    assert torch.equal(collate([dataset[(7, 0, 3)]]).pixel_values[0], data.samples([3], [0])[0].pixels)


def test_a_row_looks_different_in_another_epoch(data):
    dataset = TrainDataset(data)
    views = {dataset[(0, epoch, 3)][1].pixels.numpy().tobytes() for epoch in range(20)}
    assert len(views) > 5
    assert len({dataset[(0, epoch, 3)][1].caption for epoch in range(20)}) == 2
    assert torch.equal(dataset[(0, 2, 3)][1].pixels, dataset[(999, 2, 3)][1].pixels)  # not of the position


def test_processes_make_the_batches_that_one_makes(data):
    alone, loaded = batches(data, 6), batches(data, 6, workers=2)
    assert all(same(one, other) for one, other in zip(alone, loaded, strict=True))
    assert not same(alone[0], alone[1])
    split = [batches(data, 4, world_size=2, rank=rank, accumulation=2, micro_batch=2) for rank in (0, 1)]
    joined = torch.cat([split[rank][micro].pixel_values for micro in (0, 1) for rank in (0, 1)])
    assert torch.equal(joined, torch.cat([batch.pixel_values for batch in alone[:2]]))


def test_spawned_processes_work_too(data, monkeypatch):
    monkeypatch.setattr(finetune.batching, "_process_context", lambda: multiprocessing.get_context("spawn"))
    assert same(batches(data, 1, workers=1)[0], batches(data, 1)[0])


def test_resumed_loader_goes_on(data):
    layout = {"world_size": 2, "rank": 1, "accumulation": 2, "micro_batch": 2}
    for one, other in zip(batches(data, 10, **layout)[6:], batches(data, 4, start=3, **layout), strict=True):
        assert same(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_global_random_states(data, workers):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batches(data, 3, workers=workers)
    assert torch.equal(before[0], torch.random.get_rng_state()) and random.getstate() == before[2]
    assert (before[1] == np.random.get_state()[1]).all()
    plain = torch.utils.data.DataLoader([1, 2])
    list(plain)
    assert not torch.equal(before[0], torch.random.get_rng_state())  # what a loader without a generator does


def test_loader_processes_outlive_one_signal(data):
    layout = {"rank": 0, "world_size": 1, "accumulation": 1, "micro_batch": 4}
    loader = patiently(make_loader(data, config(dataloader_num_workers=1), start=0, pin_memory=False, **layout), 60)
    before = multiprocessing.active_children()
    next(loader)
    (worker,) = [child for child in multiprocessing.active_children() if child not in before]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    for _ in range(20):
        next(loader)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)  # the second one: what the training process does to a hung worker
    worker.join(10)
    assert not worker.is_alive()
    with pytest.raises(ProcessError, match="a process that loads samples was killed"):
        for _ in range(20):
            next(loader)


def test_an_error_in_a_loader_process_keeps_its_kind_and_message(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / f"{number}.png")
    cfg = TrainConfig(
        output_dir="x", data={"train_data_dir": str(tmp_path / "data"), "resolution": 8, "dataloader_num_workers": 1}
    )
    data = open_data(cfg, progress=False)
    (tmp_path / "data" / "2.png").write_bytes(b"")
    loader = make_loader(data, cfg, start=0, rank=0, world_size=1, accumulation=1, micro_batch=4, pin_memory=False)
    with pytest.raises(DataError, match="2.png is empty"):
        next(iter(loader))


def test_default_workers():
    cores = len(os.sched_getaffinity(0))
    assert default_workers(processes=1, on_gpu=False) == 0
    assert default_workers(processes=1, on_gpu=True) == max(0, min(8, cores - 1))
    assert default_workers(processes=cores, on_gpu=True) == 0 == default_workers(processes=10 * cores, on_gpu=True)

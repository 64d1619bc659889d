"""The order of samples and the loader: what is drawn depends on the position in the run, and on nothing else."""

import hashlib
import io
import itertools
import multiprocessing
import os
import random
import signal
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

import finetune.batching
from finetune.batching import (
    EndlessSampler,
    TrainDataset,
    collate,
    default_workers,
    make_loader,
    on_device,
    one_ahead,
)
from finetune.config import TrainConfig
from finetune.data import open_data
from finetune.errors import DataError, ProcessError
from finetune.images import normalised
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
    assert torch.equal(collate([dataset[(7, 0, 3)]]).pixels[0], data.samples([3], [0])[0].pixels)


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


# -- bytes to the device -----------------------------------------------------------------------------------------------

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"))
SHAPES = ((40, 24), (24, 40), (33, 33), (90, 20), (70, 66))
FORMER = {  # BLAKE2 of what batches showed when samples were float32 from the decoder on
    "rgb": "9dead4f0a0991ab3",
    "grey": "d83447cd0e1c0c72",
    "deep": "97ddc0304d6c890e",
    "mixed": "ab9352314b2059be",
    "iddpm": "523abbf858a952c7",
    "buckets": "1e1be5f64580a986",
    "mask": "9df276ef9b85b539",
    "low_res": "c501a5f40acc1abc",
}


def noise(size, kind: str, seed: int) -> Image.Image:
    draw = np.random.RandomState(seed)
    if kind == "deep":
        return Image.fromarray(draw.randint(0, 65536, size[::-1]).astype(np.uint16))
    return Image.fromarray(draw.randint(0, 256, (*size[::-1], len(kind)), np.uint8).squeeze(), kind)


def stored(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def shown(name: str) -> list:
    """Five batches of nine images, of five shapes, prepared in one of the ways of FORMER."""
    kinds = {"grey": "L", "deep": "deep", "mask": "RGBA"}
    images = [noise(SHAPES[i % 5], kinds.get(name, "RGB"), i) for i in range(9)]
    rules, conditioning, columns = {"random_flip": True}, {"kind": "none"}, {}
    if name == "grey":
        rules |= {"channels": 1}
    elif name == "deep":
        rules |= {"image_interpolation_mode": "lanczos"}
    elif name == "mixed":
        images[1], images[4] = (noise(SHAPES[i], "deep", i) for i in (1, 4))
    elif name == "iddpm":
        rules |= {"preparation": "iddpm"}
    elif name == "buckets":
        rules |= {"buckets": "auto", "max_aspect_ratio": 10}
    elif name == "mask":
        rules |= {"alpha_mask": True}
    elif name == "low_res":
        rules |= {"low_res_column": "small", "min_side": 4}
        conditioning = {"kind": "low_res", "factor": 2}
        columns["small"] = [stored(image.resize((16, 16))) for image in images]
        images = [image.resize((32, 32)) for image in images]
    cfg = TrainConfig(output_dir="x", data={"resolution": 16, "min_side": 8, **rules}, conditioning=conditioning)
    dataset = Dataset.from_dict({"image": [stored(image) for image in images], **columns})
    data = open_data(cfg, dataset=dataset, progress=False).in_buckets(4)
    layout = {"rank": 0, "world_size": 1, "accumulation": 1, "micro_batch": 4}
    return list(itertools.islice(make_loader(data, cfg, start=0, pin_memory=False, **layout), 5))


@pytest.mark.parametrize("name", FORMER)
def test_what_is_shown_is_bit_for_bit_what_it_was_as_float32(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path)
    found = hashlib.blake2b(digest_size=8)
    for batch in shown(name):
        for tensor in (batch.pixel_values, batch.low_res, batch.mask):
            found.update(b"" if tensor is None else tensor.numpy().tobytes())
        eight_bit = batch.pixels.dtype == torch.uint8 and (batch.small is None or batch.small.dtype == torch.uint8)
        assert batch.pixel_values.dtype == torch.float32 and (eight_bit or name in ("deep", "mixed"))
    assert found.hexdigest() == FORMER[name]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_every_byte_is_normalised_alike_on_every_device(device):
    levels = torch.arange(256, dtype=torch.uint8)
    expected = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    assert (normalised(levels.to(device)).cpu().numpy() == expected).all()
    by_inverse = np.arange(256, dtype=np.float32) * np.float32(1 / 127.5) - np.float32(1)
    assert (by_inverse != expected).any(), "negative control: what CUDA makes of a division by a number"
    assert normalised(floats := torch.rand(3)) is floats


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_batches_come_to_the_device_in_their_order_and_the_loader_is_closed(data, device):
    layout = {"rank": 0, "world_size": 1, "accumulation": 1, "micro_batch": 4, "pin_memory": device == "cuda"}
    loader = patiently(make_loader(data, config(dataloader_num_workers=0), start=0, **layout), 60)
    moved = on_device(loader, torch.device(device))
    for one, other in zip(batches(data, 7), itertools.islice(moved, 7), strict=True):
        assert other.pixels.device.type == device and other.positions.device.type == "cpu"
        assert same(one, replace(other, pixels=other.pixels.cpu()))
    moved.close()
    assert next(loader, None) is None


def test_one_is_read_ahead_and_its_error_comes_in_its_turn():
    read = []

    def items():
        for number in (1, 2, 3):
            read.append(number)
            yield number
        raise DataError("the fourth")

    ahead = one_ahead(items())
    assert next(ahead) == 1 and read == [1, 2]
    assert [next(ahead), next(ahead)] == [2, 3]  # the step that takes the third is not lost
    with pytest.raises(DataError, match="the fourth"):
        next(ahead)
    assert list(one_ahead(iter([5, 6]))) == [5, 6]

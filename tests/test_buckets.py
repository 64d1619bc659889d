"""Buckets: shapes near the pixels of the square, least cropped, one per global batch, each row once per pass."""

import io
import itertools
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from pydantic import ValidationError

import finetune.datacheck
import tiny
from finetune.batching import EndlessSampler, collate, make_loader
from finetune.buckets import BucketOrder, Buckets, assign, fill, kept, sides, summary
from finetune.config import Data, TrainConfig
from finetune.data import TrainData, open_data
from finetune.errors import ConfigError, DataError
from finetune.images import covering
from finetune.plan import buckets_line, data_line

SDXL = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344
768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024""".split()  # Podell et al., table 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")


def shapes_of(resolution: int, step: int) -> np.ndarray:
    return sides(resolution, step, shortest=resolution // 2, longest=2 * resolution)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_the_shapes_are_those_of_sdxl_and_those_of_up_to_a_tenth_more():
    found = {(int(h), int(w)) for h, w in shapes_of(1024, 64)}
    table = {tuple(map(int, shape.split("x"))) for shape in SDXL}
    table |= {(w, h) for h, w in table}
    assert {(h, w) for h, w in found if h * w <= 1024**2} == table
    assert len(found) > len(table)


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (512, 64), (768, 64), (32, 4), (8, 2)])
def test_shapes_keep_their_promise(resolution, step):
    found = [(int(h), int(w)) for h, w in shapes_of(resolution, step)]
    every = itertools.product(range(step, 4 * resolution, step), repeat=2)
    near = [(h, w) for h, w in every if abs(Fraction(h * w, resolution**2) - 1) <= Fraction(1, 10)]
    assert found == [(h, w) for h, w in near if resolution / 2 <= min(h, w) and max(h, w) <= 2 * resolution]
    assert (resolution, resolution) in found and {(w, h) for h, w in found} == set(found)


@pytest.mark.parametrize(("resolution", "step", "most"), [(512, 64, 0.15), (1024, 64, 0.03), (768, 64, 0.08)])
def test_little_is_cropped_at_any_proportions_up_to_four(resolution, step, most):
    ratios = np.exp(np.linspace(-np.log(4), np.log(4), 2001))
    sizes = np.stack([np.full(2001, 10_000), 10_000 * ratios], axis=1).astype(np.int64)
    shapes = shapes_of(resolution, step)
    assert kept(sizes, shapes[assign(sizes, shapes, resolution)]).min() > 1 - most
    assert kept(sizes, np.array([resolution, resolution])).min() < 0.26  # the square: the negative control


def test_each_image_comes_in_the_shape_that_crops_it_least():
    shapes = shapes_of(512, 64)
    sizes = np.random.RandomState(0).randint(8, 3000, (300, 2))
    for (h, w), found in zip(sizes.tolist(), assign(sizes, shapes, 512), strict=True):
        share = [Fraction(min(h * wide, w * high), max(h * wide, w * high)) for high, wide in shapes.tolist()]
        assert share[found] == max(share)
        high, wide = covering((h, w), tuple(shapes[found]))
        assert high >= shapes[found][0] and wide >= shapes[found][1] and (high, wide) >= tuple(shapes[found])
        assert high == shapes[found][0] or wide == shapes[found][1]


def test_of_equally_good_shapes_the_one_nearest_to_the_square_then_the_taller():
    shapes = np.array([[400, 600], [480, 720], [600, 400], [720, 480]])
    assert assign(np.array([[100, 150], [150, 100]]), shapes, 512).tolist() == [0, 2]  # 512^2 is nearer to 400 * 600
    assert assign(np.array([[100, 100]]), shapes, 512).tolist() == [2]  # all keep two thirds
    assert assign(np.array([[100, 100]]), shapes[::-1], 512).tolist() == [1]  # whatever comes first


def rules(resolution=512, **settings) -> Data:
    return Data(resolution=resolution, buckets="auto", **settings)


def filled(sizes, *, multiple=64, **settings) -> Buckets:
    return fill(np.array(sizes, np.int32), np.arange(len(sizes)), rules(**settings), multiple=multiple)


def test_rows_are_filled_into_the_shapes_that_are_needed():
    sizes = np.array([[512, 512], [0, 0], [900, 600], [600, 900], [3000, 3000], [0, 0], [600, 901]], np.int32)
    rows = np.array([0, 2, 3, 4, 6])
    buckets = fill(sizes, rows, rules(), multiple=64)
    assert buckets.shapes.tolist() == [[448, 640], [512, 512], [640, 448]] and buckets.step == 64
    assert [rows.tolist() for rows in buckets.rows] == [[3, 6], [0, 4], [2]]
    assert buckets.of_row.tolist() == [1, -1, 2, 0, 1, -1, 0] and buckets.shape(6) == (448, 640)
    found = summary(buckets, sizes)
    assert found["images"] == {"640x448": 2, "512x512": 2, "448x640": 1} and found["upscaled"] == 0
    shares = [1 - 640 / 448 / 1.5] * 2 + [1 - 640 / 448 / (901 / 600)]
    assert found["cropped"] == {"mean": round(sum(shares) / 5, 4), "max": round(max(shares), 4)}


def test_a_row_of_unknown_size_is_no_part_of_the_report():
    sizes = np.array([[512, 512], [0, 0], [900, 600]], np.int32)
    buckets = fill(sizes, np.arange(3), rules(), multiple=64)
    assert buckets.shape(1) == (512, 512)
    assert summary(buckets, sizes)["cropped"]["max"] == pytest.approx(0.0476, abs=1e-3)


def test_small_images_are_enlarged_or_have_buckets_of_their_own():
    sizes = [[300, 300], [512, 500], [130, 250], [900, 600], [3000, 3000]]
    enlarged = filled(sizes)
    assert [enlarged.shape(row) for row in range(5)] == [(512, 512), (512, 512), (384, 704), (640, 448), (512, 512)]
    assert summary(enlarged, np.array(sizes))["upscaled"] == 3
    own = filled(sizes, bucket_upscale=False)
    assert [own.shape(row) for row in range(5)] == [(256, 256), (512, 448), (128, 192), (640, 448), (512, 512)]
    assert summary(own, np.array(sizes))["upscaled"] == 0
    with pytest.raises(DataError, match=r"rows 1, 2 have a side below 64 pixels.*data.min_side 64"):
        filled([[300, 300], [63, 200], [200, 63]], bucket_upscale=False)


def test_the_step():
    assert filled([[1, 1]], resolution=1024, multiple=32).step == 64  # SDXL: 16 steps to a side
    assert filled([[1, 1]], resolution=768, multiple=64).step == 64
    assert filled([[1, 1]], resolution=500, multiple=4).step == 100  # the multiples of 4 between do not divide it
    assert filled([[1, 1]], bucket_step=128).step == 128
    for wrong in (96, 192):
        with pytest.raises(ConfigError, match=rf"multiple of 64.*divide data.resolution 512, got {wrong}: use 64, 128"):
            filled([[1, 1]], bucket_step=wrong)
    with pytest.raises(ConfigError, match="no shape but the square"):
        filled([[1, 1]], resolution=64)


def test_what_would_do_nothing_or_cannot_be_is_refused():
    for name, value in [("bucket_step", 64), ("bucket_min_side", 64), ("bucket_max_side", 640), ("bucket_upscale", 0)]:
        with pytest.raises(ValidationError, match=rf"data.{name} is .*set data.buckets auto"):
            Data(resolution=512, **{name: value if value else False})
    with pytest.raises(ValidationError, match="must lie between data.bucket_min_side .576."):
        rules(bucket_min_side=576)
    with pytest.raises(ValidationError, match="data.preparation iddpm crops a square"):
        rules(preparation="iddpm")
    with pytest.raises(ValidationError, match="data.buckets auto needs the sizes of all images.*remove data.streaming"):
        rules(streaming=True)
    with pytest.raises(ValidationError, match="data.buckets: the small images"):
        TrainConfig(output_dir="x", data={"resolution": 64, "buckets": "auto"}, conditioning={"kind": "low_res"})


# -- order -------------------------------------------------------------------------------------------------------------


def order_of(counts, batch: int, seed: int = 0) -> BucketOrder:
    """Buckets of so many rows; the rows of each lie apart, as in data."""
    of_row = np.random.RandomState(5).permutation(np.repeat(np.arange(len(counts)), counts))
    shapes = np.array([[8, 8 * (b + 1)] for b in range(len(counts))])
    return BucketOrder(Buckets(8, shapes, of_row.astype(np.int32)), seed=seed, global_batch=batch)


def steps(order: BucketOrder, count: int) -> list[list[tuple[int, int]]]:
    """(time, row) of each place of each step."""
    return [[order.place(step * order.batch + i) for i in range(order.batch)] for step in range(count)]


CASES = [
    (counts, batch)
    for counts in ([7], [1], [5, 9], [1, 2, 30], [8, 16, 3, 24], [1, 1, 1, 1, 40])
    for batch in (1, 3, 8)
]


@pytest.mark.parametrize(("counts", "batch"), CASES)
def test_each_row_comes_once_per_pass_and_often_enough_per_epoch(counts, batch):
    order = order_of(counts, batch)
    bucket_of = {int(row): b for b, rows in enumerate(order.rows) for row in rows}
    epochs = 5
    made = steps(order, order.steps(epochs))
    assert len(order) == sum(counts)
    for step in made:
        assert len({bucket_of[row] for _, row in step}) == 1, "one shape to a batch"
    for epoch in range(1, epochs + 1):
        so_far = list(itertools.chain(*made[: order.steps(epoch)]))
        for b, rows in enumerate(order.rows):
            times = Counter(time for time, row in so_far if bucket_of[row] == b)
            given = sum(times.values())
            assert 0 <= given - len(rows) * epoch < batch, "no more than it takes to fill the last batch"
            whole = given // len(rows)
            for time in range(whole):
                assert sorted(row for t, row in so_far if t == time and bucket_of[row] == b) == rows.tolist()
            assert sorted(times) == list(range(-(-given // len(rows))))
        counted = Counter(row for _, row in so_far)
        assert min(counted.values()) >= epoch and len(counted) == len(order)


@pytest.mark.parametrize(("counts", "batch"), CASES)
def test_any_step_comes_at_once_and_the_same(counts, batch):
    straight = steps(order_of(counts, batch), 60)
    jumping = order_of(counts, batch)
    for step in np.random.RandomState(0).permutation(60).tolist():
        assert [jumping.place(step * batch + i) for i in range(batch)] == straight[step]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (2, 1), (4, 1), (4, 2)])
def test_processes_and_accumulation_share_the_steps_of_one(world_size, accumulation):
    counts, batch = [5, 9, 30], 8
    alone = [batch for batch in itertools.islice(EndlessSampler(order_of(counts, batch), micro_batch=8), 20)]
    layout = {"micro_batch": batch // world_size // accumulation, "world_size": world_size}
    ranks = [
        list(itertools.chain(*itertools.islice(
            EndlessSampler(order_of(counts, batch), rank=rank, start=3, accumulation=accumulation, **layout),
            17 * accumulation,
        )))
        for rank in range(world_size)
    ]  # fmt: skip
    assert sorted(itertools.chain(*ranks)) == list(itertools.chain(*alone[3:]))


def test_the_mix_follows_the_sizes_and_is_shuffled():
    order = order_of([16, 80, 160], 8)
    bucket_of = {int(row): b for b, rows in enumerate(order.rows) for row in rows}
    epochs = [[bucket_of[step[0][1]] for step in steps(order, 96)][at : at + 32] for at in (0, 32, 64)]
    assert all(Counter(epoch) == {0: 2, 1: 10, 2: 20} for epoch in epochs)  # the sizes are whole batches
    assert len({tuple(epoch) for epoch in epochs}) == 3 and all(epoch != sorted(epoch) for epoch in epochs)
    other = order_of([16, 80, 160], 8, seed=1)
    assert steps(order, 5) != steps(other, 5)


def test_a_bucket_smaller_than_a_batch_comes_as_often_as_its_rows_should():
    order = order_of([2, 62], 8)
    bucket_of = {int(row): b for b, rows in enumerate(order.rows) for row in rows}
    batches = Counter(bucket_of[step[0][1]] for step in steps(order, order.steps(40)))
    assert batches == {0: 10, 1: 310}
    first = next(step for step in steps(order, 40) if bucket_of[step[0][1]] == 0)
    assert sorted(first) == sorted((time, int(row)) for time in range(4) for row in order.rows[0])  # cropped anew


def test_the_order_is_pinned_and_far_steps_come_at_once():
    """A run that was saved by another version must go on in the same order."""
    pinned = [[(0, 5), (0, 6)], [(0, 4), (1, 4)], [(0, 2), (0, 7)], [(0, 0), (1, 0)], [(0, 1), (0, 3)]]
    assert steps(order_of([3, 5], 2), 5) == pinned
    order = order_of([3, 50, 1000], 8)
    assert order.place(8 * 10**12 + 3) == order.place(8 * 10**12 + 3)
    times = {order.place(8 * 10**12 + i)[0] for i in range(800)}
    assert min(times) >= 8 * 10**12 // 1053 - 8 and max(times) <= 8 * 10**12 // 1053 + 8


# -- samples -----------------------------------------------------------------------------------------------------------

RESOLUTION, MULTIPLE = 32, 4


def colour_coded(width: int, height: int, number: int) -> Image.Image:
    """Red is the column, green the row of a pixel; blue is the number of the image."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.full_like(x, number)], axis=-1).astype(np.uint8))


def sizes_of(count: int) -> list[tuple[int, int]]:
    """Widths and heights that just cover a shape, by a few pixels more on one side: nothing is resampled."""
    shapes = shapes_of(RESOLUTION, MULTIPLE)
    found = []
    for (h, w), more in itertools.product(shapes.tolist(), range(4)):
        for size in ((h + more, w), (h, w + more)):
            if tuple(shapes[assign(np.array([size]), shapes, RESOLUTION)][0]) == (h, w):
                found.append(size[::-1])
    return [found[i] for i in np.random.RandomState(1).permutation(len(found))[:count]]


def dataset(sizes) -> Dataset:
    images = []
    for number, size in enumerate(sizes):
        colour_coded(*size, number).save(file := io.BytesIO(), "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    return Dataset.from_dict({"image": images, "text": [f"image {number}" for number in range(len(sizes))]})


def config(**data) -> TrainConfig:
    return TrainConfig(
        output_dir="unused",
        data={"resolution": RESOLUTION, "buckets": "auto", "bucket_step": MULTIPLE, "random_flip": True} | data,
        conditioning={"kind": "pooled_text", "text_encoder": "unused", "tokenizer": "unused"},
        sample={"prompts": ["unused"]},
    )


def batches(data: TrainData, cfg: TrainConfig, count: int, world_size: int, accumulation: int = 1) -> list:
    """Of each step, the micro-batches of all processes."""
    loaders = [
        iter(make_loader(data, cfg, start=0, rank=rank, world_size=world_size, accumulation=accumulation,
                         micro_batch=8 // world_size // accumulation, pin_memory=False))
        for rank in range(world_size)
    ]  # fmt: skip
    return [[next(loader) for _ in range(accumulation) for loader in loaders] for _ in range(count)]


def belongs(batch, i: int, sizes) -> bool:
    """Whether pixels, caption and sizes of a sample are those of its row, by the colours of its corners."""
    row, image = int(batch.rows[i]), ((batch.pixel_values[i] + 1) * 127.5).round().int()
    height, width, top, left, high, wide = batch.time_ids[i].int().tolist()
    (_, first, last), columns = image.shape, image[0, 0]
    mirrored = bool(columns[0] > columns[-1])
    seen_left = width - wide - int(columns.min()) if mirrored else int(columns.min())
    return (
        (image[2] == row).all()
        and batch.captions[i] == f"image {row}"
        and (height, width) == sizes[row][::-1]
        and (high, wide) == (first, last) == image.shape[1:]
        and (top, left) == (int(image[1].min()), seen_left)
        and bool((image[1] == torch.arange(top, top + high)[:, None]).all())
        and bool((columns.sort().values == torch.arange(columns.min(), columns.min() + wide)).all())
    )


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2)])
def test_every_sample_of_an_epoch_is_its_row_in_its_shape_with_its_sizes(world_size, accumulation):
    sizes, cfg = sizes_of(40), config()
    plain = open_data(cfg, dataset=dataset(sizes), progress=False)
    data = plain.in_buckets(MULTIPLE)
    assert data.sizes.tolist() == [[h, w] for w, h in sizes]
    count, seen, shapes, mirrored = data.steps(2, global_batch=8), Counter(), set(), 0
    for micro_batches in batches(data, cfg, count, world_size, accumulation):
        assert len({micro.pixel_values.shape[2:] for micro in micro_batches}) == 1
        shapes.add(tuple(micro_batches[0].pixel_values.shape[2:]))
        for micro in micro_batches:
            assert micro.time_ids.dtype == torch.float32
            assert all(belongs(micro, i, sizes) for i in range(len(micro)))
            seen.update(micro.rows.tolist())
            mirrored += sum(bool(pixels[0, 0, 0] > pixels[0, 0, -1]) for pixels in micro.pixel_values)
    assert len(seen) == 40 and min(seen.values()) >= 2 and len(shapes) == len(data.buckets.shapes) > 5
    assert 0.3 < mirrored / seen.total() < 0.7
    wrong = replace(micro, time_ids=micro.time_ids + torch.tensor([0, 0, 0, 0, 0, 1.0]))
    assert not belongs(wrong, 0, sizes) and not belongs(replace(micro, rows=micro.rows + 1), 0, sizes)
    square = collate([((0, 0, 0), plain.samples([0], [0])[0])])  # without buckets: the negative control
    assert square.pixel_values.shape[2:] == (RESOLUTION, RESOLUTION)


def test_crops_are_uniform_over_the_corners_of_the_resized_image():
    data = open_data(config(random_flip=False), dataset=dataset([(36, 28 + 2), (32, 32)]), progress=False)
    data = data.in_buckets(MULTIPLE)
    assert data.buckets.shape(0) == (28, 36) and covering((30, 36), (28, 36)) == (30, 36)
    tops = Counter(sample.time_ids[2] for sample in data.samples([0] * 600, range(600)))
    assert sorted(tops) == [0, 1, 2] and all(150 < count < 250 for count in tops.values())
    centred = open_data(config(center_crop=True), dataset=dataset([(36, 30), (32, 32)]), progress=False)
    assert {sample.time_ids[2] for sample in centred.in_buckets(MULTIPLE).samples([0] * 9, range(9))} == {1}


def test_large_images_are_reduced_to_just_cover_their_shape():
    sizes = [(150, 101), (100, 240), (201, 200)]
    data = open_data(config(random_flip=False), dataset=dataset(sizes), progress=False).in_buckets(MULTIPLE)
    for row, (width, height) in enumerate(sizes):
        (sample,), (high, wide) = data.samples([row], [3]), data.buckets.shape(row)
        image = sample.pixels.float()
        assert image.shape[1:] == (high, wide) and sample.time_ids[:2] == (height, width)
        resized = covering((height, width), (high, wide))
        top, left = sample.time_ids[2:4]
        y = (torch.arange(top, top + high) + 0.5) * height / resized[0] - 0.5
        x = (torch.arange(left, left + wide) + 0.5) * width / resized[1] - 0.5
        inner = slice(2, -2)  # the filter reaches over the edge
        assert (image[1, inner] - y[inner, None]).abs().max() < 1.01
        assert (image[0, :, inner] - x[inner]).abs().max() < 1.01
        wrong = (torch.arange(high) + 0.5) * height / high - 0.5  # squeezed, not cropped
        assert resized[0] == high or (image[1, inner] - wrong[inner, None]).abs().max() > 1.01


def test_without_buckets_nothing_is_different():
    cfg = config()
    off = replace(cfg, data=replace(cfg.data, buckets="none", bucket_step=None))
    data = open_data(off, dataset=dataset(sizes_of(10)), progress=False)
    assert data.in_buckets(MULTIPLE) is data and list(data.kept) == ["digests"]
    assert data.steps(3, global_batch=8) == 4 and "buckets" not in data.facts


def test_the_report(caplog):
    cfg = config()
    data = open_data(cfg, dataset=dataset([(36, 28)] * 9 + [(28, 36), (20, 20)]), progress=False).in_buckets(MULTIPLE)
    assert data.facts["buckets"] == {
        "step": 4,
        "images": {"36x28": 9, "32x32": 1, "28x36": 1},
        "cropped": {"mean": 0.0, "max": 0.0},
        "upscaled": 1,
    }
    assert buckets_line(data.facts, 8) == (
        "3 from 28x36 to 36x28 by 4, 0.0% cropped (0.0% at most), fewest images 1 (32x32); 2 with less than a batch, "
        "which then repeats some"
    )
    assert "less" not in buckets_line(data.facts, 1) and buckets_line({}, 8) == ""
    assert "-> about 32x32, 1 upscaled" in data_line(data.facts, cfg)


def test_sizes_are_kept_with_the_check(monkeypatch):
    images = dataset(sizes_of(12))
    first = open_data(config(), dataset=images, progress=False)
    monkeypatch.setattr(finetune.datacheck, "decode", None)  # nothing is decoded again
    again = open_data(config(), dataset=images, progress=False)
    assert again.sizes.dtype == np.int32 and again.sizes.tolist() == first.sizes.tolist()
    assert np.flatnonzero(again.sizes.prod(axis=1)).tolist() == again.rows.tolist()


def test_a_row_that_turned_unusable_is_replaced_by_one_of_its_shape(tmp_path):
    sizes = [(36, 28), (28, 36), (32, 32)] * 6
    (tmp_path / "data").mkdir()
    for number, size in enumerate(sizes):
        colour_coded(*size, number).save(tmp_path / "data" / f"{number:02}.png")
    place = {"train_data_dir": str(tmp_path / "data"), "on_error": "skip"}
    cfg = tiny.config(tmp_path, data=vars(config(**place).data), conditioning={"kind": "none"})
    data = open_data(cfg, progress=False).in_buckets(MULTIPLE)
    for number in (0, 4):
        (tmp_path / "data" / f"{number:02}.png").write_bytes(b"")
    used = {sample.row for sample in data.samples([0] * 40, range(40))}
    assert used == {3, 6, 9, 12, 15} and all(sample.replaced for sample in data.samples([4] * 9, range(9)))
    now = open_data(cfg, progress=False)
    kept_sizes = data.kept["sizes"]
    again = now.with_order_of({"digests": data.digests, "sizes": kept_sizes}).in_buckets(MULTIPLE)
    assert again.buckets.of_row.tolist() == data.buckets.of_row.tolist()
    assert [s.row for s in again.samples([0, 4], [1, 1])] == [s.row for s in data.samples([0, 4], [1, 1])]
    forgotten = now.with_order_of({"digests": data.digests}).in_buckets(MULTIPLE)  # the negative control
    assert forgotten.buckets.of_row.tolist() != data.buckets.of_row.tolist()

"""Which row comes when: each once per epoch, from any index at once, with few units in use at a time."""

import itertools
import random
from collections import OrderedDict

import numpy as np
import pytest

from finetune.batching import EndlessSampler
from finetune.order import RowOrder, UnitOrder, Units
from finetune.seeding import permutation


def units(counts, gap: int = 0) -> Units:
    """Units of these sizes, with `gap` unused rows before each."""
    counts = np.array(counts, np.int64)
    return Units(np.cumsum(counts + gap) - counts, counts)


def epoch(order, number: int = 0) -> list[int]:
    return [order.row_at(number, index) for index in range(len(order))]


def shapes() -> dict[str, tuple[list[int], int, int]]:
    """Name -> sizes of the units, rows in the buffer, global batch."""
    known = {
        "one unit": ([10], 4, 8),
        "one row": ([1], 5, 8),
        "units of one row": ([1] * 13, 4, 8),
        "unequal": ([3, 1, 17, 5, 5, 2], 6, 8),
        "buffer larger than the data": ([4, 4, 4, 9], 10_000, 8),
        "buffer of one row": ([4, 4, 4], 1, 8),
        "equal": ([8] * 12, 32, 8),
        "batch larger than the data": ([3, 4, 5, 6], 12, 1000),
        "batch of one row": ([3, 4, 5, 6], 12, 1),
    }
    for seed in range(40):
        draw = random.Random(seed)
        sizes = [draw.randint(1, 12) for _ in range(draw.randint(1, 30))]
        known[f"seed {seed}"] = sizes, draw.randint(1, 60), draw.randint(1, 40)
    return known


SHAPES = shapes()


@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_comes_once_per_epoch(shape):
    counts, buffer_size, global_batch = SHAPES[shape]
    rows = units(counts, gap=3)
    order = UnitOrder(rows, seed=1, buffer_size=buffer_size, global_batch=global_batch)
    for number in range(4):
        assert sorted(epoch(order, number)) == list(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_index_comes_at_once_and_the_same(shape):
    counts, buffer_size, global_batch = SHAPES[shape]
    settings = {"seed": 1, "buffer_size": buffer_size, "global_batch": global_batch}
    straight = [epoch(UnitOrder(units(counts), **settings), number) for number in range(2)]
    places = [(number, index) for number in range(2) for index in range(sum(counts))]
    random.Random(0).shuffle(places)
    jumping = UnitOrder(units(counts), **settings)
    assert all(jumping.row_at(number, index) == straight[number][index] for number, index in places)


def reads(rows: list[int], counts: list[int], buffer_size: int) -> int:
    """How often a unit is read by who holds those used last, of at most `buffer_size` rows together, or one."""
    of_row = np.repeat(np.arange(len(counts)), counts)
    held, number = OrderedDict(), 0
    for unit in of_row[rows].tolist():
        if unit not in held:
            number += 1
            while held and sum(held.values()) + counts[unit] > buffer_size:
                held.popitem(last=False)
        held[unit] = held.pop(unit, counts[unit])
    return number


@pytest.mark.parametrize("size", [5, 8, 20])
@pytest.mark.parametrize("global_batch", [1, 8, 50, 64, 256])
@pytest.mark.parametrize("buffer_size", [20, 100, 320, 10_000])
def test_a_unit_is_read_once_but_where_two_lanes_meet(size, global_batch, buffer_size):
    order = UnitOrder(units([size] * 60), seed=0, buffer_size=buffer_size, global_batch=global_batch)
    assert order.lanes == 1 or 2 * order.lanes * size <= buffer_size
    assert 60 <= reads(epoch(order), [size] * 60, buffer_size) <= 60 + 2 * (order.lanes - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_units_of_any_size_are_read_about_once(shape):
    counts, buffer_size, global_batch = SHAPES[shape]
    order = UnitOrder(units(counts), seed=1, buffer_size=buffer_size, global_batch=global_batch)
    assert len(counts) <= reads(epoch(order), counts, buffer_size) <= 1.3 * len(counts) + 2 * (order.lanes - 1)
    if len(counts) > 5 and buffer_size < sum(counts) / 2:  # the negative control: one permutation of all rows
        anywhere = RowOrder(np.arange(sum(counts)), seed=1)
        assert reads(epoch(anywhere), counts, buffer_size) > 1.3 * len(counts) or max(counts) == 1


def test_epochs_and_seeds_differ():
    rows = units([5] * 20)
    orders = [UnitOrder(rows, seed=seed, buffer_size=20, global_batch=4) for seed in (0, 1)]
    seen = [tuple(epoch(order, number)) for order in orders for number in range(5)]
    assert len(set(seen)) == 10


@pytest.mark.parametrize("global_batch", [4, 8, 24, 80])
def test_a_global_batch_mixes_all_lanes(global_batch):
    order = UnitOrder(units([100] * 50), seed=0, buffer_size=2000, global_batch=global_batch)
    assert order.lanes == 8
    batches = (np.array(epoch(order)) // 100)[: 5000 // global_batch * global_batch].reshape(-1, global_batch)
    assert all(len(set(batch)) >= min(8, global_batch) - 2 for batch in batches)  # two lanes may share a unit
    ascending = np.arange(5000) // 100  # as a reader without lanes gives them: the negative control
    assert max(len(set(batch)) for batch in ascending[: batches.size].reshape(batches.shape)) <= 2


@pytest.mark.parametrize("global_batch", [32, 48, 256])
def test_each_process_reads_its_own_lanes(global_batch):
    """Of 96 units four processes read little more than 96 together, not 4 * 96."""
    order = UnitOrder(units([100] * 96), seed=0, buffer_size=3200, global_batch=global_batch)
    rows, share = np.array(epoch(order)), global_batch // 4
    ranks = np.arange(len(rows)) % global_batch // share
    number = sum(reads(rows[ranks == rank], [100] * 96, 3200) for rank in range(4))
    assert order.lanes == 16 and 96 <= number <= 1.5 * 96


def test_the_order_is_pinned():
    """A run that was saved by another version must go on in the same order."""
    assert epoch(RowOrder(np.array([3, 5, 8, 13, 21]), seed=0), 1) == [13, 5, 21, 8, 3]
    order = UnitOrder(units([3, 2, 4]), seed=0, buffer_size=16, global_batch=4)
    assert order.lanes == order.run == 2 and epoch(order, 1) == [3, 4, 6, 1, 7, 5, 2, 0, 8]
    rows = np.arange(100)
    assert epoch(RowOrder(rows, seed=7), 2) == rows[permutation(7, "order", 2, 100)].tolist()


def test_much_data_costs_little():
    order = UnitOrder(units([100] * 1_000_000), seed=0, buffer_size=5000, global_batch=256)
    first = order.row_at(123, 99_999_999)
    assert first == order.row_at(123, 99_999_999) and 0 <= first < 100_000_000


@pytest.mark.parametrize("world_size, micro_batch", [(1, 12), (2, 6), (4, 3)])
def test_processes_share_the_steps_of_one(world_size, micro_batch):
    order = UnitOrder(units([7, 5, 9, 1, 6]), seed=0, buffer_size=20, global_batch=12)
    alone = list(itertools.islice(EndlessSampler(order, micro_batch=12), 9))
    layout = {"micro_batch": micro_batch, "world_size": world_size}
    ranks = [itertools.islice(EndlessSampler(order, rank=rank, start=2, **layout), 7) for rank in range(world_size)]
    for step, parts in enumerate(zip(*ranks, strict=True), 2):
        assert sorted(itertools.chain(*parts)) == alone[step]


def test_units_are_as_the_array_of_their_rows():
    rows = units([3, 1, 4], gap=10)
    array = np.array(list(rows))
    assert array.tolist() == [10, 11, 12, 23, 34, 35, 36, 37] and len(rows) == 8
    for index in (0, 7, slice(None, 3), slice(2, 100), np.array([5, 0, 5])):
        assert np.array_equal(rows[index], array[index])
    for index in (8, -1, np.array([0, 8])):
        with pytest.raises(IndexError):
            rows[index]


@pytest.mark.parametrize("wanted", [1, 3, 4, 11, 20])
def test_a_part_of_the_rows_is_whole_units_but_for_the_last(wanted):
    rows = units([4] * 5)
    drawn = rows.drawn(wanted, seed=3)
    assert len(drawn) == wanted and set(drawn) <= set(rows) and sorted(drawn) == list(drawn)
    assert sorted(drawn.counts)[1:] == [4] * (len(drawn.counts) - 1)
    assert set(drawn) <= set(rows.drawn(min(20, wanted + 1), seed=3))
    assert len({tuple(rows.drawn(4, seed=seed)) for seed in range(20)}) > 2

"""Which row comes when: each once per epoch, from any index at once, with few units in use at a time."""

import itertools
import random

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


def shapes() -> dict[str, tuple[list[int], int]]:
    """Name -> sizes of the units, rows in the buffer."""
    known = {
        "one unit": ([10], 4),
        "one row": ([1], 5),
        "units of one row": ([1] * 13, 4),
        "unequal": ([3, 1, 17, 5, 5, 2], 6),
        "buffer larger than the data": ([4, 4, 4, 9], 10_000),
        "buffer of one row": ([4, 4, 4], 1),
        "equal": ([8] * 12, 32),
    }
    for seed in range(40):
        draw = random.Random(seed)
        sizes = [draw.randint(1, 12) for _ in range(draw.randint(1, 30))]
        known[f"seed {seed}"] = sizes, draw.randint(1, 60)
    return known


SHAPES = shapes()


@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_comes_once_per_epoch(shape):
    counts, buffer_size = SHAPES[shape]
    rows = units(counts, gap=3)
    order = UnitOrder(rows, seed=1, buffer_size=buffer_size)
    for number in range(4):
        assert sorted(epoch(order, number)) == list(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_index_comes_at_once_and_the_same(shape):
    counts, buffer_size = SHAPES[shape]
    settings = {"seed": 1, "buffer_size": buffer_size}
    straight = [epoch(UnitOrder(units(counts), **settings), number) for number in range(2)]
    places = [(number, index) for number in range(2) for index in range(sum(counts))]
    random.Random(0).shuffle(places)
    jumping = UnitOrder(units(counts), **settings)
    assert all(jumping.row_at(number, index) == straight[number][index] for number, index in places)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_unit_is_read_twice_but_where_two_lanes_meet(shape):
    """The promise of the memory: who holds the units read last, within the buffer, misses each about once."""
    counts, buffer_size = SHAPES[shape]
    rows = units(counts)
    order = UnitOrder(rows, seed=1, buffer_size=buffer_size)
    assert order.lanes == 1 or order.lanes * max(counts) <= buffer_size
    of_row = np.repeat(np.arange(len(counts)), counts)
    held, reads = [], 0
    for row in epoch(order):
        unit = int(of_row[row])
        reads += unit not in held
        held = [other for other in held if other != unit][-(order.lanes - 1) :] * (order.lanes > 1) + [unit]
    assert len(counts) <= reads <= len(counts) + 2 * (order.lanes - 1)


def test_epochs_and_seeds_differ():
    rows = units([5] * 20)
    seen = [tuple(epoch(UnitOrder(rows, seed=seed, buffer_size=20), number)) for seed in (0, 1) for number in range(5)]
    assert len(set(seen)) == 10


def test_neighbours_come_from_different_units():
    order = UnitOrder(units([100] * 50), seed=0, buffer_size=1000)
    assert order.lanes == 10
    rows = np.array(epoch(order)) // 100
    assert all(len(set(window)) >= 9 for window in rows.reshape(-1, 10))  # a unit may be shared by two lanes
    ascending = np.arange(5000) // 100  # as a reader without lanes gives them: the negative control
    assert all(len(set(window)) == 1 for window in ascending.reshape(-1, 10))


def test_the_order_is_pinned():
    """A run that was saved by another version must go on in the same order."""
    assert epoch(RowOrder(np.array([3, 5, 8, 13, 21]), seed=0), 1) == [13, 5, 21, 8, 3]
    assert epoch(UnitOrder(units([3, 2, 4]), seed=0, buffer_size=8), 1) == [3, 6, 4, 1, 7, 2, 5, 0, 8]
    rows = np.arange(100)
    assert epoch(RowOrder(rows, seed=7), 2) == rows[permutation(7, "order", 2, 100)].tolist()


def test_much_data_costs_little():
    order = UnitOrder(units([100] * 1_000_000), seed=0, buffer_size=5000)
    first = order.row_at(123, 99_999_999)
    assert first == order.row_at(123, 99_999_999) and 0 <= first < 100_000_000


@pytest.mark.parametrize("world_size, micro_batch", [(1, 12), (2, 6), (4, 3)])
def test_processes_share_the_steps_of_one(world_size, micro_batch):
    order = UnitOrder(units([7, 5, 9, 1, 6]), seed=0, buffer_size=20)
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

"""What changed between two starts is told row by row, and nothing that changed goes untold."""

import itertools

import numpy as np
import pytest

from finetune.data_changes import changes, fingerprint

A, B, C, D, N, M = 11, -22, 33, 44, 55, -(2**63)


def rows(then, now) -> dict[str, list[int]]:
    found = changes(np.array(then, np.int64), np.array(now, np.int64))
    return {kind: numbers.tolist() for kind, numbers in vars(found).items() if len(numbers)}


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ([A, B, C], [A, B, C], {}),
        ([], [], {}),
        ([A, B, C], [A, N, C], {"changed": [1]}),
        ([A, B, C], [A, 0, C], {"unusable": [1]}),
        ([A, A, A], [A, 0, A], {"unusable": [1]}),
        ([A, A, B], [0, A, B], {"unusable": [0]}),
        ([A, 0, C], [A, M, C], {"new": [1]}),
        ([A, B], [A, B, N], {"new": [2]}),
        ([A, B], [A, B, B], {"new": [2]}),
        ([A, B], [A, B, 0], {}),  # a bad file beside the data changes nothing that is trained on
        ([A, B, C], [A, B], {"gone": [2]}),
        ([A, B, B], [A, B], {"gone": [2]}),
        ([A, B, C], [B, C], {"gone": [0], "moved": [0, 1]}),
        ([A, B], [B, A], {"moved": [0, 1]}),
        ([A, B, C, D], [N, C, B, 0], {"changed": [0], "moved": [1, 2], "unusable": [3]}),
    ],
)
def test_each_kind_of_change(then, now, expected):
    assert rows(then, now) == expected
    found = changes(np.array(then, np.int64), np.array(now, np.int64))
    assert bool(found) == bool(expected) and found.only_unusable == (set(expected) <= {"unusable"})


def test_every_difference_is_told():
    """All pairs of up to three rows of three contents: nothing is found if and only if the used rows are the same."""
    contents = [list(c) for length in range(4) for c in itertools.product([0, A, B], repeat=length)]
    for then, now in itertools.product(contents, contents):
        padded = [(row + [0] * 3)[:3] for row in (then, now)]
        assert bool(rows(then, now)) == (padded[0] != padded[1]), (then, now)


def test_the_text_names_the_first_rows():
    then, now = np.arange(1, 31), np.arange(1, 31)
    now[7], now[9], now[12:24] = 77, 0, np.arange(100, 112)
    text = changes(then, np.append(now, 99)).text(lambda row: f"{row}.png")
    assert text.startswith("13 rows changed: 7.png, 12.png, 13.png") and "20.png and 3 more; 1 row gone: row 9" in text
    assert text.endswith("1 row new: 30.png")
    assert changes(then, then).text() == "no row is different"


def test_a_million_rows_take_less_than_seconds_and_chance_finds_nothing():
    then = np.random.RandomState(0).randint(-(2**63), 2**63 - 1, 10**6)
    now = np.insert(then, 500_000, 5)
    found = changes(then, now)
    assert found.new.tolist() == [500_000] and len(found.moved) == 500_000 and not len(found.changed)


def test_the_fingerprint_is_of_the_used_rows_in_their_order():
    one = np.array([A, 0, B], np.int64)
    assert fingerprint(one) == fingerprint(np.array([A, B, 0], np.int64)) and len(fingerprint(one)) == 32
    assert len({fingerprint(np.array(other, np.int64)) for other in ([A, B], [B, A], [A], [A, B, B], [])}) == 5

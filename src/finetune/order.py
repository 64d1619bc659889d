"""Which row comes when: a function of (seed, epoch, index), so that any process computes it and any step can be first.

Rows in memory or in files of their own come in one permutation of all (`RowOrder`). Rows in shards can only be read a
unit (a row group) at a time, and one permutation of all would read a unit for every row. They come as from several
readers that take turns (`UnitOrder`):

    1. the units are permuted, and the rows within each unit: one sequence of n rows
    2. the sequence is cut into equal parts, one per lane
    3. the lanes take turns; a global batch takes the same number of rows of each, one after another

So every row comes once per epoch, a global batch mixes all lanes, and only as many units as lanes are in use at a time.
As each process takes its own part of every global batch, it reads the units of its own lanes and not those of others.
Nothing is drawn on the way: there is no shuffle buffer that a checkpoint would have to hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, overload

import numpy as np

from finetune.seeding import permutation


class Order(Protocol):
    """The rows of the run, in order."""

    def __len__(self) -> int:
        """The number of rows of an epoch."""
        ...

    def place(self, position: int) -> tuple[int, int]:
        """For which time, from 0, which row comes at a position of the run: (epoch, number of the row)."""
        ...


@dataclass(frozen=True)
class Units:
    """The numbers of the rows that are used, ascending, as runs of consecutive ones: O(units) memory, not O(rows)."""

    starts: np.ndarray
    """[u] int64: the first row of each unit, ascending."""
    counts: np.ndarray
    """[u] int64: the number of its rows, from 1."""

    @cached_property
    def ends(self) -> np.ndarray:
        """[u] int64: the number of rows up to the end of each unit."""
        return np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray: ...
    def __getitem__(self, index):
        """As of an array: one row, a slice, or an array of indices."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        if np.any((np.asarray(index) < 0) | (np.asarray(index) >= len(self))):
            raise IndexError(f"{index} of {len(self)} rows")  # ends an iteration, too
        unit = np.searchsorted(self.ends, index, side="right")
        rows = self.starts[unit] + index - (self.ends[unit] - self.counts[unit])
        return rows if isinstance(index, np.ndarray) else int(rows)

    def drawn(self, wanted: int, seed: int) -> Units:
        """`wanted` of the rows: whole units drawn by the seed, of the last one as many rows as are missing."""
        assert 0 < wanted <= len(self)
        order = permutation(seed, "max_train_samples", 0, len(self.counts))
        before = np.cumsum(self.counts[order]) - self.counts[order]
        chosen = order[before < wanted]
        counts = self.counts.copy()
        counts[chosen[-1]] = wanted - before[len(chosen) - 1]
        chosen.sort()
        return Units(self.starts[chosen], counts[chosen])


class EpochOrder:
    """Epochs of all rows that follow one another."""

    def __len__(self) -> int:
        """The number of rows of an epoch."""
        raise NotImplementedError

    def row_at(self, epoch: int, index: int) -> int:
        """The number of the row that comes at `index`, 0 to n - 1, of an epoch."""
        raise NotImplementedError

    def place(self, position: int) -> tuple[int, int]:
        """See `Order`."""
        epoch, index = divmod(position, len(self))
        return epoch, self.row_at(epoch, index)


class RowOrder(EpochOrder):
    """A permutation of all rows in each epoch."""

    def __init__(self, rows: np.ndarray, *, seed: int) -> None:
        """rows: [n] the numbers of the rows."""
        self.rows = rows
        self._epoch = lru_cache(1)(lambda epoch: rows[permutation(seed, "order", epoch, len(rows))])

    def __len__(self) -> int:
        return len(self.rows)

    def row_at(self, epoch: int, index: int) -> int:
        """See `EpochOrder`."""
        return int(self._epoch(epoch)[index])


class InTurns:
    """Two orders in turns, one row of each: an epoch is that of the first, and the second goes on from one to the next.

    Of prior preservation, so that half of any number of consecutive rows are class images, however many there are.
    """

    def __init__(self, first: EpochOrder, second: EpochOrder) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return 2 * len(self.first)

    def place(self, position: int) -> tuple[int, int]:
        """See `Order`; each row in the epoch of its own order, so that none is cropped alike twice."""
        turn, of_second = divmod(position, 2)
        return (self.second if of_second else self.first).place(turn)


class UnitOrder(EpochOrder):
    """Lanes over permuted units, as described at the top."""

    def __init__(self, units: Units, *, seed: int, buffer_size: int, global_batch: int) -> None:
        """buffer_size: rows that a process holds, in the units that it used last. global_batch: of all processes.

        Each lane may need two units within one turn, the last rows of one and the first of the next: so the lanes are
        at most half of what can be held. Their number is a power of two, as that of processes mostly is.
        """
        self.units, self.seed = units, seed
        largest = int(units.counts.max())
        most = min(len(units.counts), max(1, buffer_size // (2 * largest)))
        self.lanes = 1 << (most.bit_length() - 1)
        self.run = max(1, min(largest, global_batch // self.lanes))
        self._epoch = lru_cache(1)(self._permuted_units)
        self._within = lru_cache(self.lanes)(self._permuted_rows)

    def __len__(self) -> int:
        return len(self.units)

    def row_at(self, epoch: int, index: int) -> int:
        """See `EpochOrder`."""
        lane, turn = self._turn(index)
        rounds, rest = divmod(len(self), self.lanes)
        place = lane * rounds + min(lane, rest) + turn  # in the sequence; the first `rest` lanes have one row more
        order, ends = self._epoch(epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        unit, end = int(order[at]), int(ends[at])
        within = self._within(epoch, unit)
        return int(self.units.starts[unit] + within[place - end])  # counted from the end: place - end is negative

    def _turn(self, index: int) -> tuple[int, int]:
        """Lane of an index, and how many rows of this lane come before: turns of `run` rows, and of 1 at the end."""
        block = self.lanes * self.run
        blocks = len(self) // self.lanes // self.run
        if index < blocks * block:
            done, within = divmod(index, block)
            return within // self.run, done * self.run + within % self.run
        more, lane = divmod(index - blocks * block, self.lanes)
        return lane, blocks * self.run + more

    def _permuted_units(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(self.seed, "order of units", epoch, len(self.units.counts))
        return order, np.cumsum(self.units.counts[order])

    def _permuted_rows(self, epoch: int, unit: int) -> np.ndarray:
        return permutation(self.seed, f"order within unit {unit}", epoch, int(self.units.counts[unit]))

"""Which row comes when: a function of (seed, epoch, index), so that any process computes it and any step can be first.

Rows in memory or in files of their own come in one permutation of all (`RowOrder`). Rows in shards can only be read a
unit (a row group) at a time, and one permutation of all would read a unit for every row. They come as from several
readers that take turns (`UnitOrder`):

    1. the units are permuted, and the rows within each unit: one sequence of n rows
    2. the sequence is cut into equal parts, one per lane
    3. index i takes the next row of lane i modulo the number of lanes

So every row comes once per epoch, neighbours in a batch come from different units, and never more units than lanes are
in use at a time. Nothing is drawn on the way: there is no shuffle buffer that a checkpoint would have to hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, overload

import numpy as np

from finetune.seeding import permutation


class Order(Protocol):
    """The rows of each epoch, in order."""

    def __len__(self) -> int:
        """The number of rows of an epoch."""
        ...

    def row_at(self, epoch: int, index: int) -> int:
        """The number of the row that comes at `index`, 0 to n - 1, of an epoch."""
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


class RowOrder:
    """A permutation of all rows in each epoch."""

    def __init__(self, rows: np.ndarray, *, seed: int) -> None:
        """rows: [n] the numbers of the rows."""
        self.rows = rows
        self._epoch = lru_cache(1)(lambda epoch: rows[permutation(seed, "order", epoch, len(rows))])

    def __len__(self) -> int:
        return len(self.rows)

    def row_at(self, epoch: int, index: int) -> int:
        """See `Order`."""
        return int(self._epoch(epoch)[index])


class UnitOrder:
    """Lanes over permuted units, as described at the top."""

    def __init__(self, units: Units, *, seed: int, buffer_size: int) -> None:
        """buffer_size: rows that the units in use may have together; a unit that is larger is used alone."""
        self.units, self.seed = units, seed
        self.lanes = min(len(units.counts), max(1, buffer_size // int(units.counts.max())))
        self._epoch = lru_cache(1)(self._permuted_units)
        self._within = lru_cache(self.lanes)(self._permuted_rows)

    def __len__(self) -> int:
        return len(self.units)

    def row_at(self, epoch: int, index: int) -> int:
        """See `Order`."""
        rounds, rest = divmod(len(self), self.lanes)
        turn, lane = divmod(index, self.lanes)
        place = lane * rounds + min(lane, rest) + turn  # in the sequence; the first `rest` lanes have one row more
        order, ends = self._epoch(epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        unit, last = int(order[at]), int(ends[at])
        within = self._within(epoch, unit)
        return int(self.units.starts[unit] + within[place - last])  # from the end: place - last is negative

    def _permuted_units(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(self.seed, "order of units", epoch, len(self.units.counts))
        return order, np.cumsum(self.units.counts[order])

    def _permuted_rows(self, epoch: int, unit: int) -> np.ndarray:
        return permutation(self.seed, f"order within unit {unit}", epoch, int(self.units.counts[unit]))

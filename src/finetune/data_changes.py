"""Which rows of the data are other ones than at an earlier start, told from one number per row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MOST_NAMED = 10


def fingerprint(digests: np.ndarray) -> str:
    """Identifies the content of the rows used, in their order; digests: [rows found] int64, 0 for a row not used."""
    return hashlib.blake2b(digests[digests != 0].astype("<i8").tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Numbers of the rows, [n] int64 each. Every difference between two starts lies in at least one of them."""

    changed: np.ndarray
    """The row holds something that was not there before, in place of something that is not there any more."""
    gone: np.ndarray
    """What the row held then is nowhere now, nor is anything new in its place; numbers of then."""
    new: np.ndarray
    """What the row holds was not used before, and was added."""
    moved: np.ndarray
    """What the row holds was in another row before."""
    unusable: np.ndarray
    """The row was used and is not any more, in data with as many rows as before: it can only be left out now."""

    def __bool__(self) -> bool:
        """Whether anything is different."""
        return bool(self._others() or len(self.unusable))

    @property
    def only_unusable(self) -> bool:
        """Whether no row is different but for some that cannot be used any more (or none at all)."""
        return not self._others()

    def _others(self) -> bool:
        return any(map(len, (self.changed, self.gone, self.new, self.moved)))

    def text(self, name: Callable[[int], str] = "row {}".format) -> str:
        """Such as "2 rows changed: row 7 (cat.png), row 9 (dog.png); 1 new row: row 12"; name: of a row of now."""
        parts = []
        for rows, what, of_now in (
            (self.changed, "changed", True),
            (self.unusable, "cannot be used any more", True),
            (self.gone, "gone", False),
            (self.new, "new", True),
            (self.moved, "at another place", True),
        ):
            if len(rows):
                named = [name(int(row)) if of_now else f"row {row}" for row in rows[:MOST_NAMED]]
                more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
                parts.append(f"{len(rows)} row{'s' * (len(rows) > 1)} {what}: {', '.join(named)}{more}")
        return "; ".join(parts) or "no row is different"


def changes(then: np.ndarray, now: np.ndarray) -> Changes:
    """Compare the digests of two starts, [rows found then] and [rows found now] int64, 0 for a row not used.

    A row that was inserted or taken away moves those behind it: they are told as moved, not as changed.
    """
    shared = min(len(then), len(now))
    then, now = then.copy(), now.copy()
    same = then[:shared] == now[:shared]
    then[:shared][same] = now[:shared][same] = 0  # what is left lies in rows that differ
    marks_then, marks_now = _one_mark_each(then), _one_mark_each(now)
    lost, found = (then != 0) & ~np.isin(marks_then, marks_now), (now != 0) & ~np.isin(marks_now, marks_then)
    moved = (now != 0) & ~found
    changed = np.flatnonzero(lost[:shared] & found[:shared])
    lost[changed] = found[changed] = False
    unusable = lost & (now == 0) if len(then) == len(now) else np.zeros_like(lost)
    numbers = (changed, *map(np.flatnonzero, (lost & ~unusable, found, moved, unusable)))
    return Changes(**dict(zip(("changed", "gone", "new", "moved", "unusable"), numbers, strict=True)))


def _one_mark_each(digests: np.ndarray) -> np.ndarray:
    """The digests with the second, third, ... occurrence of each made a number of its own, so that copies count."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    begins = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
    occurrence = np.arange(len(ordered)) - np.repeat(begins, np.diff(np.r_[begins, len(ordered)]))
    marks = np.empty_like(ordered)
    marks[order] = ordered + occurrence * np.int64(0x9E3779B97F4A7C1)  # wraps around, as a hash may
    return np.where(digests == 0, 0, marks)

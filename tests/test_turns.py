"""How benchmarks/turns.py reads speeds from the clock of a process that was stopped now and then."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from turns import Contender

TURNS = [(0, 5), (12, 15), (30, 33), (41, 47)]  # the warm-up, two rounds, the rest of a step


class Known(Contender):
    """A contender whose turns and steps are given: `per_second` steps in every second that it runs."""

    def __init__(self, per_second: float) -> None:
        self.images = 4
        self._walls = [float(wall) for turn in TURNS for wall in turn]
        self._runs = [0.0, *np.cumsum([end - start for start, end in TURNS]).repeat(2)[:-1].tolist()]
        self._cpu = [10.0, 12.0, 14.0, 16.0]
        self._logged = np.interp(np.arange(2, 17, 1 / per_second), self._runs, self._walls).tolist()

    def steps(self):
        return self._logged


@pytest.mark.parametrize("per_second", [2.0, 0.7])  # 0.7: all turns cut a step
def test_time_counts_only_while_it_runs(per_second):
    (wall, cpu), (again, _) = Known(per_second).speeds(2)
    assert (wall, again) == pytest.approx((4 * per_second, 4 * per_second))
    assert cpu == pytest.approx(4 * per_second * 3 / 2)  # two seconds of processor time in a turn of three
    whole = Known(per_second)
    whole._runs = whole._walls  # as if it had never been stopped
    assert whole.speeds(2)[0][0] != pytest.approx(4 * per_second)

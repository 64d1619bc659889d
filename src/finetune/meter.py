"""What is measured between two lines of metrics.jsonl, on the device and without a host sync per step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.objective import LossTerms, Objective

Item = TypeVar("Item")


class Meter:
    """Means of the loss and its parts over the steps that were taken, throughput, and the time spent on waiting."""

    def __init__(self, accelerator: Accelerator, objective: Objective) -> None:
        self._accelerator, self._objective = accelerator, objective
        self._step: list[dict[str, Tensor]] = []
        self._held: list[dict[str, Tensor]] | None = None
        self._grad_norm = math.nan
        self._began: float | None = None
        self._restart()

    @torch.no_grad()
    def add(self, terms: LossTerms) -> None:
        """The terms of one micro-batch of the step that is under way."""
        quarter = (self._objective.process.fraction(terms.level) * 4).long().clamp(max=3)
        sums = {"loss": (terms.per_sample * terms.weight).sum(), "count": terms.weight.new_full((), len(terms.weight))}
        sums |= {name: (value * terms.weight).sum() for name, value in terms.terms.items()}
        for q in range(4):
            weight = terms.weight * (quarter == q)
            sums[f"loss_q{q}"] = (terms.per_sample * weight).sum()
            sums[f"count_q{q}"] = weight.sum()
        self._step.append(sums)

    def commit(self, grad_norm: float) -> None:
        """The step that is held, else the one under way, was taken: it counts."""
        for sums in self._ended():
            for name, value in sums.items():
                self._interval[name] = self._interval.get(name, 0) + value
        self._grad_norm = grad_norm

    def discard(self) -> None:
        """The step that is held, else the one under way, was not taken: it does not count."""
        self._ended()

    def _ended(self) -> list[dict[str, Tensor]]:
        if self._held is None:
            self.hold()
        held, self._held = self._held, None
        return held

    def hold(self) -> None:
        """The step under way is over; whether it counts will be said in the next one."""
        self._held, self._step = self._step, []
        if self._began is not None:
            self._spent += time.perf_counter() - self._began
        self._began = None

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time spent on waiting for them is measured."""
        while True:
            start = time.perf_counter()
            self._began = self._began or start  # a step begins with its first batch
            item = next(items, None)
            self._waited += time.perf_counter() - start
            if item is None:
                return
            yield item

    def read(self) -> dict[str, float | None]:
        """Means over all processes since the last call: loss, each term, loss_q0..3 (by quarter of the noise levels,
        least noise first; None where no sample fell), grad_norm, images_per_second, data_wait (share of the time).

        The time is that of steps: drawing and saving between them do not count.
        """
        names = list(self._interval)
        sums = torch.stack([self._interval[name].float() for name in names])
        total = dict(zip(names, self._accelerator.reduce(sums, "sum").tolist(), strict=True))
        means = {name: total[name] / total["count"] for name in names if not name.startswith(("count", "loss_q"))}
        for q in range(4):
            means[f"loss_q{q}"] = total[f"loss_q{q}"] / total[f"count_q{q}"] if total[f"count_q{q}"] else None
        speed = {"images_per_second": total["count"] / self._spent, "data_wait": self._waited / self._spent}
        self._restart()
        return means | {"grad_norm": self._grad_norm} | speed

    def _restart(self) -> None:
        self._interval: dict[str, Tensor] = {}
        self._spent = self._waited = 0.0

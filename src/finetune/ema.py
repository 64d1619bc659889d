"""Exponential moving averages of the trained weights.

Own code instead of diffusers' EMAModel: that one reads the model's class back from its config, copies the weights to
the host to sample with them, keeps bfloat16 averages that hardly move, and takes twice the time of `_foreach_lerp_`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.config import Ema as EmaConfig


class Ema:
    """Averages of named parameters, one for each decay in `cfg.ema_max_decay`, float32 on the parameters' device."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], cfg: EmaConfig) -> None:
        """Each average starts as a copy of the parameters."""
        self._parameters = dict(parameters)
        self._cfg = cfg
        self.updates = 0
        self.averages: dict[float, dict[str, Tensor]] = {
            decay: {name: p.detach().float().clone() for name, p in self._parameters.items()}
            for decay in cfg.ema_max_decay
        }

    def decay(self, max_decay: float) -> float:
        """The decay of the next update: the warm-up's value, at most `max_decay`."""
        n = self.updates + 1
        if self._cfg.ema_warmup == "power":
            return min(max_decay, 1 - (1 + (n - 1) / self._cfg.ema_inv_gamma) ** -self._cfg.ema_power)
        if self._cfg.ema_warmup == "ratio":
            return min(max_decay, (1 + n) / (10 + n))
        return max_decay

    @torch.no_grad()
    def step(self) -> None:
        """Move each average towards the parameters. Call after an optimizer step that really changed them."""
        parameters = [p.detach().float() for p in self._parameters.values()]
        for max_decay, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), parameters, 1 - self.decay(max_decay))
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model holds the first average; pointers are swapped, nothing is copied."""
        average = next(iter(self.averages.values()))
        self._swap(average)
        try:
            yield
        finally:
            self._swap(average)

    def _swap(self, average: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, average[name] = average[name], parameter.data

    @torch.no_grad()
    def load(self, updates: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
        """Take over saved averages (CPU tensors) and their number of updates."""
        self.updates = updates
        for max_decay, saved in averages.items():
            for name, tensor in self.averages[max_decay].items():
                tensor.copy_(saved[name])

"""Guidance: the output of a network is moved away from that of a weaker one, as pure functions of both outputs.

The weaker one is the same network without the condition (Ho & Salimans 2022), or a worse network with it (Karras et al.
2024, "Guiding a diffusion model with a bad version of itself"). What it means is the same for every prediction_type,
because x0 = c_skip x_t + c_out F has the same coefficients for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]
"""network(x_t [B, C, H, W], time) -> output, float32."""

Guided = Callable[[Tensor, Tensor, float], Tensor]
"""As Network, with the noise-to-signal ratio sigma / alpha of x_t: infinite for pure noise."""


def extrapolated(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """weak + scale (strong - weak): 0 is weak, 1 is strong, more lies beyond it."""
    return weak + scale * (strong - weak)


def rescaled(guided: Tensor, strong: Tensor, phi: float) -> Tensor:
    """guided [B, ...] with the share phi of its standard deviation, per sample, set to that of `strong`.

    Lin et al. 2023, equations 14 to 16; applied to the network's output, whatever it predicts, as in diffusers.
    """
    axes = tuple(range(1, guided.ndim))
    factor = strong.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (phi * factor + (1 - phi))


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, and where."""

    scale: float
    channels: int
    """Channels of x0: what the output has beyond them is a learned variance, which is not guided."""
    rescale: float = 0.0
    interval: tuple[float, ...] | None = None
    """(low, high]: the noise-to-signal ratios at which to guide; None: all (Kynkäänniemi et al. 2024)."""

    def acts_at(self, ratio: float) -> bool:
        """Whether there is guidance at this noise-to-signal ratio."""
        return self.interval is None or self.interval[0] < ratio <= self.interval[1]

    def __call__(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Both outputs [B, C or 2C, H, W] -> the guided one; a variance half is that of `strong`."""
        mean, variance = strong[:, : self.channels], strong[:, self.channels :]
        guided = extrapolated(weak[:, : self.channels], mean, self.scale)
        if self.rescale:
            guided = rescaled(guided, mean, self.rescale)
        return torch.cat([guided, variance], dim=1)


def guided(network: Network, pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], guidance: Guidance) -> Guided:
    """pair(x, time) -> (weak, strong), guided; where guidance does not act, `network` alone is evaluated."""

    def evaluate(x: Tensor, time: Tensor, ratio: float) -> Tensor:
        return guidance(*pair(x, time)) if guidance.acts_at(ratio) else network(x, time)

    return evaluate


def doubled(both: Network) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The pair (without, with the condition) of a network under both, in one batch of twice the size."""

    def pair(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        without, with_ = both(torch.cat([x, x]), time).chunk(2)
        return without, with_

    return pair


def two(weak: Network, strong: Network) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The pair of two networks."""
    return lambda x, time: (weak(x, time), strong(x, time))


def unguided(network: Network) -> Guided:
    """`network` alone, everywhere."""
    return lambda x, time, ratio: network(x, time)

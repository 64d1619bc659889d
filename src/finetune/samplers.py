"""Solvers of the probability flow of EDM and of rectified flow, over a `denoise(x, sigma) -> x0`.

Both processes have dx/dsigma = (x - x0) / sigma, so they share the solvers. Of rectified flow
x = (1 - sigma) x0 + sigma noise, hence x - x0 = sigma (noise - x0), its velocity times sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""denoise(x [B, ...], sigma, float64 scalar on the CPU) -> the clean sample [B, ...]."""


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Noise added before each step; of the variance-exploding process only (Karras et al. 2022, algorithm 2)."""

    noise: Callable[[], Tensor]
    """Standard normal noise of the shape of x; called at the steps that add noise."""
    s_churn: float
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __call__(self, x: Tensor, sigma: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """x at sigma -> x at the higher sigma, and that sigma."""
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0
        if gamma == 0:
            return x, sigma
        higher = sigma * (1 + gamma)
        return x + float((higher**2 - sigma**2).sqrt()) * self.s_noise * self.noise(), higher


def karras_sigmas(steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """[steps + 1] float64, from sigma_max to sigma_min and then 0 (Karras et al. 2022, equation 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, ramp.new_zeros(1)])


def flow_sigmas(steps: int, *, shift: float = 1.0) -> Tensor:
    """[steps + 1] float64, evenly from 1 to 0, then moved towards noise once (Esser et al. 2024, equation 23)."""
    level = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * level / (1 + (shift - 1) * level)


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, *, churn: Churn | None = None) -> Tensor:
    """x [B, ...] at sigmas[0] -> x at sigmas[-1], first order; sigmas: [steps + 1] float64, falling."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x, sigma = churn(x, sigma, len(sigmas) - 1) if churn else (x, sigma)
        slope = (x - denoise(x, sigma)) / float(sigma)
        x = x + slope * float(following - sigma)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, *, churn: Churn | None = None) -> Tensor:
    """As `euler`, second order, with two evaluations per step but one for the step to sigma 0 (algorithms 1 and 2)."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x, sigma = churn(x, sigma, len(sigmas) - 1) if churn else (x, sigma)
        slope = (x - denoise(x, sigma)) / float(sigma)
        ahead = x + slope * float(following - sigma)
        if following > 0:
            slope = (slope + (ahead - denoise(ahead, following)) / float(following)) / 2
            ahead = x + slope * float(following - sigma)
        x = ahead
    return x


SOLVERS = {"euler": euler, "heun": heun}

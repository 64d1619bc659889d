"""Samplers as pure functions over the network's clean sample: of the DDPM's reverse process, EDM and rectified flow.

`ancestral` and `ddim` visit the kept timesteps of a NoiseProcess, with its float64 tables. `euler` and `heun` solve the
probability flow dx/dsigma = (x - x0) / sigma, which EDM and rectified flow share: of rectified flow
x = (1 - sigma) x0 + sigma noise, hence x - x0 = sigma (noise - x0), its velocity times sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.objective.likelihood import Posterior
from finetune.objective.process import NoiseProcess, per_sample

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""predict(x_t [B, ...], level [1]) -> the clean sample [B, ...], and the variance half of the output if it has one."""

Rates = tuple[Tensor, Tensor]
"""alpha and sigma of x = alpha x0 + sigma noise, [B] or [1] float64 each."""

Denoise = Callable[[Tensor, Tensor], Tensor]
"""denoise(x [B, ...], sigma, float64 scalar on the CPU) -> the clean sample [B, ...]."""


# ---- the reverse process of a DDPM


def ancestral(predict: Predict, x: Tensor, posterior: Posterior, noise: Callable[[], Tensor]) -> Tensor:
    """Pure noise x [B, ...] -> x0, through all levels of `posterior` (Ho et al. 2020, algorithm 2).

    noise: standard normal noise of the shape of x; called at every level but the last, which adds none.
    """
    for t in reversed(range(len(posterior.log_beta))):
        level = torch.tensor([t])
        x0, fraction = predict(x, level)
        x = ancestral_step(posterior, x, x0, level, noise=noise() if t else torch.zeros_like(x), fraction=fraction)
    return x


def ancestral_step(
    posterior: Posterior, x: Tensor, x0: Tensor, level: Tensor, *, noise: Tensor, fraction: Tensor | None = None
) -> Tensor:
    """x_t [B, ...] -> x_{t-1}: the posterior mean of x0, and noise with the variance of p; none at level 0.

    level: [B] or [1]. fraction: the variance half of the output, if it is learned.
    """
    std = torch.exp(posterior.model_log_variance(level, x, fraction) / 2)
    return posterior.mean(x0, x, level) + per_sample((level > 0).double(), x) * std * noise


def ddim(
    predict: Predict, x: Tensor, process: NoiseProcess, *, eta: float = 0.0, noise: Callable[[], Tensor]
) -> Tensor:
    """Pure noise x [B, ...] -> x0, through all levels of `process` (Song et al. 2021); eta: see `ddim_step`.

    noise: as `ancestral`; not called if eta is 0.
    """
    clean = (torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    for t in reversed(range(len(process.alpha))):
        level = torch.tensor([t])
        alpha, sigma, _ = process(level)
        lower = process(level - 1)[:2] if t else clean
        x0, _ = predict(x, level)
        x = ddim_step(x, x0, (alpha, sigma), lower, eta=eta, noise=noise() if eta and t else None)
    return x


def ddim_step(
    x: Tensor, x0: Tensor, here: Rates, there: Rates, *, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """x [B, ...] with the rates `here` -> x with the rates `there` (Song et al. 2021, equation 12).

    The noise that x holds is taken from x and x0, so a clipped x0 changes it too (Nichol & Dhariwal 2021). With eta 0
    `there` may also be noisier. eta: new noise, as a multiple of the standard deviation of the DDPM's posterior.
    """
    (alpha, sigma), (next_alpha, next_sigma) = here, there
    held = (x - per_sample(alpha, x) * x0) / per_sample(sigma, x)
    if noise is None:
        return per_sample(next_alpha, x) * x0 + per_sample(next_sigma, x) * held
    std = eta * next_sigma / sigma * (1 - (alpha / next_alpha) ** 2).sqrt()
    rest = (next_sigma**2 - std**2).clamp(min=0).sqrt()  # eta 1 may round below 0
    return per_sample(next_alpha, x) * x0 + per_sample(rest, x) * held + per_sample(std, x) * noise


# ---- the probability flow of EDM and of rectified flow


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


def dpmsolver(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """As `euler`, of the variance-exploding process: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), second order with
    one evaluation per step. Exact where x0 does not change.
    """
    before, last_step = None, 0.0
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0 = denoise(x, sigma)
        step = math.log(sigma / following) if following > 0 else math.inf  # in ln(1 / sigma)
        ahead = x0 if before is None or following == 0 else x0 + (x0 - before) * (step / (2 * last_step))
        x = x * float(following / sigma) - ahead * math.expm1(-step)
        before, last_step = x0, step
    return x


SOLVERS = {"euler": euler, "heun": heun, "dpmsolver++": dpmsolver}

"""The forward process: how much signal and how much noise a level has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class NoiseProcess:
    """Variance-preserving process x_t = alpha x0 + sigma noise, alpha^2 + sigma^2 = 1, on integer levels (DDPM).

    alpha, sigma: [T] float64 on the CPU. Level 0 has the least noise, T - 1 the most.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """alphas_cumprod: [T] float64, the share of signal variance (abar of Ho et al. 2020), in [0, 1)."""
        assert alphas_cumprod.dtype == torch.float64, "float32 1 - abar is off by up to 3e-3 at the first levels"
        self.alpha, self.sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> NoiseProcess:
        """The process whose noise the scheduler removes; copies its betas, so sampling with it changes nothing here.

        The product is taken in float64 over the scheduler's own float32 betas: within 2.3e-7 of the reference tables
        of improved-diffusion where the scheduler's float32 alphas_cumprod gives 1 - abar an error up to 3e-3, and still
        the noise that the scheduler samples with. (The last cosine level is 1.3e-5 off: there abar is 2e-9 and 1 - beta
        keeps only float32's digits of 0.999.) With rescale_betas_zero_snr the last beta is exactly 1, hence the last
        abar is exactly 0 in both precisions, with no special case.
        """
        return cls((1 - scheduler.betas.double()).cumprod(0))

    def __call__(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """level: [B] int64 on the CPU, in [0, T) -> alpha, sigma ([B] float64) and the time the network is given [B].

        The time is the level itself, as the stock pipelines feed it.
        """
        assert 0 <= int(level.min()) and int(level.max()) < len(self.alpha), level
        return self.alpha[level], self.sigma[level], level

    def fraction(self, level: Tensor) -> Tensor:
        """level: [B] -> where it stands among the levels, in [0, 1); 0 has the least noise. For statistics."""
        return level / len(self.alpha)


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha^2 / sigma^2 (Kingma et al. 2021) of unit-variance data, float64."""
    return (alpha / sigma) ** 2


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] that multiplies `like` [B, ...]; cast from float64 here, as the last step."""
    return coefficient.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))

"""The forward process: how much signal and how much noise a level has, and what the network is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from finetune.transfer import to_device

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class Process(Protocol):
    """x_t = alpha x0 + sigma noise."""

    def __call__(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """level: [B] on the CPU -> alpha, sigma ([B] float64) and the time the network is given [B]."""

    def scale_input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """What the network reads of x_t [B, ...]."""

    def fraction(self, level: Tensor) -> Tensor:
        """level: [B] -> where it stands among the levels, in [0, 1]; 0 has the least noise. For statistics."""


class NoiseProcess:
    """Variance-preserving process x_t = alpha x0 + sigma noise, alpha^2 + sigma^2 = 1, on integer levels (DDPM).

    alpha, sigma: [T] float64 on the CPU. Level 0 has the least noise, T - 1 the most.
    """

    def __init__(
        self, alphas_cumprod: Tensor, *, kept: Sequence[int] | None = None, rescale_timesteps: bool = False
    ) -> None:
        """alphas_cumprod: [N] float64, the share of signal variance (abar of Ho et al. 2020), in [0, 1).

        kept: the timesteps that are the levels, ascending (Nichol & Dhariwal 2021's respacing); None: all. The network
        is given the timestep, times 1000 / N with rescale_timesteps.
        """
        assert alphas_cumprod.dtype == torch.float64, "float32 1 - abar is off by up to 3e-3 at the first levels"
        self.timesteps = torch.arange(len(alphas_cumprod)) if kept is None else torch.tensor(kept)
        self.alphas_cumprod = alphas_cumprod[self.timesteps]
        self.alpha, self.sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.time = self.timesteps * (1000 / len(alphas_cumprod)) if rescale_timesteps else self.timesteps

    @classmethod
    def from_scheduler(
        cls, scheduler: SchedulerMixin, *, kept: Sequence[int] | None = None, rescale_timesteps: bool = False
    ) -> NoiseProcess:
        """The process whose noise the scheduler removes; copies its betas, so sampling with it changes nothing here.

        The product is taken in float64 over the scheduler's own float32 betas: within 2.3e-7 of the reference tables
        of improved-diffusion where the scheduler's float32 alphas_cumprod gives 1 - abar an error up to 3e-3, and still
        the noise that the scheduler samples with. (The last cosine level is 1.3e-5 off: there abar is 2e-9 and 1 - beta
        keeps only float32's digits of 0.999.) With rescale_betas_zero_snr the last beta is exactly 1, hence the last
        abar is exactly 0 in both precisions, with no special case.
        """
        return cls((1 - scheduler.betas.double()).cumprod(0), kept=kept, rescale_timesteps=rescale_timesteps)

    def __call__(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """level: [B] int64 on the CPU, in [0, T) -> alpha, sigma ([B] float64) and the time the network is given [B].

        Without rescale_timesteps the time is the timestep itself, int64, as the stock pipelines feed it.
        """
        assert 0 <= int(level.min()) and int(level.max()) < len(self.alpha), level
        return self.alpha[level], self.sigma[level], self.time[level]

    def scale_input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """x_t itself: its variance is that of the data at every level."""
        return x_t

    def fraction(self, level: Tensor) -> Tensor:
        """level: [B] -> where it stands among the levels, in [0, 1); 0 has the least noise. For statistics."""
        return level / len(self.alpha)


class VarianceExploding:
    """x_t = x0 + sigma noise; the level is sigma, the network's time ln(sigma) / 4 (Karras et al. 2022, table 1)."""

    def __init__(self, sigma_data: float) -> None:
        """sigma_data: standard deviation of x0."""
        self.sigma_data = sigma_data

    def __call__(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """level: [B] float64 on the CPU, above 0 -> alpha, sigma ([B] float64) and the time, [B] float32."""
        assert float(level.min()) > 0, level
        sigma = level.double()
        return torch.ones_like(sigma), sigma, (sigma.log() / 4).float()

    def scale_input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """c_in x_t, of unit variance: c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return per_sample((sigma**2 + self.sigma_data**2).rsqrt(), x_t) * x_t

    def fraction(self, level: Tensor) -> Tensor:
        """level: [B] -> its place in [0, 1) on a cosine schedule, where sigma = sigma_data stands in the middle."""
        return torch.atan(level / self.sigma_data) * (2 / torch.pi)


class RectifiedFlow:
    """x_t = (1 - sigma) x0 + sigma noise; the level is sigma, the network's time 1000 sigma (Liu et al. 2023)."""

    def __call__(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """level: [B] float64 on the CPU, in (0, 1] -> alpha, sigma ([B] float64) and the time, [B] float32."""
        assert 0 < float(level.min()) and float(level.max()) <= 1, level
        sigma = level.double()
        return 1 - sigma, sigma, (1000 * sigma).float()

    def scale_input(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """x_t itself."""
        return x_t

    def fraction(self, level: Tensor) -> Tensor:
        """level: [B] -> itself, the share of noise."""
        return level


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha^2 / sigma^2 (Kingma et al. 2021) of unit-variance data, float64."""
    return (alpha / sigma) ** 2


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] that multiplies `like` [B, ...]; cast from float64 here, as the last step."""
    return to_device(coefficient, like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))

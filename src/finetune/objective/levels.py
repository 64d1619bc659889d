"""Which noise levels are trained, and how often."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from finetune.seeding import PositionRandom


@runtime_checkable
class LevelSampler(Protocol):
    """Draws noise levels."""

    def sample(self, random: PositionRandom) -> tuple[Tensor, Tensor]:
        """-> levels [B], in whatever the noise process takes, and importance weights [B] float64, both on the CPU.

        The weight is p_uniform / p of the level: it keeps the expected loss that of uniform levels. What should change
        the objective belongs in the weighting.
        """


class UniformIntegers:
    """Every timestep 0..T-1 equally often (Ho et al. 2020, algorithm 1)."""

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps

    def sample(self, random: PositionRandom) -> tuple[Tensor, Tensor]:
        """-> levels [B] int64 in [0, T) and weights [B] of 1."""
        level = random.integers("level", self.num_train_timesteps)
        return level, torch.ones(level.shape, dtype=torch.float64)


class Density:
    """Levels whose distribution is given by its inverse cdf, applied to one uniform number per sample."""

    def __init__(self, inverse_cdf: Callable[[Tensor], Tensor], *, strata: int = 1) -> None:
        """inverse_cdf: u [B] float64 in [0, 1) -> level [B].

        strata: u is stratified over so many consecutive positions: each has exactly one in every [i / n, (i + 1) / n).
        """
        self.inverse_cdf, self.strata = inverse_cdf, strata

    def sample(self, random: PositionRandom) -> tuple[Tensor, Tensor]:
        """-> levels [B] and weights [B] of 1: the density is part of the objective."""
        level = self.inverse_cdf(random.stratified("level", self.strata))
        return level, torch.ones(level.shape, dtype=torch.float64)


class LossSecondMoment:
    """Timesteps with probability in proportion to sqrt(mean(loss^2)) of their last losses (Nichol & Dhariwal 2021).

    losses: [T, history] float64, oldest first; counts: [T] int64. The draw is a function of seed, position and these.
    """

    def __init__(self, num_levels: int, *, history_per_term: int, uniform_prob: float, strata: int = 1) -> None:
        """Until every level has history_per_term losses, levels are uniform; uniform_prob: share of uniform draws."""
        self.uniform_prob, self.strata = uniform_prob, strata
        self.losses = torch.zeros(num_levels, history_per_term, dtype=torch.float64)
        self.counts = torch.zeros(num_levels, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """[T] float64, with sum 1."""
        levels, history = self.losses.shape
        if bool((self.counts < history).any()):
            return torch.full((levels,), 1 / levels, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        return (1 - self.uniform_prob) * size / size.sum() + self.uniform_prob / levels

    def sample(self, random: PositionRandom) -> tuple[Tensor, Tensor]:
        """-> levels [B] int64 and weights 1 / (T p) [B], which keep the expected loss that of uniform levels."""
        p = self.probabilities()
        u = random.stratified("level", self.strata)
        level = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)  # the sum may round below 1
        return level, 1 / (len(p) * p[level])

    def update(self, level: Tensor, loss: Tensor) -> None:
        """Take in the unweighted losses [B] of levels [B], of all processes, in the same order on each."""
        history = self.losses.shape[1]
        for t, value in zip(level.tolist(), loss.tolist(), strict=True):
            if self.counts[t] == history:
                self.losses[t] = self.losses[t].roll(-1)
            else:
                self.counts[t] += 1
            self.losses[t, self.counts[t] - 1] = value

    def state_dict(self) -> dict[str, Tensor]:
        """The history."""
        return {"level_losses": self.losses, "level_counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict."""
        self.losses, self.counts = state["level_losses"].clone(), state["level_counts"].clone()


def log_normal(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    """u -> sigma with ln sigma ~ N(mean, std^2) (Karras et al. 2022, table 1)."""
    return lambda u: torch.exp(mean + std * torch.special.ndtri(u))


def log_logistic(loc: float, scale: float) -> Callable[[Tensor], Tensor]:
    """u -> sigma with ln sigma ~ Logistic(loc, scale) (k-diffusion)."""
    return lambda u: torch.exp(loc + scale * torch.logit(u))


def log_uniform(sigma_min: float, sigma_max: float) -> Callable[[Tensor], Tensor]:
    """u -> sigma between sigma_min and sigma_max, every ln sigma as likely (k-diffusion)."""
    return lambda u: sigma_min * (sigma_max / sigma_min) ** u


def v_diffusion(sigma_data: float, sigma_min: float, sigma_max: float) -> Callable[[Tensor], Tensor]:
    """u -> sigma = sigma_data tan(pi u / 2), between sigma_min and sigma_max (Salimans & Ho 2022)."""
    low, high = (math.atan(sigma / sigma_data) for sigma in (sigma_min, sigma_max))
    return lambda u: sigma_data * torch.tan(low + (high - low) * u)


def uniform(u: Tensor) -> Tensor:
    """u -> level in (0, 1], every one as likely; never 0, which would be no noise."""
    return 1 - u


def logit_normal(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    """u -> level in (0, 1) whose logit is N(mean, std^2) (Esser et al. 2024, equation 19)."""
    return lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(scale: float) -> Callable[[Tensor], Tensor]:
    """u -> level in (0, 1], denser or sparser in the middle by `scale` (Esser et al. 2024, equation 20)."""
    return lambda u: 1 - u - scale * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u)


def cosmap(u: Tensor) -> Tensor:
    """u -> level in [0, 1) whose SNR is that of the cosine schedule (Esser et al. 2024, equation 21)."""
    return 1 - 1 / (torch.tan(torch.pi / 2 * u) + 1)


def shifted(inverse_cdf: Callable[[Tensor], Tensor], shift: float) -> Callable[[Tensor], Tensor]:
    """The level s of inverse_cdf moved to shift s / (1 + (shift - 1) s) (Esser et al. 2024, equation 23)."""

    def moved(u: Tensor) -> Tensor:
        level = inverse_cdf(u)
        return shift * level / (1 + (shift - 1) * level)

    return moved


def to_integers(inverse_cdf: Callable[[Tensor], Tensor], num_levels: int) -> Callable[[Tensor], Tensor]:
    """The level in [0, 1] of inverse_cdf as an integer in [0, num_levels)."""
    return lambda u: (num_levels * inverse_cdf(u)).long().clamp(max=num_levels - 1)  # 1 itself belongs to the last

"""Which noise levels are trained, and how often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from finetune.seeding import PositionRandom


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

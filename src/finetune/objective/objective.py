"""The loss: a pure core, `loss_at`, and the shell that draws what it needs, `loss`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.objective.levels import LevelSampler
from finetune.objective.prediction import Prediction
from finetune.objective.process import NoiseProcess, per_sample, snr
from finetune.objective.weighting import Weighting

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from finetune.seeding import PositionRandom

Network = Callable[[Tensor, Tensor], Tensor]
"""network(x_t [B, C, H, W] float32, timestep [B]) -> output [B, C, H, W], any floating dtype."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossTerms:
    """One value per sample, all [B] on the device of x0. What is minimised is (per_sample * weight).mean()."""

    per_sample: Tensor
    """The loss with the weighting of its level, float32, differentiable."""
    weight: Tensor
    """Importance weight of the level sampler, float32."""
    level: Tensor
    """Noise level, in the unit of the noise process."""
    terms: dict[str, Tensor]
    """The parts of the loss before weighting, detached, for logging: `mse`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """Noise process + parametrisation + level sampler + weighting, and the scheduler that samples what they train."""

    process: NoiseProcess
    prediction: Prediction
    levels: LevelSampler
    weighting: Weighting
    noise_offset: float = 0.0
    """Strength of the noise that is one number per sample and channel; 0 is none."""
    scheduler: SchedulerMixin
    """The diffusers scheduler to sample with and to export. Training reads nothing from it."""

    def loss(self, network: Network, x0: Tensor, random: PositionRandom) -> LossTerms:
        """x0: [B, C, H, W] -> the loss at levels and noise drawn by `random`, whose device is that of x0."""
        level, weight = self.levels.sample(random)
        noise = random.normal("noise", x0.shape[1:])
        if self.noise_offset:
            # Added before noise is used for anything, so that the target holds it: the network must remove it too.
            noise = noise + self.noise_offset * random.normal("offset_noise", (x0.shape[1], *[1] * (x0.ndim - 2)))
        return replace(self.loss_at(network, x0, level, noise), weight=weight.to(x0.device, torch.float32))

    def loss_at(self, network: Network, x0: Tensor, level: Tensor, noise: Tensor) -> LossTerms:
        """The loss of x0 [B, C, H, W] noised with `noise` [B, C, H, W] to `level` [B] (on the CPU); draws nothing.

        Float32 whatever the dtypes of x0 and of the output: in bfloat16, sqrt(1 - abar) is zero for the first levels.
        The importance weight is 1. Raises ValueError if the output has not the shape of x0.
        """
        x0, noise = x0.float(), noise.float()
        alpha, sigma, time = self.process(level)
        x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
        output = network(x_t, time.to(x0.device)).float()
        if output.shape != x0.shape:
            raise ValueError(
                f"the network must return the shape of its input, {list(x0.shape)}, got {list(output.shape)}: "
                "set the model's out_channels to the number of channels of the data"
            )
        mse = (output - self.prediction.target(x0, noise, alpha, sigma)).square().flatten(1).mean(1)
        _, c_out = self.prediction.pair(alpha, sigma)
        return LossTerms(
            per_sample=mse * per_sample(self.weighting(snr(alpha, sigma), c_out), mse),
            weight=torch.ones_like(mse),
            level=level.to(x0.device),
            terms={"mse": mse.detach()},
        )

"""The loss: a pure core, `loss_at`, and the shell that draws what it needs, `loss`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from finetune.objective.levels import LevelSampler, LossSecondMoment
from finetune.objective.likelihood import Posterior
from finetune.objective.noise import Noise
from finetune.objective.prediction import Prediction
from finetune.objective.process import Process, per_sample, snr
from finetune.objective.regression import Regression, squared
from finetune.objective.weighting import Uncertainty, Weighting
from finetune.transfer import to_device

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from finetune.seeding import PositionRandom

Network = Callable[[Tensor, Tensor], Tensor]
"""network(x_t [B, C, H, W] float32, timestep [B]) -> output [B, C, H, W], any floating dtype; [B, 2C, H, W] with a
learned variance."""


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
    """The parts of the loss before weighting, detached, for logging: `mse`, `l1` or `huber`; `vb`; `uncertainty`."""


@dataclass(frozen=True)
class VariationalLoss:
    """How the variational bound enters the loss (Nichol & Dhariwal 2021, section 3.1)."""

    scale: float
    """What its bits per dimension are multiplied by."""
    alone: bool
    """Whether it is the whole loss; if not, it is added to the regression and trains the variance only."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """Noise process + parametrisation + level sampler + weighting, and the scheduler that samples what they train."""

    process: Process
    prediction: Prediction
    levels: LevelSampler
    weighting: Weighting
    regression: Regression = squared
    noise: Noise = field(default_factory=Noise)
    posterior: Posterior | None = None
    """The reverse process of a DDPM."""
    variational: VariationalLoss | None = None
    uncertainty: Uncertainty | None = None
    scheduler: SchedulerMixin
    """The diffusers scheduler to sample with and to export. Training reads nothing from it."""

    def loss(
        self, network: Network, x0: Tensor, random: PositionRandom, *, mask: Tensor | None = None
    ) -> LossTerms:
        """x0: [B, C, H, W] -> the loss at levels and noise drawn by `random`, whose device is that of x0.

        mask: see `loss_at`.
        """
        level, weight = self.levels.sample(random)
        noise, input_noise = self.noise.sample(random, x0.shape[1:])
        terms = self.loss_at(network, x0, level, noise, input_noise=input_noise, mask=mask)
        return replace(terms, weight=to_device(weight, x0.device, torch.float32))

    def loss_at(
        self,
        network: Network,
        x0: Tensor,
        level: Tensor,
        noise: Tensor,
        *,
        input_noise: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LossTerms:
        """The loss of x0 [B, C, H, W] noised with `noise` [B, C, H, W] to `level` [B] (on the CPU); draws nothing.

        input_noise: what x_t is made with in place of `noise`, which stays that of the target. mask [B, 1, *, *]: how
        much each place counts, of any size from that of x0 up, to which it is averaged by area; the loss is the mean of
        mask * error over all places, counted or not, as in sd-scripts and OneTrainer: an image with a small mask counts
        less than one with a large mask, and a place as much in the one as in the other. Float32 whatever the
        dtypes of x0 and of the output: in bfloat16, sqrt(1 - abar) is zero for the first levels. The importance weight
        is 1. Raises ValueError if the output has not the shape of x0, or if the variational bound meets x0 that are not
        8-bit pixels.
        """
        x0, noise = x0.float(), noise.float()
        alpha, sigma, time = self.process(level)
        added = noise if input_noise is None else input_noise.float()
        x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * added
        time = to_device(time, x0.device)
        output, fraction = self.split(network(self.process.scale_input(x_t, sigma), time).float(), x0)

        parts = {}
        if self.variational is None or not self.variational.alone:
            error = self.regression.function(output - self.prediction.target(x0, noise, alpha, sigma))
            if mask is not None:
                error = error * adaptive_avg_pool2d(mask, error.shape[2:])
            parts[self.regression.name] = error = error.flatten(1).mean(1)
            _, c_out = self.prediction.pair(alpha, sigma)
            loss = error * per_sample(self.weighting(snr(alpha, sigma), self.regression.scale(c_out)), error)
        if self.uncertainty is not None:
            parts["uncertainty"] = u = self.uncertainty(time)
            loss = loss / u.exp() + u
        if self.variational is not None:
            # Beside a regression the bound trains the variance only (Nichol & Dhariwal 2021, section 3.1).
            mean_output = output if self.variational.alone else output.detach()
            predicted = self.prediction.x0(x_t, mean_output, alpha, sigma)
            bound = self.posterior.bound(x0, x_t, level, predicted=predicted, fraction=fraction)
            parts["vb"] = vb = self.variational.scale * bound
            loss = vb if self.variational.alone else loss + vb
        return LossTerms(
            per_sample=loss,
            weight=torch.ones_like(loss),
            level=to_device(level.float() if level.is_floating_point() else level, x0.device),
            terms={name: part.detach() for name, part in parts.items()},
        )

    def split(self, output: Tensor, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output's prediction, of the shape of x0, and its variance half, None unless the variance is learned."""
        learned = self.posterior is not None and self.posterior.variance_type == "learned_range"
        expected = [len(x0), x0.shape[1] * (1 + learned), *x0.shape[2:]]
        if list(output.shape) != expected:
            twice = "twice " if learned else ""
            raise ValueError(
                f"the network must return the shape {expected}, got {list(output.shape)}: set the model's out_channels "
                f"to {twice}the number of channels of the data"
            )
        return output.split(x0.shape[1], dim=1) if learned else (output, None)

    def x0(self, output: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """The clean sample [B, C, H, W] that the network's output for x_t [B, C, H, W] at `level` [B] stands for.

        x_t as the process makes it: the network was given process.scale_input(x_t, sigma) and the process's time.
        """
        alpha, sigma, _ = self.process(level)
        return self.prediction.x0(x_t, self.split(output.float(), x_t)[0], alpha, sigma)

    # ---- what is learned besides the network

    @property
    def learns(self) -> bool:
        """Whether `update` may change what the next step draws, which then waits for the losses of this one."""
        return isinstance(self.levels, LossSecondMoment) or type(self).update is not Objective.update

    def update(self, terms: LossTerms, gather: Callable[[Tensor], Tensor]) -> None:
        """Let the level sampler take in the losses of a micro-batch whose step was taken.

        gather: [B] of this process -> those of all processes, in the same order on each.
        """
        if isinstance(self.levels, LossSecondMoment):
            self.levels.update(gather(terms.level), gather(terms.per_sample.detach()))

    def to(self, device: torch.device | str) -> None:
        """Move what is learned to the device of the network."""
        if self.uncertainty is not None:
            self.uncertainty.to(device)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What the optimizer trains besides the network, by name."""
        return {} if self.uncertainty is None else dict(self.uncertainty.named_parameters(prefix="uncertainty"))

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for the objective; empty for most."""
        history = self.levels.state_dict() if isinstance(self.levels, LossSecondMoment) else {}
        return history | {name: parameter.detach() for name, parameter in self.parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of state_dict."""
        if isinstance(self.levels, LossSecondMoment):
            self.levels.load_state_dict(state)
        for name, parameter in self.parameters().items():
            parameter.copy_(state[name])

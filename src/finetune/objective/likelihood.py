"""The variational bound of a variance-preserving process on 8-bit pixels, as improved-diffusion computes it.

Ho et al. 2020, equations 5 to 8; learned variance: Nichol & Dhariwal 2021, section 3.1. Everything is in bits per
dimension, per sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from finetune.objective.process import NoiseProcess, per_sample
from finetune.transfer import to_device

if TYPE_CHECKING:
    from finetune.objective.objective import Network, Objective

VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]


class Posterior:
    """q(x_{t-1} | x_t, x0) of a process, and the variance of the p(x_{t-1} | x_t) that approximates it.

    Tables [T] float64, on the CPU, cast when they are used. Level t - 1 is the next lower one that is kept.
    """

    def __init__(self, process: NoiseProcess, variance_type: VarianceType) -> None:
        self.variance_type = variance_type
        abar = process.alphas_cumprod
        before = torch.cat([abar.new_ones(1), abar[:-1]])
        beta = 1 - abar / before
        variance = beta * (1 - before) / (1 - abar)
        # That of x0 given x_1 is 0, and its log would be infinite; a single level has no other, and needs none.
        variance[0] = variance[:2][-1]
        self.log_variance, self.log_beta = variance.log(), beta.log()
        self.log_large = torch.cat([self.log_variance[:1], self.log_beta[1:]])
        self.coefficient_x0 = beta * before.sqrt() / (1 - abar)
        self.coefficient_x_t = (1 - before) * (1 - beta).sqrt() / (1 - abar)

    def mean(self, x0: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x0), [B, ...]; with the network's x0, that of p(x_{t-1} | x_t)."""
        return per_sample(self.coefficient_x0[level], x0) * x0 + per_sample(self.coefficient_x_t[level], x_t) * x_t

    def model_log_variance(self, level: Tensor, like: Tensor, fraction: Tensor | None) -> Tensor:
        """Log variance of p, broadcastable to `like` [B, ...].

        fraction: the second half of the output if the variance is learned: -1 is the posterior's, 1 is beta.
        """
        match self.variance_type:
            case "fixed_small":
                return per_sample(self.log_variance[level], like)
            case "fixed_large":
                return per_sample(self.log_large[level], like)
        share = (fraction + 1) / 2
        return share * per_sample(self.log_beta[level], like) + (1 - share) * per_sample(self.log_variance[level], like)

    def bound(
        self, x0: Tensor, x_t: Tensor, level: Tensor, *, predicted: Tensor, fraction: Tensor | None = None
    ) -> Tensor:
        """[B] bits per dimension of a p that predicts the x0 `predicted`, with the variance of model_log_variance."""
        mean, log_variance = self.mean(predicted, x_t, level), self.model_log_variance(level, x0, fraction)
        return self.bound_of(x0, x_t, level, mean=mean, log_variance=log_variance)

    def bound_of(self, x0: Tensor, x_t: Tensor, level: Tensor, *, mean: Tensor, log_variance: Tensor) -> Tensor:
        """[B] bits per dimension of p = N(mean, exp(log_variance)), which may broadcast to x0.

        KL(q || p) at levels above 0, and -log p(x0 | x_1) at level 0. Raises ValueError if x0 at level 0 are not 8-bit
        pixels, whose probability is not defined.
        """
        kl = bits(normal_kl(self.mean(x0, x_t, level), per_sample(self.log_variance[level], x0), mean, log_variance))
        if not (level == 0).any():
            return kl
        first = to_device(level == 0, x0.device)
        check_8_bit(x0[first])
        return torch.where(first, bits(-discretized_gaussian_log_likelihood(x0, mean, log_variance / 2)), kl)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise."""
    difference = log_variance1 - log_variance2
    return 0.5 * (-1 - difference + difference.exp() + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, in nats and elementwise, that N(mean, exp(2 log_scale)) has in the 8-bit bin around x.

    Bins are 2 / 255 wide; those of -1 and 1 reach to infinity. Probabilities below 1e-12 count as 1e-12.
    """
    centred, inverse = x - mean, torch.exp(-log_scale)
    above = _normal_cdf(inverse * (centred + 1 / 255))
    below = _normal_cdf(inverse * (centred - 1 / 255))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The approximation of Page 1977, which the published bits per dimension were computed with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bits(nats: Tensor) -> Tensor:
    """[B, ...] nats per dimension -> [B] bits per dimension."""
    return nats.flatten(1).mean(1) / math.log(2)


def check_8_bit(x0: Tensor) -> None:
    """Raises ValueError unless x0 are the values v / 127.5 - 1 of v in 0..255."""
    values = (x0.float() + 1) * 127.5
    if bool(((values - values.round()).abs() > 1e-3).any()) or float(x0.abs().max()) > 1:
        raise ValueError(
            "the likelihood is one of 8-bit pixels, but x0 are not the values v / 127.5 - 1 of v in 0..255: give it "
            "images as they were decoded (not latents, nor pixels resized in floating point)"
        )


def prior_bits(process: NoiseProcess, x0: Tensor) -> Tensor:
    """KL(q(x_T | x0) || N(0, 1)) of x0 [B, ...], [B] bits per dimension; no network can change it."""
    alpha, sigma = process.alpha[-1:], process.sigma[-1:]
    zero = torch.zeros_like(x0)
    return bits(normal_kl(per_sample(alpha, x0) * x0, per_sample(2 * sigma.log(), x0), zero, zero))


@torch.no_grad()
def bits_per_dim(
    objective: Objective, network: Network, x0: Tensor, noises: Iterable[Tensor], *, clip_denoised: bool = True
) -> dict[str, Tensor]:
    """The variational bound of x0 [B, C, H, W], 8-bit pixels in [-1, 1], summed over all levels.

    noises: one [B, C, H, W] for each level, from the last to the first. clip_denoised: clamp the predicted x0 to
    [-1, 1]. Returns `total` and `prior` [B]; and `vb`, and the squared errors `x0_mse` and `noise_mse`, [B, T] from the
    last level to the first. Raises ValueError if x0 are not 8-bit pixels or the objective is not of kind ddpm.
    """
    process, posterior = objective.process, objective.posterior
    if not isinstance(process, NoiseProcess) or posterior is None:
        raise ValueError("bits per dimension are defined for objective.kind ddpm only")
    check_8_bit(x0)
    columns = []
    steps = reversed(range(len(process.alpha)))
    for t, noise in zip(steps, noises, strict=True):
        level = torch.full((len(x0),), t)
        alpha, sigma, time = process(level)
        x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
        output, fraction = objective.split(network(x_t, time.to(x0.device)).float(), x0)
        predicted = objective.prediction.x0(x_t, output, alpha, sigma)
        predicted = predicted.clamp(-1, 1) if clip_denoised else predicted
        vb = posterior.bound(x0, x_t, level, predicted=predicted, fraction=fraction)
        predicted_noise = (x_t - per_sample(alpha, x0) * predicted) / per_sample(sigma, x0)
        errors = ((predicted - x0).square(), (predicted_noise - noise).square())
        columns.append(torch.stack([vb, *(error.flatten(1).mean(1) for error in errors)]))
    vb, x0_mse, noise_mse = torch.stack(columns, dim=2)
    prior = prior_bits(process, x0)
    return {"total": vb.sum(1) + prior, "prior": prior, "vb": vb, "x0_mse": x0_mse, "noise_mse": noise_mse}

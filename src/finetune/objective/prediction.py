"""The parametrisation: what the network's output F means, as one affine pair x0 = c_skip x_t + c_out F."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from finetune.objective.process import per_sample

PredictionType = Literal["epsilon", "sample", "v_prediction", "edm", "flow"]


class Prediction:
    """Target, clean sample and noise, all from the pair (c_skip, c_out) of a prediction_type.

    alpha and sigma are [B] float64; x0, noise, x_t, output are [B, ...] of one floating dtype, in which the sums are
    done (the coefficients are float64 until then).
    """

    def __init__(self, prediction_type: PredictionType, *, sigma_data: float | None = None) -> None:
        """sigma_data: the standard deviation of x0 in a variance-exploding process; None in the other processes."""
        self.prediction_type, self.sigma_data = prediction_type, sigma_data

    def pair(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out), [B] float64 each, such that x0 = c_skip x_t + c_out F."""
        if self.sigma_data is not None:
            return self._preconditioned(sigma)
        match self.prediction_type:
            case "epsilon":  # Ho et al. 2020, equation 11; infinite where alpha = 0
                return 1 / alpha, -sigma / alpha
            case "sample":
                return torch.zeros_like(alpha), torch.ones_like(alpha)
            case "v_prediction":  # v = alpha noise - sigma x0 (Salimans & Ho 2022, appendix D)
                return alpha, -sigma
            case "flow":  # noise - x0 (Liu et al. 2023), with alpha = 1 - sigma
                return torch.ones_like(alpha), -sigma
        choices = "epsilon, sample, v_prediction or flow"
        raise ValueError(f"prediction_type must be {choices}, got {self.prediction_type!r}")

    def _preconditioned(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The pair that makes the target of unit variance at alpha = 1 (Karras et al. 2022, table 1)."""
        variance = sigma**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt()
        match self.prediction_type:
            case "edm":
                return c_skip, c_out
            case "v_prediction":  # with sigma_data 1, the v of the variance-preserving process of the same SNR
                return c_skip, -c_out
        raise ValueError(f"prediction_type must be edm or v_prediction with sigma_data, got {self.prediction_type!r}")

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output that recovers x0 exactly from x_t = alpha x0 + sigma noise: solve the pair for F."""
        c_skip, c_out = self.pair(alpha, sigma)
        return per_sample((1 - c_skip * alpha) / c_out, x0) * x0 - per_sample(c_skip * sigma / c_out, x0) * noise

    def x0(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample that the output stands for."""
        c_skip, c_out = self.pair(alpha, sigma)
        return per_sample(c_skip, x_t) * x_t + per_sample(c_out, x_t) * output

    def noise(self, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise that the output stands for: (x_t - alpha x0) / sigma."""
        c_skip, c_out = self.pair(alpha, sigma)
        return per_sample((1 - alpha * c_skip) / sigma, x_t) * x_t - per_sample(alpha * c_out / sigma, x_t) * output

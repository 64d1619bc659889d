"""How much each noise level counts: w(SNR) on the error of x0, which is w c_out^2 on the squared error of the output.

Since x0 = c_skip x_t + c_out F, both errors differ by the factor c_out, and one w serves every parametrisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weighting = Callable[[Tensor, Tensor], Tensor]
"""(snr [B], scale [B]) in float64 -> weight [B] of the output's loss. scale is the loss of x0 over that of the output:
c_out^2, or |c_out| of absolute errors. A weighting of x0's loss multiplies by it, one of the output's ignores it."""


def constant(snr: Tensor, scale: Tensor) -> Tensor:
    """1 on the network's output, whatever it predicts: the "simple" loss (Ho et al. 2020, equation 14)."""
    return torch.ones_like(snr)


def x0(snr: Tensor, scale: Tensor) -> Tensor:
    """w = 1 on x0 (generative-models' UnitWeighting)."""
    return scale


def by_snr(snr: Tensor, scale: Tensor) -> Tensor:
    """w = SNR on x0: the squared error of the noise."""
    return snr * scale


def min_snr(gamma: float) -> Weighting:
    """w = min(SNR, gamma) on x0 (Hang et al. 2023): epsilon min(S, g)/S, v min(S, g)/(S + 1), sample min(S, g).

    At zero terminal SNR, v has weight 0, by the same formula: that level is then not trained.
    """
    return lambda snr, scale: snr.clamp(max=gamma) * scale


def soft_min_snr(gamma: float) -> Weighting:
    """w = SNR gamma / (SNR + gamma) on x0 (Crowson et al. 2024), with gamma = 1 / sigma_data^2 in k-diffusion."""
    return lambda snr, scale: snr * gamma / (snr + gamma) * scale


def edm(sigma_data: float) -> Weighting:
    """w = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = SNR + 1 / sigma_data^2 on x0 (Karras et al. 2022)."""
    return lambda snr, scale: (snr + sigma_data**-2) * scale


def p2(k: float, gamma: float) -> Weighting:
    """w = SNR / (k + SNR)^gamma on x0: 1 / (k + SNR)^gamma on epsilon (Choi et al. 2022, equation 8)."""
    return lambda snr, scale: snr / (k + snr) ** gamma * scale


def debiased(snr: Tensor, scale: Tensor) -> Tensor:
    """w = sqrt(SNR) on x0: 1 / sqrt(SNR) on epsilon (Yu et al. 2024)."""
    return snr.sqrt() * scale


def sigma_sqrt(snr: Tensor, scale: Tensor) -> Tensor:
    """1 / sigma^2 on the output of rectified flow, where sqrt(SNR) = (1 - sigma) / sigma (Esser et al. 2024)."""
    return (1 + snr.sqrt()) ** 2


def cosmap(snr: Tensor, scale: Tensor) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)) on the output of rectified flow (Esser et al. 2024)."""
    sigma = 1 / (1 + snr.sqrt())
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


class Uncertainty(torch.nn.Module):
    """u, the log of the loss expected at a level, learned with the network: loss / exp(u) + u (Karras et al. 2024).

    The minimum over u is at u = ln(loss), so every level contributes gradients of like size. One linear layer over
    random Fourier features of the time that the network is given; 0 at the start, where the loss is the plain one.
    """

    def __init__(self, channels: int) -> None:
        """channels: number of Fourier features; their frequencies are the same in every run."""
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))
        self.weight = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, time: Tensor) -> Tensor:
        """time: [B] float32 -> u, [B] float32."""
        features = math.sqrt(2) * torch.cos(time[:, None] * self.frequencies + self.phases)
        return features @ self.weight / math.sqrt(len(self.weight))

"""How much each noise level counts: w(SNR) on the error of x0, which is w c_out^2 on the error of the output.

Since x0 = c_skip x_t + c_out F, both errors differ by the factor c_out, and one w serves every parametrisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Weighting = Callable[[Tensor, Tensor], Tensor]
"""(snr [B], c_out [B]) in float64 -> weight [B] of the squared error of the network's output."""


def constant(snr: Tensor, c_out: Tensor) -> Tensor:
    """1 on the network's output, whatever it predicts: the "simple" loss (Ho et al. 2020, equation 14)."""
    return torch.ones_like(snr)


@dataclass(frozen=True)
class MinSNR:
    """w = min(SNR, gamma) on x0 (Hang et al. 2023): epsilon min(S, g)/S, v min(S, g)/(S + 1), sample min(S, g).

    At zero terminal SNR, v has weight 0, by the same formula: that level is then not trained.
    """

    gamma: float
    """Where the weight saturates; the paper's is 5."""

    def __call__(self, snr: Tensor, c_out: Tensor) -> Tensor:
        """Weight [B] of the squared error of the network's output."""
        return snr.clamp(max=self.gamma) * c_out**2

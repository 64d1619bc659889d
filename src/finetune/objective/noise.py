"""The noise of training: white, or white with a share of low frequencies, and what is added to the input alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from finetune.seeding import PositionRandom


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard normal noise, and strengths (0 is none) of what changes it."""

    offset: float = 0.0
    """Noise that is one number per sample and channel, added on top (Guttenberg 2023)."""
    input_perturbation: float = 0.0
    """Noise that the network sees and the target does not hold (Ning et al. 2023)."""
    pyramid_discount: float = 0.0
    """Noise of half, a quarter, ... of the side, each this times as strong as the one before (Whitaker 2023)."""

    def sample(self, random: PositionRandom, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """shape: (C, H, W) -> the noise [B, C, H, W], and what x_t is made with if that is another."""
        noise = random.normal("noise", tuple(shape))
        if self.pyramid_discount:
            noise = self._pyramid(noise, random)
        if self.offset:
            # Added before noise is used for anything, so that the target holds it: the network must remove it too.
            noise = noise + self.offset * random.normal("offset_noise", (shape[0], *[1] * (len(shape) - 1)))
        if not self.input_perturbation:
            return noise, None
        return noise, noise + self.input_perturbation * random.normal("input_perturbation", tuple(shape))

    def _pyramid(self, noise: Tensor, random: PositionRandom) -> Tensor:
        """Nearest-neighbour upsampling keeps the variance of every octave, so that of the sum can be made 1."""
        channels, height, width = noise.shape[1:]
        variance, octave = 1.0, 1
        while min(height, width) >> octave:
            coarse = random.normal(f"pyramid_noise_{octave}", (channels, height >> octave, width >> octave))
            strength = self.pyramid_discount**octave
            noise = noise + strength * interpolate(coarse, size=(height, width), mode="nearest")
            variance, octave = variance + strength**2, octave + 1
        return noise / variance**0.5

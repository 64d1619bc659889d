"""Choices that objectives share: the loss, its weighting by noise level, and which levels are drawn. Imports no torch.

What an objective cannot use is not among its choices.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from finetune.config_types import Count, Float, Fraction, Params, Positive, PositiveOrZero, Target, section

# ---- your own


@section
class Custom:
    """Your own code: the target is imported if the command line trusts its package, and called with the params."""

    kind: Literal["custom"]
    target: Target
    """Full name of your class or function, such as my_package.module.MyClass; needs --trust my_package."""
    params: Params = Field(default_factory=dict)
    """Its keyword arguments."""


@section
class CustomLoss(Custom):
    """Your own: target(**params) is a finetune.objective.regression.Regression."""


@section
class CustomWeighting(Custom):
    """Your own: target(**params) is a function (snr, scale) -> weight as in finetune/objective/weighting.py."""


@section
class CustomLevels(Custom):
    """Your own: target(**params) has the method sample of finetune.objective.levels.LevelSampler; nothing else, such as
    a shift, is applied to its levels."""


# ---- loss


@section
class L2:
    """Squared error."""

    kind: Literal["l2"] = "l2"


@section
class L1:
    """Absolute error."""

    kind: Literal["l1"]


@section
class Huber:
    """Pseudo-Huber: 2 c (sqrt(d^2 + c^2) - c), squared for small errors d and absolute for large ones."""

    kind: Literal["huber"]
    huber_c: Positive = 0.1
    """Error c at which squared turns into absolute (0.1 as in diffusers' scripts)."""


Loss = Annotated[L2 | L1 | Huber | CustomLoss, Field(discriminator="kind")]

# ---- weighting


@section
class NoWeighting:
    """1 on the network's output, whatever it predicts (Ho et al. 2020; for EDM the paper's own weighting)."""

    kind: Literal["none"] = "none"


@section
class X0:
    """1 on the error of x0, at every level (generative-models' UnitWeighting)."""

    kind: Literal["x0"]


@section
class SNR:
    """The signal-to-noise ratio on the error of x0; for epsilon the same as none."""

    kind: Literal["snr"]


@section
class MinSNR:
    """min(SNR, gamma) on the error of x0 (Hang et al. 2023)."""

    kind: Literal["min_snr"]
    snr_gamma: Positive = 5.0
    """Gamma (the paper's is 5)."""


@section
class SoftMinSNR:
    """SNR gamma / (SNR + gamma) on the error of x0 (Crowson et al. 2024)."""

    kind: Literal["soft_min_snr"]
    soft_gamma: Positive = 4.0
    """Gamma (1 / sigma_data^2 in k-diffusion, hence 4)."""


@section
class EDMWeighting:
    """SNR + 1 / sigma_data^2 on the error of x0 (Karras et al. 2022); for v_prediction at sigma_data 1 as none."""

    kind: Literal["edm"]
    weighting_sigma_data: Positive = 0.5
    """Standard deviation of the data."""


@section
class P2:
    """SNR / (k + SNR)^gamma on the error of x0 (Choi et al. 2022)."""

    kind: Literal["p2"]
    p2_k: Positive = 1.0
    """k (the paper's is 1)."""
    p2_gamma: PositiveOrZero = 1.0
    """Gamma (the paper's are 0.5 and 1); 0 is kind snr."""


@section
class Debiased:
    """sqrt(SNR) on the error of x0 (Yu et al. 2024)."""

    kind: Literal["debiased"]


@section
class SigmaSqrt:
    """1 / sigma^2 on the network's output (Esser et al. 2024, EDM-like)."""

    kind: Literal["sd3_sigma_sqrt"]


@section
class CosMapWeighting:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)) on the network's output (Esser et al. 2024)."""

    kind: Literal["sd3_cosmap"]


@section
class Uncertainty:
    """Learned with the network: error / exp(u) + u for a small network u of the noise level (Karras et al. 2024)."""

    kind: Literal["uncertainty"]
    fourier_channels: Count = 128
    """Width of u."""


_BySNR = NoWeighting | X0 | SNR | MinSNR | SoftMinSNR | EDMWeighting | P2 | Debiased | CustomWeighting
Weighting = Annotated[_BySNR, Field(discriminator="kind")]
WeightingEDM = Annotated[_BySNR | Uncertainty, Field(discriminator="kind")]
WeightingFlow = Annotated[_BySNR | SigmaSqrt | CosMapWeighting, Field(discriminator="kind")]

# ---- noise levels


@section
class _Levels:
    kind: str
    stratified: bool = False
    """One sample from each of global_batch_size equal shares of the probability, instead of independent draws."""


@section
class Uniform(_Levels):
    """Every level equally often."""

    kind: Literal["uniform"] = "uniform"


@section
class LossSecondMoment(_Levels):
    """Timesteps in proportion to the root mean square of their last losses, weighted back (Nichol & Dhariwal 2021)."""

    kind: Literal["loss_second_moment"]
    history_per_term: Count = 10
    """Losses kept per timestep; until each has as many, timesteps are uniform (10 in the paper)."""
    uniform_prob: Annotated[Fraction, Field(gt=0)] = 0.001
    """Share of uniform draws, which keeps every timestep possible (improved-diffusion's 0.001)."""


@section
class LogNormal(_Levels):
    """ln sigma is normal (Karras et al. 2022)."""

    kind: Literal["log_normal"] = "log_normal"
    p_mean: Float = -1.2
    """Mean of ln sigma (-1.2 in EDM, -0.4 in EDM2)."""
    p_std: Positive = 1.2
    """Standard deviation of ln sigma (1.2 in EDM, 1.0 in EDM2)."""


@section
class LogLogistic(_Levels):
    """ln sigma is logistic: as log_normal, with more levels far out (k-diffusion)."""

    kind: Literal["log_logistic"]
    logistic_loc: Float = math.log(0.5)
    """Mean of ln sigma (ln 0.5, which is ln sigma_data, in k-diffusion)."""
    logistic_scale: Positive = 0.5
    """Scale; the standard deviation of ln sigma is 1.81 times that (0.5 in k-diffusion)."""


@section
class LogUniform(_Levels):
    """Every ln sigma between two bounds equally often (k-diffusion)."""

    kind: Literal["log_uniform"]
    sigma_min: Positive = 0.002
    """Smallest sigma."""
    sigma_max: Positive = 80.0
    """Largest sigma."""

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")


@section
class VDiffusion(LogUniform):
    """sigma = sigma_data tan(pi u / 2), u uniform: the levels of a cosine schedule (Salimans & Ho 2022)."""

    kind: Literal["v_diffusion"]


@section
class LogitNormal(_Levels):
    """The logit of the level is normal (Esser et al. 2024)."""

    kind: Literal["logit_normal"]
    logit_mean: Float = 0.0
    """Mean; above 0 is more noise (diffusers' script for SD3 has the opposite sign)."""
    logit_std: Positive = 1.0
    """Standard deviation."""


@section
class Mode(_Levels):
    """More or fewer levels in the middle: 1 - u - s (cos^2(pi u / 2) - 1 + u), u uniform (Esser et al. 2024)."""

    kind: Literal["mode"]
    mode_scale: Annotated[Float, Field(ge=-1, le=2 / (math.pi - 2))] = 1.29
    """s (the paper's is 1.29); sigma is monotone in u for -1 to 1.75."""


@section
class CosMap(_Levels):
    """The levels of a cosine schedule: sigma = 1 - 1 / (tan(pi u / 2) + 1), u uniform (Esser et al. 2024)."""

    kind: Literal["cosmap"]


Levels = Annotated[Uniform | LossSecondMoment | LogitNormal | CustomLevels, Field(discriminator="kind")]
LevelsEDM = Annotated[LogNormal | LogLogistic | LogUniform | VDiffusion | CustomLevels, Field(discriminator="kind")]
LevelsFlow = Annotated[Uniform | LogitNormal | Mode | CosMap | CustomLevels, Field(discriminator="kind")]

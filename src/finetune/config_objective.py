"""The objective of a run: noise process, prediction and variance, with the choices of config_levels. Imports no torch.

What only some combinations of settings can do is refused with the reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from finetune.config_levels import (
    L2,
    Custom,
    Levels,
    LevelsEDM,
    LevelsFlow,
    LogNormal,
    Loss,
    NoWeighting,
    Uniform,
    Weighting,
    WeightingEDM,
    WeightingFlow,
)
from finetune.config_types import Count, Decay, Int, Positive, PositiveOrZero, section

# ---- variance of the reverse process


@section
class FixedLarge:
    """beta, the larger bound (Ho et al. 2020)."""

    kind: Literal["fixed_large"]
    vb_loss: Literal["none", "kl", "rescaled_kl"] = "none"
    """What is minimised: none, the error of the prediction; kl, the variational bound of a level in bits per dimension;
    rescaled_kl, the number of levels times that."""


@section
class FixedSmall(FixedLarge):
    """The posterior's variance given x0, the smaller bound (Ho et al. 2020)."""

    kind: Literal["fixed_small"] = "fixed_small"


@section
class LearnedRange:
    """Learned between both bounds by a second half of the output channels (Nichol & Dhariwal 2021)."""

    kind: Literal["learned_range"]
    vb_loss: Literal["rescaled_mse", "mse", "kl", "rescaled_kl"] = "rescaled_mse"
    """What is minimised: mse, the error plus the variational bound of a level in bits per dimension, which trains the
    variance only; rescaled_mse, the bound times number of levels / 1000 (the paper's hybrid); kl, the bound alone;
    rescaled_kl, the number of levels times that."""


Variance = Annotated[FixedSmall | FixedLarge | LearnedRange, Field(discriminator="kind")]

# ---- objectives


@section
class _Objective:
    kind: Literal["ddpm", "edm", "flow"]
    noise_offset: PositiveOrZero = 0.0
    """Strength of offset noise, one value per image and channel added to the noise; the target includes it."""
    input_perturbation: PositiveOrZero = 0.0
    """Strength of extra noise in the network's input that the target does not include (Ning et al. 2023 use 0.1)."""
    pyramid_noise_discount: Decay = 0.0
    """Multi-resolution noise: each halving of the side adds noise this times as strong; the variance stays 1."""
    loss: Loss = Field(default_factory=L2)

    @property
    def out_channels_factor(self) -> int:
        """Output channels of the network over channels of the data."""
        return 1


ZERO_SNR = (
    "rescale_betas_zero_snr makes the last level pure noise, where epsilon says nothing of the image: use "
    "prediction_type v_prediction"
)
PLAIN = {
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "rescale_betas_zero_snr": False,
}
"""What DDPM's settings of these names are where neither they nor a pretrained pipeline say so (Ho et al. 2020)."""


@section
class DDPM(_Objective):
    """Denoising diffusion with a variance-preserving schedule (Ho et al. 2020). What is unset of the prediction and the
    noise is that of the pretrained pipeline; of a new model, what its help says."""

    kind: Literal["ddpm"] = "ddpm"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """What the network predicts: the noise, the clean sample, or the velocity (Salimans & Ho 2022); unset: epsilon."""
    num_train_timesteps: Annotated[Int, Field(ge=2)] | None = None
    """Number of noise levels T; unset: 1000."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] | None = None
    """Schedule: linear (Ho et al.; unset), scaled_linear (Stable Diffusion), squaredcos_cap_v2 (Nichol & Dhariwal
    2021), sigmoid (GeoDiff)."""
    beta_start: Positive | None = None
    """First beta; not of squaredcos_cap_v2; unset: 0.0001."""
    beta_end: Positive | None = None
    """Last beta; not of squaredcos_cap_v2; unset: 0.02."""
    scale_betas: bool = False
    """Multiply both betas by 1000 / num_train_timesteps, which keeps the noise of the last level (Nichol & Dhariwal
    2021); linear only."""
    rescale_betas_zero_snr: bool | None = None
    """Rescale to zero terminal SNR and sample with trailing timesteps (Lin et al. 2023); not with epsilon; unset:
    false."""
    respacing: str | None = None
    """Train on these timesteps only: "250" evenly spaced ones, "ddim50" at an integer stride, or "10,20,30" in equal
    sections (Nichol & Dhariwal 2021); unset: all."""
    rescale_timesteps: bool = False
    """Give the network t * 1000 / num_train_timesteps instead of t (improved-diffusion)."""
    clip_sample: bool | None = None
    """Clip the predicted clean sample to [-1, 1] in sampling; unset: in pixel space only."""
    levels: Levels = Field(default_factory=Uniform)
    weighting: Weighting = Field(default_factory=NoWeighting)
    variance: Variance = Field(default_factory=FixedSmall)

    @property
    def out_channels_factor(self) -> int:
        """Output channels of the network over channels of the data: 2 with a learned variance."""
        return 2 if self.variance.kind == "learned_range" else 1

    @property
    def beta_scale(self) -> float:
        """What beta_start and beta_end are multiplied by."""
        return 1000 / self.filled().num_train_timesteps if self.scale_betas else 1.0

    @property
    def unset(self) -> list[str]:
        """The settings of PLAIN that are not given."""
        return [name for name in PLAIN if getattr(self, name) is None]

    def filled(self, **noise: object) -> DDPM:
        """With `noise`, by the names of PLAIN, or else PLAIN in the place of what is unset. Raises ValueError."""
        values = PLAIN | noise
        return replace(self, **{name: values[name] for name in self.unset}) if self.unset else self

    def __post_init__(self) -> None:
        self._check_schedule()
        vb = self.variance.vb_loss
        if vb.endswith("kl") and (self.weighting.kind, self.loss.kind) != ("none", "l2"):
            raise ValueError(
                f"variance.vb_loss {vb} minimises the variational bound, which has neither weighting.kind "
                f"{self.weighting.kind} nor loss.kind {self.loss.kind}: leave both out, or use another vb_loss"
            )
        if vb != "none" and (self.noise_offset or self.input_perturbation or self.pyramid_noise_discount):
            raise ValueError(
                f"variance.vb_loss {vb} is the bound of white noise: remove noise_offset, input_perturbation and "
                "pyramid_noise_discount, or use variance.kind fixed_small or fixed_large with vb_loss none"
            )
        if self.levels.kind == "loss_second_moment" and not vb.endswith("kl"):
            raise ValueError(
                "levels.kind loss_second_moment draws timesteps by their variational bound, but variance.vb_loss is "
                f"{vb}, with which few timesteps would take most samples: use vb_loss kl or rescaled_kl, or "
                "levels.kind uniform"
            )

    def _check_schedule(self) -> None:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(ZERO_SNR)
        _, steps, schedule, start, end, _ = (
            plain if (given := getattr(self, name)) is None else given for name, plain in PLAIN.items()
        )
        if schedule == "squaredcos_cap_v2" and (start, end) != (PLAIN["beta_start"], PLAIN["beta_end"]):
            raise ValueError("beta_start and beta_end belong to the linear schedules; squaredcos_cap_v2 has neither")
        if self.scale_betas and schedule != "linear":
            raise ValueError(f"scale_betas belongs to beta_schedule linear, got {schedule}: remove it")
        if start > end:
            raise ValueError(f"beta_start must not exceed beta_end, got {start} > {end}")
        scaled = end * 1000 / steps if self.scale_betas else end
        if scaled >= 1:
            after = f" after scale_betas with {steps} timesteps" if self.scale_betas else ""
            raise ValueError(f"beta_end must be below 1{after}, got {scaled:g}")
        if self.respacing is not None:
            try:
                kept = space_timesteps(steps, self.respacing)
            except ValueError as error:
                raise ValueError(f"respacing: {error}") from None
            if len(kept) < 2:
                raise ValueError(f"respacing must keep at least 2 timesteps, got {self.respacing!r}")


@section
class EDM(_Objective):
    """The variance-exploding process and preconditioning of EDM (Karras et al. 2022)."""

    kind: Literal["edm"]
    prediction_type: Literal["edm", "v_prediction"] = "edm"
    """What the network predicts: EDM's mixture of signal and noise, or its negative, v at unit sigma_data."""
    sigma_data: Positive = 0.5
    """Standard deviation of x0 (0.5 for images in [-1, 1]; about 1 for scaled latents)."""
    levels: LevelsEDM = Field(default_factory=LogNormal)
    weighting: WeightingEDM = Field(default_factory=NoWeighting)

    def __post_init__(self) -> None:
        if self.weighting.kind == "uncertainty" and self.loss.kind != "l2":
            raise ValueError(
                f"weighting.kind uncertainty learns the variance of a squared error, got loss.kind {self.loss.kind}: "
                "use l2"
            )


@section
class Flow(_Objective):
    """Rectified flow: x_t = (1 - sigma) x0 + sigma noise, and the velocity noise - x0 (Liu et al. 2023)."""

    kind: Literal["flow"]
    prediction_type: Literal["flow"] = "flow"
    """What the network predicts: noise - x0."""
    shift: Positive = 1.0
    """Moves all levels, in training and sampling, towards noise (above 1): shift s / (1 + (shift - 1) s)."""
    levels: LevelsFlow = Field(default_factory=Uniform)
    weighting: WeightingFlow = Field(default_factory=NoWeighting)


@section
class CustomObjective(Custom):
    """Your own: target(**params) is a finetune.objective.Objective."""

    out_channels_factor: Count = 1
    """Output channels of the network over channels of the data (2 with a learned variance)."""


Objective = Annotated[DDPM | EDM | Flow | CustomObjective, Field(discriminator="kind")]


def space_timesteps(num_timesteps: int, respacing: str) -> tuple[int, ...]:
    """The timesteps kept of 0..num_timesteps-1, ascending (Nichol & Dhariwal 2021, as improved-diffusion rounds).

    "ddimN": N timesteps at the first integer stride that gives N. "a,b,c": equal sections (the first ones take the
    remainder) with so many timesteps each, the ends of a section included. "N": one section. Raises ValueError.
    """
    try:
        counts = [int(part) for part in respacing.removeprefix("ddim").split(",")]
    except ValueError:
        raise ValueError(f'expected "250", "ddim50" or "10,20,30", got {respacing!r}') from None
    if respacing.startswith("ddim"):
        strided = (range(0, num_timesteps, stride) for stride in range(1, num_timesteps))
        kept = next((steps for steps in strided if [len(steps)] == counts), None)
        if kept is None:
            raise ValueError(f"no integer stride gives {respacing.removeprefix('ddim')} of {num_timesteps} timesteps")
        return tuple(kept)
    size, longer = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if not 1 <= count <= length:
            raise ValueError(f"a section of {length} timesteps cannot keep {count}")
        stride, at = (length - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):  # summed, not multiplied: the rounding is the reference's
            kept.append(start + round(at))
            at += stride
        start += length
    return tuple(kept)

"""How images are drawn: the samplers, their settings, and which of them goes with what. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from finetune.config_objective import space_timesteps
from finetune.config_types import Count, CountOrZero, Fraction, Positive, PositiveOrZero, Words, section

if TYPE_CHECKING:
    from finetune.config_objective import DDPM, EDM, Flow

SAMPLERS = {
    "ddpm": ("ddpm", "ddim", "dpmsolver++", "unipc", "euler", "euler_ancestral", "heun"),
    "edm": ("edm_heun", "edm_euler", "edm_dpmsolver++"),
    "flow": ("flow_euler", "flow_heun"),
}
"""objective.kind -> the samplers that remove its noise; the first is the default."""

ALL_SAMPLERS = sum(SAMPLERS.values(), ())
"""Those of any other objective.kind, of which it is known when it is built what fits."""

USED_BY = {
    "respacing": ("ddpm", "ddim"),
    "eta": ("ddim",),
    **dict.fromkeys(("s_churn", "s_tmin", "s_tmax", "s_noise"), ("edm_euler", "edm_heun")),
}
"""Setting -> the samplers that use it; what is not listed here, all use."""

CLIPPING = ("ddpm", "ddim", "heun")
"""Samplers that can clip the predicted clean sample."""

FEW_STEPS = ("dpmsolver++", 25)
"""Sampler and steps of a pretrained model that nothing else is said of (Lu et al. 2022 call 15 to 20 steps enough)."""

GUIDANCE = 7.5  # of a pretrained model of text, as in diffusers' StableDiffusionPipeline

DEFAULT_STEPS = 50  # of EDM and rectified flow, as generative-models' toys; of a DDPM, all timesteps that are trained


@section
class Sampling:
    """What a sampler is told. An exported pipeline carries these as defaults of its call."""

    num_inference_steps: Count | None = None
    """Sampling steps; unset: every timestep that is trained for objective.kind ddpm (1000 as in train_unconditional),
    50 for the others; 25 of dpmsolver++ for a pretrained model in latent space."""
    respacing: str | None = None
    """Timesteps of ddpm and ddim, in place of num_inference_steps: "250", "ddim50" or "10,20,30" (as
    objective.respacing); unset: num_inference_steps of those that are trained, evenly and with the last."""
    eta: Fraction = 0.0
    """Noise of ddim: 0 is deterministic, 1 has the variance of ddpm's posterior (Song et al. 2021)."""
    s_churn: PositiveOrZero = 0.0
    """Noise that edm_euler and edm_heun add, spread over num_inference_steps (Karras et al. 2022, algorithm 2)."""
    s_tmin: PositiveOrZero = 0.0
    """Smallest sigma at which s_churn acts."""
    s_tmax: Positive | None = None
    """Largest sigma at which s_churn acts; unset: no limit."""
    s_noise: Positive = 1.0
    """Standard deviation of the noise of s_churn (1.003 and 1.007 in the paper)."""
    guidance_scale: PositiveOrZero = 1.0
    """Classifier-free guidance; 1 is none. Needs a condition trained with dropout, or sample.autoguidance."""
    guidance_rescale: Fraction = 0.0
    """Share of the guided output's standard deviation that is set back to the unguided one's (Lin et al. 2023: 0.7)."""
    guidance_interval: tuple[PositiveOrZero, ...] | None = None
    """[low, high]: guide only where low < noise-to-signal ratio sigma / alpha <= high, EDM's sigma (Kynkäänniemi et al.
    2024); elsewhere the network is evaluated once, unguided. Unset: everywhere."""

    def __post_init__(self) -> None:
        if self.respacing is not None and self.num_inference_steps is not None:
            raise ValueError(
                f"respacing ({self.respacing}) says which timesteps are visited, num_inference_steps "
                f"({self.num_inference_steps}) how many: give one of them"
            )
        interval = self.guidance_interval
        if interval is not None and not (len(interval) == 2 and interval[0] < interval[1]):
            raise ValueError(f"guidance_interval needs two numbers, low below high, got {list(interval)}")
        if self.s_tmax is not None and self.s_tmin > self.s_tmax:
            raise ValueError(f"s_tmin must not exceed s_tmax, got {self.s_tmin:g} > {self.s_tmax:g}")


@section
class Sample(Sampling):
    """Pictures drawn from the (averaged) weights while training and at its end, with fixed seeds."""

    sample_every: Count | None = None
    """Optimizer steps between two grids; unset: at the end only."""
    at_start: bool = False
    """Draw a grid before the first step too: what a pretrained model makes of the prompts by itself."""
    num_images: Count = 16
    """Images of a grid (16 as in train_unconditional); prompts and labels are repeated to fill it."""
    prompts: Words = ()
    """Prompts of a text-conditioned model."""
    class_labels: tuple[CountOrZero, ...] = ()
    """Labels of a class-conditioned model; empty: each class in turn."""
    scheduler: (
        Literal[
            "ddpm", "ddim", "dpmsolver++", "unipc", "euler", "euler_ancestral", "heun",
            "edm_euler", "edm_heun", "edm_dpmsolver++", "flow_euler", "flow_heun",
        ]
        | None
    ) = None  # fmt: skip
    """Sampler, saved in the exported pipeline: edm_... for objective.kind edm, flow_... for flow, the rest for ddpm;
    unset: ddpm, edm_heun or flow_euler; dpmsolver++ for a pretrained model in latent space."""
    guidance_scale: PositiveOrZero | None = None
    """Classifier-free guidance; 1 is none. Needs a condition trained with dropout, or sample.autoguidance. Unset: 7.5
    for a pretrained model of text in latent space, as in diffusers' pipelines, else 1."""
    autoguidance: str | None = None
    """Guide by a weaker version of the model in place of the unconditional case (Karras et al. 2024): a run, a pipeline
    or UNet folder, or a checkpoint step-... of a run with the same UNet."""
    sample_seed: CountOrZero = 0
    """Seed of the first image; the next images take the next seeds."""


def trained_timesteps(num_train_timesteps: int, respacing: str | None) -> tuple[int, ...]:
    """The timesteps that an objective trains, ascending; respacing: objective.respacing."""
    return tuple(range(num_train_timesteps)) if respacing is None else space_timesteps(num_train_timesteps, respacing)


def visited_timesteps(settings: Sampling, num_train_timesteps: int, trained: tuple[int, ...]) -> tuple[int, ...]:
    """The timesteps that ddpm and ddim visit, ascending.

    num_inference_steps are trailing ones: the last trained level is where pure noise is (Lin et al. 2023, section 3.3).
    Raises ValueError for more than are trained, or others.
    """
    if settings.respacing is None:
        steps = settings.num_inference_steps or len(trained)
        if steps > len(trained):
            raise ValueError(f"num_inference_steps must lie in 1..{len(trained)} (the timesteps trained), got {steps}")
        return tuple(trained[round(len(trained) * i / steps) - 1] for i in range(1, steps + 1))
    try:
        kept = space_timesteps(num_train_timesteps, settings.respacing)
    except ValueError as error:
        raise ValueError(f"respacing: {error}") from None
    if strangers := sorted(set(kept) - set(trained)):
        raise ValueError(
            f"respacing {settings.respacing} visits timestep {strangers[0]}, which objective.respacing does not train: "
            "leave it out, or choose a part of what is trained"
        )
    return kept


def misfit(sampler: str, *, prediction_type: str, zero_snr: bool) -> str | None:
    """Why a sampler of objective.kind ddpm cannot sample this prediction and schedule, or None."""
    if sampler == "euler_ancestral" and prediction_type == "sample":
        return "euler_ancestral cannot sample prediction_type sample: use another one"
    if sampler == "heun" and zero_snr:
        return "heun cannot start at zero terminal SNR (rescale_betas_zero_snr), where sigma is infinite: use ddim"
    return None


def unused(sampler: str, settings: Sampling) -> Iterator[tuple[str, str]]:
    """(setting, problem) for every setting that is given and that would do nothing."""
    values, defaults = asdict(settings), asdict(Sampling())
    given = {name for name, default in defaults.items() if values[name] != default}
    for name, samplers in USED_BY.items():
        if name in given and sampler not in samplers:
            yield name, f"{sampler} does not use it, only {' and '.join(samplers)}: remove it, or change the sampler"
        elif name in given & {"s_tmin", "s_tmax", "s_noise"} and not settings.s_churn:
            yield name, "it is about the noise of s_churn, which is 0: set s_churn, or remove it"
    for name in sorted(given & {"guidance_rescale", "guidance_interval"}):
        if settings.guidance_scale in (0.0, 1.0):
            yield name, f"it changes guidance, and guidance_scale {settings.guidance_scale:g} is none: remove it"


def few_steps_suit(objective: DDPM | EDM | Flow) -> bool:
    """Whether the sampler of FEW_STEPS can sample what is trained."""
    return objective.kind == "ddpm" and objective.respacing is None and not objective.clip_sample


def sampler_of(sample: Sample, kind: str, *, few_steps: bool = False) -> str:
    """sample.scheduler, or the default of objective.kind, or of FEW_STEPS."""
    return sample.scheduler or (FEW_STEPS[0] if few_steps else SAMPLERS.get(kind, ALL_SAMPLERS)[0])


def steps_of(sample: Sample, objective: DDPM | EDM | Flow, *, few_steps: bool = False) -> int:
    """How many steps the sampler takes; few_steps: of FEW_STEPS if nothing else is said."""
    objective = objective.filled() if objective.kind == "ddpm" else objective  # what is left open, as for a new model
    if sample.respacing is not None and objective.kind == "ddpm":
        return len(space_timesteps(objective.num_train_timesteps, sample.respacing))
    if sample.num_inference_steps is not None:
        return sample.num_inference_steps
    if objective.kind != "ddpm":
        return DEFAULT_STEPS
    if few_steps and sampler_of(sample, objective.kind, few_steps=True) == FEW_STEPS[0]:
        return min(FEW_STEPS[1], objective.num_train_timesteps)
    return len(trained_timesteps(objective.num_train_timesteps, objective.respacing))


def contradictions(
    sample: Sample, objective: DDPM | EDM | Flow, *, few_steps: bool = False
) -> Iterator[tuple[str, str]]:
    """Rules between the sampler and the objective, as (place, problem) pairs."""
    sampler, kind = sampler_of(sample, objective.kind, few_steps=few_steps), objective.kind
    if sampler not in (fits := SAMPLERS.get(kind, ALL_SAMPLERS)):
        fitting = ", ".join(fits)
        yield "sample.scheduler", f"{sampler} does not remove the noise of objective.kind {kind}: use one of {fitting}"
        return
    yield from ((f"sample.{name}", problem) for name, problem in unused(sampler, sample))
    if sample.autoguidance is not None and sample.guidance_scale == 1:
        yield "sample.autoguidance", "guidance_scale 1 is no guidance: raise it, or remove autoguidance"
    if kind != "ddpm":
        return
    zero_snr = objective.rescale_betas_zero_snr
    if problem := misfit(sampler, prediction_type=objective.prediction_type, zero_snr=zero_snr):
        yield "sample.scheduler", problem
    if objective.clip_sample and sampler not in CLIPPING:
        yield "sample.scheduler", (
            f"{sampler} does not clip, but objective.clip_sample is true: use {', '.join(CLIPPING)}, or remove it"
        )
    if sampler not in USED_BY["respacing"] and objective.respacing is not None:
        yield "sample.scheduler", (
            f"{sampler} visits timesteps that objective.respacing {objective.respacing} does not train: use ddpm or "
            "ddim"
        )
    trained = trained_timesteps(objective.num_train_timesteps, objective.respacing)
    if sample.num_inference_steps is not None and sample.num_inference_steps > len(trained):
        place = "objective.num_train_timesteps" if objective.respacing is None else "what objective.respacing keeps,"
        yield "sample.num_inference_steps", f"{sample.num_inference_steps} steps are more than {place} {len(trained)}"
    elif sampler in USED_BY["respacing"]:
        try:
            visited_timesteps(sample, objective.num_train_timesteps, trained)
        except ValueError as error:
            yield "sample.respacing", str(error)

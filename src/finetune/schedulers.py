"""The scheduler of a pipeline: the noise of training in the sampler's class, and what diffusers' classes cannot do.

Which sampler goes with which objective and which setting stands in config_sample.py.
"""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from finetune.config import TrainConfig
from finetune.config_sample import CLIPPING, SAMPLERS, misfit
from finetune.errors import ConfigError
from finetune.objective.prediction import Prediction
from finetune.objective.process import Process, RectifiedFlow, VarianceExploding
from finetune.space import PixelSpace, Space

SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "variance_type": None}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
}
"""sample.scheduler -> class and the arguments in which it differs from the training scheduler."""

ODE = (EDMEulerScheduler, FlowMatchEulerDiscreteScheduler)
"""The schedulers that name a process and its levels only; the steps are those of samplers.py."""

KEPT = (DDPMScheduler, DDIMScheduler)
"""The schedulers whose steps samplers.py has too, for any kept timesteps."""

ODE_SCHEDULERS = {
    "edm_euler": "euler",
    "edm_heun": "heun",
    "edm_dpmsolver++": "dpmsolver++",
    "flow_euler": "euler",
    "flow_heun": "heun",
}
"""sample.scheduler of EDM and of rectified flow -> the solver."""


def process_of(scheduler: SchedulerMixin) -> tuple[Process, Prediction]:
    """The process and the prediction that a scheduler of ODE was trained with."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return RectifiedFlow(), Prediction("flow")
    config = scheduler.config
    # diffusers calls EDM's own parametrisation epsilon.
    kind = "edm" if config.prediction_type == "epsilon" else config.prediction_type
    return VarianceExploding(config.sigma_data), Prediction(kind, sigma_data=config.sigma_data)


def name_of(scheduler: SchedulerMixin, solver: str) -> str:
    """The sampler, as sample.scheduler calls it; the class name of a scheduler that it has no name for."""
    if isinstance(scheduler, ODE):
        return f"{_family(scheduler)}_{solver}"
    return next((name for name, (cls, _) in SCHEDULERS.items() if type(scheduler) is cls), type(scheduler).__name__)


def _family(scheduler: SchedulerMixin) -> str:
    """objective.kind."""
    if isinstance(scheduler, ODE):
        return "edm" if isinstance(scheduler, EDMEulerScheduler) else "flow"
    return "ddpm"


def sampling_scheduler(training: SchedulerMixin, cfg: TrainConfig, space: Space) -> SchedulerMixin:
    """cfg's sampler for the noise of the training scheduler, checked for the steps that it takes."""
    explicit = cfg.objective.clip_sample if cfg.objective.kind == "ddpm" else None
    clip = isinstance(space, PixelSpace) if explicit is None else explicit
    scheduler = with_scheduler(training, cfg.sampler, clip_sample=clip)
    if not isinstance(scheduler, KEPT):
        check_steps(scheduler, cfg.sampling_steps)
    return scheduler


def with_scheduler(training: SchedulerMixin, name: str, *, clip_sample: bool) -> SchedulerMixin:
    """The scheduler of the sampler `name` with the noise, prediction type and zero-SNR setting of `training`.

    Trailing timesteps: sampling starts at the last level that was trained, as its initial pure noise demands (Lin et
    al. 2023, section 3.3). steps_offset is 1 because StableDiffusionPipeline rewrites any other; it is not used.
    Raises ConfigError if the sampler removes another noise, or cannot sample the prediction type or zero SNR.
    """
    family = _family(training)
    if name not in SAMPLERS[family]:
        fitting = ", ".join(SAMPLERS[family])
        raise ConfigError(f"{name} does not remove the noise of objective.kind {family}: use one of {fitting}")
    if isinstance(training, ODE):
        return type(training).from_config(training.config)
    (cls, arguments), config = SCHEDULERS[name], training.config
    zero_snr = config.get("rescale_betas_zero_snr", False)
    if problem := misfit(name, prediction_type=config.prediction_type, zero_snr=zero_snr):
        raise ConfigError(problem)
    if name in CLIPPING:
        arguments = arguments | {"clip_sample": clip_sample}
    if config.beta_schedule == "sigmoid" and cls is not DDPMScheduler:  # the only class that knows it
        arguments = arguments | {"trained_betas": training.betas.tolist()}
    # Named, because from_config replaces what is the default of one class by the default of the other.
    noise = {each: config[each] for each in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")}
    return cls.from_config(config, timestep_spacing="trailing", steps_offset=1, **noise | arguments)


def is_stock(scheduler: SchedulerMixin, cfg: TrainConfig) -> bool:
    """Whether the pipelines of diffusers sample with this scheduler what cfg trains and asks for.

    They give the network the timestep itself, and know neither kept timesteps nor the further options of guidance.
    """
    objective, sample = cfg.objective, cfg.sample
    options = (sample.respacing, sample.eta, sample.guidance_rescale, sample.guidance_interval, sample.autoguidance)
    if objective.kind != "ddpm" or any(options) or objective.respacing is not None:
        return False
    if objective.rescale_timesteps and objective.num_train_timesteps != 1000:
        return False
    if isinstance(scheduler, KEPT):
        try:
            check_steps(scheduler, cfg.sampling_steps)
        except ConfigError:
            return False
    return objective.variance.kind != "learned_range" or isinstance(scheduler, DDPMScheduler)


def stable_diffusion_steps_so(scheduler: SchedulerMixin, cfg: TrainConfig) -> bool:
    """Whether StableDiffusionPipeline guides and steps with this scheduler as UNetPipeline does.

    It ignores guidance below 1, guides a learned variance too, and cannot tell ddim that clipping changes the noise.
    """
    clipped = isinstance(scheduler, DDIMScheduler) and scheduler.config.clip_sample
    return cfg.sample.guidance_scale >= 1 and cfg.objective.variance.kind != "learned_range" and not clipped


def check_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Raises ConfigError if the scheduler would itself take other steps than the `steps` asked for."""
    total = scheduler.config.num_train_timesteps
    if not 1 <= steps <= total:
        raise ConfigError(f"num_inference_steps must lie in 1..{total} (num_train_timesteps), got {steps}")
    if isinstance(scheduler, DDIMScheduler) and scheduler.config.timestep_spacing != "leading" and total % steps:
        # It steps to t - total // steps whatever the next timestep is.
        below = max(n for n in range(1, steps) if total % n == 0)
        above = min(n for n in range(steps, total + 1) if total % n == 0)
        raise ConfigError(
            f"ddim needs a num_inference_steps that divides num_train_timesteps {total}, got {steps}: "
            f"use {below} or {above}, or another scheduler"
        )
    if isinstance(scheduler, ODE):
        return
    if isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type != "fixed_small" and steps != total:
        # The last of fewer steps does not end at timestep 0, and DDPMScheduler then adds noise to the image.
        raise ConfigError(
            f"DDPMScheduler with variance_type {scheduler.config.variance_type} needs all {total} steps, got {steps}: "
            "use these, or `--scheduler ddpm` of `finetune sample`, which has steps of its own"
        )
    probe = type(scheduler).from_config(scheduler.config)
    probe.set_timesteps(steps)
    if not 0 <= float(probe.timesteps.min()) <= float(probe.timesteps.max()) <= total - 1:
        # "trailing" rounds to one timestep more, -1, for some numbers; "leading" with an offset runs over the end.
        raise ConfigError(
            f"num_inference_steps {steps} gives {type(scheduler).__name__} a timestep outside 0..{total - 1}: "
            f"use {steps - 1}, or another number"
        )
    if isinstance(probe, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler) and (probe.sigmas.diff() > 0).any():
        # With zero terminal SNR diffusers caps the first sigma at 4096, and the second may exceed it: noise or NaN.
        raise ConfigError(
            f"num_inference_steps {steps} is too many for {type(scheduler).__name__} with zero terminal SNR, its noise "
            f"levels would not fall: use {max(1, total // 4)} or fewer, or another scheduler"
        )

"""The scheduler of a pipeline: which samplers fit an objective, and what they cannot do."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from finetune.config import TrainConfig
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
}
"""sample.scheduler -> class and the arguments in which it differs from the training scheduler."""

ODE = (EDMEulerScheduler, FlowMatchEulerDiscreteScheduler)
"""The schedulers that name a process and its levels only; the steps are those of samplers.py."""

ODE_SCHEDULERS = {"edm_euler": "euler", "edm_heun": "heun", "flow_euler": "euler", "flow_heun": "heun"}
"""sample.scheduler of EDM and of rectified flow -> the solver."""


def process_of(scheduler: SchedulerMixin) -> tuple[Process, Prediction]:
    """The process and the prediction that a scheduler of ODE was trained with."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return RectifiedFlow(), Prediction("flow")
    config = scheduler.config
    # diffusers calls EDM's own parametrisation epsilon.
    kind = "edm" if config.prediction_type == "epsilon" else config.prediction_type
    return VarianceExploding(config.sigma_data), Prediction(kind, sigma_data=config.sigma_data)


def check_family(training: SchedulerMixin, name: str) -> None:
    """Raises ConfigError if the sampler `name` removes another kind of noise than `training` added."""
    if isinstance(training, ODE):
        family = "edm" if isinstance(training, EDMEulerScheduler) else "flow"
        fitting = [each for each in ODE_SCHEDULERS if each.startswith(family)]
    else:
        family, fitting = "ddpm", list(SCHEDULERS)
    if name not in fitting:
        raise ConfigError(
            f"sample.scheduler {name} does not remove the noise of objective.kind {family}: use {' or '.join(fitting)}"
        )


def sampling_scheduler(training: SchedulerMixin, cfg: TrainConfig, space: Space) -> SchedulerMixin:
    """cfg.sample.scheduler for the noise of the training scheduler, checked for cfg.sample.num_inference_steps."""
    if isinstance(training, ODE):
        scheduler = with_scheduler(training, cfg.sample.scheduler, clip_sample=False)
        check_steps(scheduler, cfg.sample.num_inference_steps)
        return scheduler
    explicit = None
    if cfg.objective.kind == "ddpm":
        check_objective(cfg)
        explicit = cfg.objective.clip_sample
    clip = isinstance(space, PixelSpace) if explicit is None else explicit
    if explicit and cfg.sample.scheduler not in ("ddpm", "ddim"):
        raise ConfigError(
            f"objective.clip_sample true needs sample.scheduler ddpm or ddim, {cfg.sample.scheduler} does not clip: "
            "change one of them"
        )
    scheduler = with_scheduler(training, cfg.sample.scheduler, clip_sample=clip)
    check_steps(scheduler, cfg.sample.num_inference_steps)
    return scheduler


def check_objective(cfg: TrainConfig) -> None:
    """Raises ConfigError for a DDPM that no sampler here samples as it was trained."""
    objective, sample = cfg.objective, cfg.sample
    if objective.respacing is not None:
        raise ConfigError(
            "objective.respacing trains few timesteps, and no sample.scheduler visits exactly these: remove it"
        )
    if objective.rescale_timesteps and objective.num_train_timesteps != 1000:
        raise ConfigError(
            "objective.rescale_timesteps gives the network t * 1000 / num_train_timesteps, but the samplers give it t: "
            "remove it, or use num_train_timesteps 1000"
        )
    variance, total = objective.variance.kind, objective.num_train_timesteps
    if variance == "learned_range" and sample.scheduler != "ddpm":
        raise ConfigError(f"objective.variance.kind learned_range needs sample.scheduler ddpm, got {sample.scheduler}")
    if variance == "learned_range" and sample.guidance_scale not in (0.0, 1.0):
        raise ConfigError("sample.guidance_scale must be 1 with objective.variance.kind learned_range, "
                          f"got {sample.guidance_scale}: the variance cannot be guided")  # fmt: skip
    if variance != "fixed_small" and sample.scheduler == "ddpm" and sample.num_inference_steps != total:
        # The last of fewer steps does not end at timestep 0, and DDPMScheduler then adds noise to the image.
        raise ConfigError(
            f"sample.scheduler ddpm with objective.variance.kind {variance} needs all {total} steps, got "
            f"sample.num_inference_steps {sample.num_inference_steps}"
        )


def with_scheduler(training: SchedulerMixin, name: str, *, clip_sample: bool) -> SchedulerMixin:
    """The scheduler `name` of SCHEDULERS with the noise, prediction type and zero-SNR setting of `training`.

    Trailing timesteps: sampling starts at the last level that was trained, as its initial pure noise demands (Lin et
    al. 2023, section 3.3). steps_offset is 1 because StableDiffusionPipeline rewrites any other; it is not used.
    """
    check_family(training, name)
    if isinstance(training, ODE):
        return type(training).from_config(training.config)
    cls, arguments = SCHEDULERS[name]
    if name == "euler_ancestral" and training.config.prediction_type == "sample":
        raise ConfigError("sample.scheduler euler_ancestral cannot sample prediction_type sample: use another one")
    if "clip_sample" in inspect.signature(cls).parameters:
        arguments = arguments | {"clip_sample": clip_sample}
    return cls.from_config(training.config, timestep_spacing="trailing", steps_offset=1, **arguments)


def check_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Raises ConfigError if the scheduler would take other steps than the `steps` asked for."""
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

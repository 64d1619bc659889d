"""From pure noise to x0: the sampler of a scheduler, run with the network that was trained."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from pydantic import ValidationError
from torch import Tensor

from finetune.config_sample import DEFAULT_STEPS, Sampling, trained_timesteps, unused, visited_timesteps
from finetune.errors import ConfigError
from finetune.guidance import Guided
from finetune.objective.likelihood import Posterior, VarianceType
from finetune.objective.prediction import Prediction
from finetune.objective.process import NoiseProcess, VarianceExploding
from finetune.samplers import SOLVERS, Churn, ancestral, ddim, flow_sigmas, karras_sigmas
from finetune.schedulers import KEPT, ODE, check_steps, name_of, process_of

Generators = torch.Generator | list[torch.Generator] | None


def overridden(defaults: Sampling, **given: Any) -> Sampling:
    """`defaults` with what is given and not None; steps and respacing replace each other. Raises ConfigError."""
    given = {name: value for name, value in given.items() if value is not None}
    values = asdict(defaults)
    if given.keys() & {"num_inference_steps", "respacing"}:
        values |= {"num_inference_steps": None, "respacing": None}
    try:
        return Sampling(**(values | given))
    except ValidationError as error:
        problems = [": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()]
        raise ConfigError("\n".join(problems)) from error


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A scheduler, what the network behind it was trained with, and what the sampler is told."""

    scheduler: SchedulerMixin
    settings: Sampling
    solver: str = "euler"
    """One of samplers.SOLVERS, of a scheduler of EDM or rectified flow."""
    trained_respacing: str | None = None
    """objective.respacing."""
    rescale_timesteps: bool = False
    """objective.rescale_timesteps."""

    @cached_property
    def name(self) -> str:
        """As sample.scheduler calls it."""
        return name_of(self.scheduler, self.solver)

    def check(self) -> None:
        """Raises ConfigError for a setting that the sampler does not use, and for steps that it cannot take."""
        if problems := [f"{setting}: {problem}" for setting, problem in unused(self.name, self.settings)]:
            raise ConfigError("\n".join(problems))
        steps, config = self.steps, self.scheduler.config
        if not isinstance(self.scheduler, KEPT):
            if self.trained_respacing is not None:
                raise ConfigError(
                    f"{self.name} visits timesteps that were not trained (objective.respacing "
                    f"{self.trained_respacing}): use ddpm or ddim"
                )
            check_steps(self.scheduler, steps)
        elif config.get("thresholding"):
            raise ConfigError("dynamic thresholding is not supported: set the scheduler's thresholding to false")
        elif self.name == "ddpm" and config.variance_type not in get_args(VarianceType):
            known = ", ".join(get_args(VarianceType))
            raise ConfigError(f"the scheduler has variance_type {config.variance_type}: it must be one of {known}")

    @cached_property
    def timesteps(self) -> tuple[int, ...]:
        """What ddpm and ddim visit, ascending. Raises ConfigError."""
        total = self.scheduler.config.num_train_timesteps
        try:
            return visited_timesteps(self.settings, total, trained_timesteps(total, self.trained_respacing))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def steps(self) -> int:
        """How many steps are taken."""
        if isinstance(self.scheduler, KEPT):
            return len(self.timesteps)
        default = DEFAULT_STEPS if isinstance(self.scheduler, ODE) else self.scheduler.config.num_train_timesteps
        return self.settings.num_inference_steps or default

    @property
    def evaluations(self) -> int:
        """How often the network is asked."""
        return 2 * self.steps - 1 if self.name.endswith("heun") else self.steps

    def __call__(self, network: Guided, x: Tensor, generator: Generators = None) -> Tensor:
        """Pure noise x [B, C, H, W], float32 -> x0. generator: one, or one per image, of all further noise."""

        def noise() -> Tensor:
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)

        if isinstance(self.scheduler, KEPT):
            return self._reverse(network, x, noise)
        if isinstance(self.scheduler, ODE):
            return self._flow(network, x, noise)
        return self._stepped(network, x, generator)

    def _process(self, kept: tuple[int, ...] | None = None) -> NoiseProcess:
        return NoiseProcess.from_scheduler(self.scheduler, kept=kept, rescale_timesteps=self.rescale_timesteps)

    def _reverse(self, network: Guided, x: Tensor, noise: Any) -> Tensor:
        """The steps of samplers.py over the kept timesteps."""
        config, channels = self.scheduler.config, x.shape[1]
        process, prediction = self._process(self.timesteps), Prediction(config.prediction_type)

        def predict(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor | None]:
            alpha, sigma, time = process(level)
            output = network(x, time[0].to(x.device), float(sigma / alpha))
            x0 = prediction.x0(x, output[:, :channels], alpha, sigma)
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x0
            return x0, output[:, channels:]

        if isinstance(self.scheduler, DDIMScheduler):
            return ddim(predict, x, process, eta=self.settings.eta, noise=noise)
        return ancestral(predict, x, Posterior(process, config.variance_type), noise)

    def _flow(self, network: Guided, x: Tensor, noise: Any) -> Tensor:
        """The probability flow of EDM or rectified flow."""
        process, prediction = process_of(self.scheduler)
        config, given = self.scheduler.config, self.settings
        if isinstance(process, VarianceExploding):
            sigmas = karras_sigmas(self.steps, sigma_min=config.sigma_min, sigma_max=config.sigma_max, rho=config.rho)
        else:
            sigmas = flow_sigmas(self.steps, shift=config.shift)
        churn = {}
        if given.s_churn:
            s_tmax = math.inf if given.s_tmax is None else given.s_tmax
            further = {"s_churn": given.s_churn, "s_tmin": given.s_tmin, "s_tmax": s_tmax, "s_noise": given.s_noise}
            churn = {"churn": Churn(noise=noise, **further)}

        def denoise(x: Tensor, level: Tensor) -> Tensor:
            alpha, sigma, time = process(level[None])
            output = network(process.scale_input(x, sigma), time[0].to(x.device), float(sigma / alpha))
            return prediction.x0(x, output, alpha, sigma)

        return SOLVERS[self.solver](denoise, x * float(sigmas[0]), sigmas, **churn)

    def _stepped(self, network: Guided, x: Tensor, generator: Generators) -> Tensor:
        """The steps of the scheduler itself."""
        scheduler, channels, process = self.scheduler, x.shape[1], self._process()
        scheduler.set_timesteps(self.steps, device=x.device)
        takes = inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if "generator" in takes else {}
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            alpha, sigma, time = process(t.long().cpu()[None])
            time = time[0].to(x.device) if self.rescale_timesteps else t
            output = network(scheduler.scale_model_input(x, t), time, float(sigma / alpha))
            x = scheduler.step(output[:, :channels], t, x, **options).prev_sample  # without a learned variance
        return x

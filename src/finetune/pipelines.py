"""Sampling: stock diffusers pipelines where they exist, and UNetPipeline for the combinations they do not cover."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from finetune.conditioning import ClassLabel, Condition, Conditioner, PooledText, TextSequence, Unconditional
from finetune.config import TrainConfig
from finetune.errors import ConfigError
from finetune.models import UNet, bind
from finetune.space import LatentSpace, PixelSpace, Space

SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "variance_type": None}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
}
"""sample.scheduler -> class and the arguments in which it differs from the training scheduler."""


class UNetPipeline(DiffusionPipeline):
    """Images from a UNet2DModel or UNet2DConditionModel, in pixels or latents, by class, by text or unconditional.

    The condition and the unconditional case are made by the very classes that made them in training.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        conditioning: str = "none",
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        num_inference_steps: int = 1000,
        guidance_scale: float = 1.0,
    ) -> None:
        """conditioning: none, class_label, pooled_text or text. num_inference_steps, guidance_scale: the defaults."""
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            conditioning=conditioning,
            num_classes=num_classes,
            class_names=class_names,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        *,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw one image per prompt or class label; a single one, or none at all, is drawn batch_size times (once).

        guidance_scale s: unconditional + s (conditional - unconditional), so 1 is no guidance (Ho & Salimans 2022 call
        it 1 + w). generator: one, or one per image, which then do not depend on each other. output_type: pil; pt
        [B, C, H, W] and np [B, H, W, C] in [0, 1]; or latent, x0 before it is decoded. Raises ConfigError for
        arguments that contradict the pipeline or each other.
        """
        wanted, n = self._wanted(prompt, class_labels, batch_size)
        config = self.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = config.guidance_scale if guidance_scale is None else guidance_scale
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ConfigError(f"output_type must be pil, pt, np or latent, got {output_type!r}")
        if config.conditioning == "none" and guidance not in (0, 1):
            raise ConfigError(f"there is no condition to guide with: guidance_scale must be 1, got {guidance}")
        if self.unet.config.out_channels != self.unet.config.in_channels and guidance not in (0, 1):
            raise ConfigError(f"a learned variance cannot be guided: guidance_scale must be 1, got {guidance}")
        if isinstance(generator, list) and len(generator) != n:
            raise ConfigError(f"give one generator, or one per image: got {len(generator)} for {n} images")
        check_steps(self.scheduler, steps)

        network = self._guided(wanted, n, guidance)
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        device = self._execution_device
        self.scheduler.set_timesteps(steps, device=device)
        x = randn_tensor((n, channels, size, size), generator=generator, device=device, dtype=torch.float32)
        x = x * self.scheduler.init_noise_sigma
        options = self._step_options(generator)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = network(self.scheduler.scale_model_input(x, t), t)
            x = self.scheduler.step(output, t, x, **options).prev_sample
        images = x if output_type == "latent" else self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def space(self) -> Space:
        """The space of the UNet's x0."""
        size = self.unet.config.sample_size
        if self.vae is None:
            return PixelSpace(channels=self.unet.config.in_channels, size=size)
        return LatentSpace(self.vae, size=size)

    def conditioner(self) -> Conditioner:
        """What turns prompts or class labels into the UNet's arguments, as in training."""
        match self.config.conditioning:
            case "none":
                return Unconditional()
            case "class_label":
                return ClassLabel(self.config.num_classes, device=self._execution_device)
            case "pooled_text":
                return PooledText(self.text_encoder, self.tokenizer)
            case "text":
                return TextSequence(self.text_encoder, self.tokenizer)
        kinds = "none, class_label, pooled_text or text"
        raise ConfigError(f"conditioning must be {kinds}, got {self.config.conditioning}")

    def _wanted(self, prompt: Any, class_labels: Any, batch_size: int | None) -> tuple[list | None, int]:
        """The prompts or labels, one per image, and the number of images."""
        takes = {"none": None, "class_label": "class_labels"}.get(self.config.conditioning, "prompt")
        for name, value in (("prompt", prompt), ("class_labels", class_labels)):
            if value is not None and name != takes:
                raise ConfigError(f"this pipeline takes {takes or 'no condition'} (conditioning "
                                  f"{self.config.conditioning}), not {name}: leave it out")  # fmt: skip
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if takes is None:
            return None, batch_size or 1
        given = prompt if takes == "prompt" else class_labels
        if given is None:
            raise ConfigError(f"this pipeline needs {takes} (conditioning {self.config.conditioning})")
        if isinstance(given, str | int):
            return [given] * (batch_size or 1), batch_size or 1
        given = list(given)
        if not given or batch_size not in (None, len(given)):
            raise ConfigError(f"batch_size ({batch_size}) must be the number of {takes} ({len(given)}), at least 1")
        return given, len(given)

    def _guided(self, wanted: list | None, n: int, scale: float):
        """network(x, t) -> output, float32, guided by `scale` in one doubled batch."""
        conditioner = self.conditioner()
        if wanted is None or scale == 0:
            return self._network(conditioner.unconditional(n))
        condition = conditioner.condition(wanted)
        if scale == 1:
            return self._network(condition)
        unconditional = conditioner.unconditional(n)
        both = self._network({name: torch.cat([unconditional[name], condition[name]]) for name in condition})

        def network(x: Tensor, t: Tensor) -> Tensor:
            without, with_ = both(torch.cat([x, x]), t).chunk(2)
            return without + scale * (with_ - without)

        return network

    def _network(self, condition: Condition):
        dtype, device = self.unet.dtype, self._execution_device
        condition = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in condition.items()}
        network = bind(self.unet, condition)
        return lambda x, t: network(x.to(dtype), t).float()

    def _step_options(self, generator: Any) -> dict[str, Any]:
        options = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        if isinstance(self.scheduler, DDIMScheduler):
            # Clipping x0 must change the noise it implies too (Nichol & Dhariwal 2021), or x_t-1 is made of two images.
            options["use_clipped_model_output"] = True
        return options

    def _images(self, x0: Tensor, output_type: str) -> Any:
        pixels = (self.space().decode(x0) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        array = pixels.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def build_pipeline(
    unet: UNet, space: Space, conditioner: Conditioner, scheduler: SchedulerMixin, cfg: TrainConfig
) -> DiffusionPipeline:
    """The pipeline around these modules, not copied, on the devices where they are.

    scheduler: the training scheduler; the pipeline's is cfg.sample.scheduler with its noise. Stock DDPMPipeline,
    DDIMPipeline or StableDiffusionPipeline where it samples exactly what was trained, UNetPipeline else. Raises
    ConfigError if cfg.sample asks for what the sampler cannot do.
    """
    sampler = sampling_scheduler(scheduler, cfg, space)
    if isinstance(unet, UNet2DModel) and isinstance(space, PixelSpace) and conditioner.kind == "none":
        # They neither scale the model's input nor the first noise, so they are right for these two schedulers alone.
        if cfg.sample.scheduler == "ddpm":
            return DDPMPipeline(unet, sampler)
        if cfg.sample.scheduler == "ddim":
            return DDIMPipeline(unet, sampler)
    text: dict[str, Any] = {}
    if isinstance(conditioner, PooledText | TextSequence):
        text = {"text_encoder": conditioner.text_encoder, "tokenizer": conditioner.tokenizer}
    if _is_stable_diffusion(unet, space, conditioner):
        check_stable_diffusion_guidance(cfg.sample.guidance_scale)
        return StableDiffusionPipeline(
            vae=space.vae,
            unet=unet,
            scheduler=sampler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **text,
        )
    is_class = isinstance(conditioner, ClassLabel)
    if is_class:
        conditioner.condition(cfg.sample.class_labels)  # refuses a label that is no class
    return UNetPipeline(
        unet=unet,
        scheduler=sampler,
        vae=space.vae if isinstance(space, LatentSpace) else None,
        conditioning=conditioner.kind,
        num_classes=conditioner.num_classes if is_class else None,
        class_names=list(conditioner.class_names) if is_class and conditioner.class_names else None,
        num_inference_steps=cfg.sample.num_inference_steps,
        guidance_scale=cfg.sample.guidance_scale,
        **text,
    )


def sampling_scheduler(training: SchedulerMixin, cfg: TrainConfig, space: Space) -> SchedulerMixin:
    """cfg.sample.scheduler for the noise of the training scheduler, checked for cfg.sample.num_inference_steps."""
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
    """Raises ConfigError for an objective that no sampler here samples as it was trained."""
    objective, sample = cfg.objective, cfg.sample
    if objective.kind != "ddpm":
        raise ConfigError(f"objective.kind {objective.kind} cannot be sampled yet: use ddpm")
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


def check_stable_diffusion_guidance(scale: float) -> None:
    """Raises ConfigError for a guidance that StableDiffusionPipeline would not apply."""
    if scale < 1:
        raise ConfigError(f"StableDiffusionPipeline ignores a guidance_scale below 1, got {scale}: use 1 for none")


def _is_stable_diffusion(unet: UNet, space: Space, conditioner: Conditioner) -> bool:
    """Whether StableDiffusionPipeline would sample what was trained: it has no shift and wants sides divisible by 8."""
    if not (isinstance(unet, UNet2DConditionModel) and isinstance(space, LatentSpace) and conditioner.kind == "text"):
        return False
    return not space.vae.config.shift_factor and space.size * space.factor % 8 == 0

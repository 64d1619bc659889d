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
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from finetune.conditioning import ClassLabel, Condition, Conditioner, PooledText, TextSequence, Unconditional
from finetune.config import TrainConfig
from finetune.errors import ConfigError
from finetune.models import UNet, bind
from finetune.objective.process import VarianceExploding
from finetune.samplers import SOLVERS, flow_sigmas, karras_sigmas
from finetune.schedulers import ODE, ODE_SCHEDULERS, check_steps, process_of, sampling_scheduler, with_scheduler
from finetune.space import LatentSpace, PixelSpace, Space


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
        solver: str = "euler",
    ) -> None:
        """conditioning: none, class_label, pooled_text or text. num_inference_steps, guidance_scale: the defaults.

        solver: euler or heun, with a scheduler of EDM or rectified flow; the others are their own solvers.
        """
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            conditioning=conditioning,
            num_classes=num_classes,
            class_names=class_names,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            solver=solver,
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
        x = randn_tensor((n, channels, size, size), generator=generator, device=device, dtype=torch.float32)
        ode = isinstance(self.scheduler, ODE)
        x = self._solved(network, x, steps) if ode else self._stepped(network, x, steps, generator)
        images = x if output_type == "latent" else self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def _stepped(self, network: Any, x: Tensor, steps: int, generator: Any) -> Tensor:
        """Pure noise x -> x0, by the steps of the scheduler."""
        self.scheduler.set_timesteps(steps, device=x.device)
        x = x * self.scheduler.init_noise_sigma
        options = self._step_options(generator)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = network(self.scheduler.scale_model_input(x, t), t)
            x = self.scheduler.step(output, t, x, **options).prev_sample
        return x

    def _solved(self, network: Any, x: Tensor, steps: int) -> Tensor:
        """Pure noise x -> x0, by the probability flow of the process that was trained."""
        process, prediction = process_of(self.scheduler)
        config = self.scheduler.config
        if isinstance(process, VarianceExploding):
            sigmas = karras_sigmas(steps, sigma_min=config.sigma_min, sigma_max=config.sigma_max, rho=config.rho)
        else:
            sigmas = flow_sigmas(steps, shift=config.shift)

        def denoise(x: Tensor, level: Tensor) -> Tensor:
            alpha, sigma, time = process(level[None])
            output = network(process.scale_input(x, sigma), time[0].to(x.device))
            return prediction.x0(x, output, alpha, sigma)

        return SOLVERS[self.config.solver](denoise, x * float(sigmas[0]), sigmas)

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
    stock = isinstance(unet, UNet2DModel) and "num_attention_heads" not in unet.config  # which diffusers ignores
    if stock and isinstance(space, PixelSpace) and conditioner.kind == "none":
        # They neither scale the model's input nor the first noise, so they are right for these two schedulers alone.
        if cfg.sample.scheduler == "ddpm":
            return DDPMPipeline(unet, sampler)
        if cfg.sample.scheduler == "ddim":
            return DDIMPipeline(unet, sampler)
    text: dict[str, Any] = {}
    if isinstance(conditioner, PooledText | TextSequence):
        text = {"text_encoder": conditioner.text_encoder, "tokenizer": conditioner.tokenizer}
    if _is_stable_diffusion(unet, space, conditioner) and not isinstance(sampler, ODE):
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
        solver=ODE_SCHEDULERS.get(cfg.sample.scheduler, "euler"),
        **text,
    )


def with_sampler(pipeline: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """The same pipeline with the sampler `name`. Raises ConfigError for one that does not fit its noise."""
    pixel = pipeline.components.get("vae") is None
    clip = pipeline.scheduler.config.get("clip_sample", pixel)
    scheduler, solver = with_scheduler(pipeline.scheduler, name, clip_sample=clip), ODE_SCHEDULERS.get(name, "euler")
    unconditional = isinstance(pipeline, DDPMPipeline | DDIMPipeline) or pipeline.config.get("conditioning") == "none"
    if unconditional and pixel:
        if name in ("ddpm", "ddim"):
            return {"ddpm": DDPMPipeline, "ddim": DDIMPipeline}[name](pipeline.unet, scheduler)
        return UNetPipeline(pipeline.unet, scheduler, solver=solver)
    pipeline.register_modules(scheduler=scheduler)
    if isinstance(pipeline, UNetPipeline):
        pipeline.register_to_config(solver=solver)
    return pipeline


def check_stable_diffusion_guidance(scale: float) -> None:
    """Raises ConfigError for a guidance that StableDiffusionPipeline would not apply."""
    if scale < 1:
        raise ConfigError(f"StableDiffusionPipeline ignores a guidance_scale below 1, got {scale}: use 1 for none")


def _is_stable_diffusion(unet: UNet, space: Space, conditioner: Conditioner) -> bool:
    """Whether StableDiffusionPipeline would sample what was trained: it has no shift and wants sides divisible by 8."""
    if not (isinstance(unet, UNet2DConditionModel) and isinstance(space, LatentSpace) and conditioner.kind == "text"):
        return False
    return not space.vae.config.shift_factor and space.size * space.factor % 8 == 0

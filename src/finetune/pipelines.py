"""Sampling: stock diffusers pipelines where they exist, and UNetPipeline for the combinations they do not cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
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

from finetune import guidance
from finetune.autoguidance import load_guide
from finetune.conditioning import ClassLabel, Condition, Conditioner, PooledText, TextSequence, Unconditional
from finetune.config import TrainConfig
from finetune.config_sample import Sampling
from finetune.errors import ConfigError
from finetune.models import UNet, bind
from finetune.sampling import Generators, Sampler, overridden
from finetune.schedulers import ODE_SCHEDULERS, is_stock, sampling_scheduler, stable_diffusion_steps_so
from finetune.space import LatentSpace, PixelSpace, Space

SETTINGS = tuple(each.name for each in fields(Sampling))
"""Names of the settings of sampling, which a pipeline holds as defaults of its call."""


class UNetPipeline(DiffusionPipeline):
    """Images from a UNet2DModel or UNet2DConditionModel, in pixels or latents, by class, by text or unconditional.

    The condition and the unconditional case are made by the very classes that made them in training.
    """

    model_cpu_offload_seq = "text_encoder->guide->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "guide"]

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        guide: UNet2DModel | UNet2DConditionModel | None = None,
        conditioning: str = "none",
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        solver: str = "euler",
        trained_respacing: str | None = None,
        rescale_timesteps: bool = False,
        num_inference_steps: int | None = None,
        respacing: str | None = None,
        eta: float = 0.0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: list[float] | None = None,
    ) -> None:
        """conditioning: none, class_label, pooled_text or text. guide: the weaker network of autoguidance.

        solver: euler or heun, with a scheduler of EDM or rectified flow; the others are their own solvers.
        trained_respacing, rescale_timesteps: as in the objective. The rest are the defaults of the call's arguments of
        these names (config_sample.Sampling).
        """
        super().__init__()
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "guide": guide}
        self.register_modules(unet=unet, scheduler=scheduler, **parts)
        self.register_to_config(
            conditioning=conditioning,
            num_classes=num_classes,
            class_names=class_names,
            solver=solver,
            trained_respacing=trained_respacing,
            rescale_timesteps=rescale_timesteps,
            num_inference_steps=num_inference_steps,
            respacing=respacing,
            eta=eta,
            s_churn=s_churn,
            s_tmin=s_tmin,
            s_tmax=s_tmax,
            s_noise=s_noise,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
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
        generator: Generators = None,
        output_type: str = "pil",
        **further: Any,
    ) -> ImagePipelineOutput:
        """Draw one image per prompt or class label; a single one, or none at all, is drawn batch_size times (once).

        guidance_scale s: weak + s (strong - weak), so 1 is no guidance (Ho & Salimans 2022 call it 1 + w); weak is the
        unconditional case, or the guide with the condition if there is one. generator: one, or one per image, which
        then do not depend on each other. output_type: pil; pt [B, C, H, W] and np [B, H, W, C] in [0, 1]; or latent, x0
        before it is decoded. further: the other settings of config_sample.Sampling, such as eta. What is not given is
        as in the pipeline's config. Raises ConfigError for arguments that contradict the pipeline or each other.
        """
        wanted, n = self._wanted(prompt, class_labels, batch_size)
        sampler = self.sampler(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **further)
        settings, space = sampler.settings, self.space()
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ConfigError(f"output_type must be pil, pt, np or latent, got {output_type!r}")
        if self.config.conditioning == "none" and self.guide is None and settings.guidance_scale not in (0, 1):
            scale = settings.guidance_scale
            raise ConfigError(f"there is no condition to guide with: guidance_scale must be 1, got {scale:g}")
        if isinstance(generator, list) and len(generator) != n:
            raise ConfigError(f"give one generator, or one per image: got {len(generator)} for {n} images")
        sampler.check()

        network = self._guided(wanted, n, settings)
        shape, device = (n, space.channels, space.size, space.size), self._execution_device
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        with self.progress_bar(total=sampler.evaluations) as bar:

            def counted(x: Tensor, time: Tensor, ratio: float) -> Tensor:
                bar.update()
                return network(x, time, ratio)

            x = sampler(counted, x, generator)
        images = x if output_type == "latent" else self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def sampler(self, **given: Any) -> Sampler:
        """The sampler with these settings of config_sample.Sampling; those that are not given are the config's."""
        config = self.config
        defaults = Sampling(**{name: config[name] for name in SETTINGS})
        return Sampler(
            scheduler=self.scheduler,
            settings=overridden(defaults, **given),
            solver=config.solver,
            trained_respacing=config.trained_respacing,
            rescale_timesteps=config.rescale_timesteps,
        )

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

    def _guided(self, wanted: list | None, n: int, settings: Sampling) -> guidance.Guided:
        """The network under the condition, guided as the settings say."""
        conditioner, scale = self.conditioner(), settings.guidance_scale
        condition = conditioner.unconditional(n) if wanted is None else conditioner.condition(wanted)
        alone = self._network(self.unet, condition)
        if scale == 1:
            return guidance.unguided(alone)
        if self.guide is not None:
            pair = guidance.two(self._network(self.guide, condition), alone)
        else:
            unconditional = conditioner.unconditional(n)
            if scale == 0:
                return guidance.unguided(self._network(self.unet, unconditional))
            both = {name: torch.cat([unconditional[name], condition[name]]) for name in condition}
            pair = guidance.doubled(self._network(self.unet, both))
        how = guidance.Guidance(
            scale=scale,
            channels=self.space().channels,
            rescale=settings.guidance_rescale,
            interval=settings.guidance_interval,
        )
        return guidance.guided(alone, pair, how)

    def _network(self, unet: UNet, condition: Condition) -> guidance.Network:
        dtype, device = unet.dtype, self._execution_device
        condition = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in condition.items()}
        network = bind(unet, condition)
        return lambda x, t: network(x.to(dtype), t).float()

    def _images(self, x0: Tensor, output_type: str) -> Any:
        pixels = (self.space().decode(x0) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        array = pixels.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def build_pipeline(
    unet: UNet,
    space: Space,
    conditioner: Conditioner,
    scheduler: SchedulerMixin,
    cfg: TrainConfig,
    *,
    guide: UNet | None = None,
) -> DiffusionPipeline:
    """The pipeline around these modules, not copied, on the devices where they are.

    scheduler: the training scheduler; the pipeline's is cfg.sampler with its noise. guide: the UNet that
    cfg.sample.autoguidance names, if it is loaded already. Stock DDPMPipeline, DDIMPipeline or StableDiffusionPipeline
    where it samples exactly what was trained, UNetPipeline else. Raises ConfigError if cfg.sample asks for what the
    sampler cannot do.
    """
    sampler = sampling_scheduler(scheduler, cfg, space)
    stock = is_stock(sampler, cfg)
    text: dict[str, Any] = {}
    if isinstance(conditioner, PooledText | TextSequence):
        text = {"text_encoder": conditioner.text_encoder, "tokenizer": conditioner.tokenizer}
    if stock and _is_unconditional(unet, space, conditioner):
        # They neither scale the model's input nor the first noise, so they are right for these two schedulers alone.
        if cfg.sampler == "ddpm":
            return DDPMPipeline(unet, sampler)
        if cfg.sampler == "ddim":
            return DDIMPipeline(unet, sampler)
    if stock and _is_stable_diffusion(unet, space, conditioner) and stable_diffusion_steps_so(sampler, cfg):
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
    if guide is None and cfg.sample.autoguidance is not None:
        guide = load_guide(cfg.sample.autoguidance, unet)
    pipeline = UNetPipeline(
        unet=unet,
        scheduler=sampler,
        vae=space.vae if isinstance(space, LatentSpace) else None,
        guide=guide,
        conditioning=conditioner.kind,
        num_classes=conditioner.num_classes if is_class else None,
        class_names=list(conditioner.class_names) if is_class and conditioner.class_names else None,
        **text,
        **_sampling(cfg),
    )
    pipeline.sampler().check()
    return pipeline


def _sampling(cfg: TrainConfig) -> dict[str, Any]:
    """The arguments of UNetPipeline that say how to sample."""
    ddpm, settings = cfg.objective.kind == "ddpm", {k: v for k, v in asdict(cfg.sample).items() if k in SETTINGS}
    return settings | {
        "num_inference_steps": None if cfg.sample.respacing else cfg.sampling_steps,
        "solver": ODE_SCHEDULERS.get(cfg.sampler, "euler"),
        "trained_respacing": cfg.objective.respacing if ddpm else None,
        "rescale_timesteps": ddpm and cfg.objective.rescale_timesteps,
    }


def _is_unconditional(unet: UNet, space: Space, conditioner: Conditioner) -> bool:
    """Whether DDPMPipeline and DDIMPipeline draw this kind; diffusers ignores num_attention_heads, which is ours."""
    plain = isinstance(unet, UNet2DModel) and "num_attention_heads" not in unet.config
    return plain and isinstance(space, PixelSpace) and conditioner.kind == "none"


def _is_stable_diffusion(unet: UNet, space: Space, conditioner: Conditioner) -> bool:
    """Whether StableDiffusionPipeline would sample what was trained: it has no shift and wants sides divisible by 8."""
    if not (isinstance(unet, UNet2DConditionModel) and isinstance(space, LatentSpace) and conditioner.kind == "text"):
        return False
    return not space.vae.config.shift_factor and space.size * space.factor % 8 == 0

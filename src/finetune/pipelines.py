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
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune import guidance
from finetune.autoguidance import load_guide
from finetune.conditioning import Conditioner
from finetune.conditions import Condition
from finetune.config import TrainConfig
from finetune.config_sample import Sampling
from finetune.errors import ConfigError
from finetune.models import UNet, bind
from finetune.pipeline_conditions import condition_settings, conditioner_of, kinds_of, text_modules, wanted_of
from finetune.sampling import Generators, Sampler, overridden
from finetune.schedulers import ODE_SCHEDULERS, is_stock, sampling_scheduler, stable_diffusion_steps_so
from finetune.sdxl_texts import TwoTexts
from finetune.space import LatentSpace, PixelSpace, Space

SETTINGS = tuple(each.name for each in fields(Sampling))
"""Names of the settings of sampling, which a pipeline holds as defaults of its call."""


class UNetPipeline(DiffusionPipeline):
    """Images from a UNet2DModel or UNet2DConditionModel, in pixels or latents, by any of the conditions, or by none.

    The conditions and the unconditional case are made by the very classes that made them in training.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->guide->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "guide"]

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder_2: CLIPTextModel | CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        guide: UNet2DModel | UNet2DConditionModel | None = None,
        conditioning: str = "none",
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        solver: str = "euler",
        zero_nulls: str = "",
        dropped: str | None = None,
        low_res_side: int | None = None,
        chunks: int = 1,
        clip_skip: int | None = None,
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
        """conditioning: none, or class_label, pooled_text, text, low_res, size joined by "+". text_encoder_2,
        tokenizer_2: of the pooled text, if it has its own; of SDXL, its second. guide: the weaker network of
        autoguidance. zero_nulls: the conditions whose absence is zero, not an index or the empty prompt; dropped: those
        that training dropped, which guidance extrapolates from (unset: all; empty: none); both joined by "+".
        low_res_side: of the small image. chunks: of 75 tokens each, in which the text sequence is read; clip_skip:
        layers of the text encoders left out, as in training.

        solver: one of samplers.SOLVERS, with a scheduler of EDM or rectified flow; the others are their own solvers.
        trained_respacing, rescale_timesteps: as in the objective. The rest are the defaults of the call's arguments of
        these names (config_sample.Sampling).
        """
        super().__init__()
        text = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        text |= {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, guide=guide, **text)
        self.register_to_config(conditioning=conditioning, num_classes=num_classes, class_names=class_names)
        self.register_to_config(zero_nulls=zero_nulls, dropped=dropped, low_res_side=low_res_side)
        self.register_to_config(chunks=chunks, clip_skip=clip_skip)
        self.register_to_config(solver=solver, trained_respacing=trained_respacing, rescale_timesteps=rescale_timesteps)
        self.register_to_config(num_inference_steps=num_inference_steps, respacing=respacing, eta=eta)
        self.register_to_config(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
        self.register_to_config(guidance_scale=guidance_scale, guidance_rescale=guidance_rescale)
        self.register_to_config(guidance_interval=guidance_interval)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        *,
        image: Any = None,
        noise_augmentation: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        **further: Any,
    ) -> ImagePipelineOutput:
        """Draw one image per prompt, class label or small image; a single one, or none, is drawn batch_size times.

        image: of super-resolution, as `pipeline_conditions.small_images` takes them; noise_augmentation: std of noise
        added to them. original_size, target_size (height, width; unset: those of the image drawn),
        crops_coords_top_left (unset: (0, 0)): as in StableDiffusionXLPipeline.

        guidance_scale s: weak + s (strong - weak), so 1 is no guidance (Ho & Salimans 2022 call it 1 + w); weak is the
        unconditional case, or the guide with the condition if there is one. generator: one, or one per image, which
        then do not depend on each other. output_type: pil; pt [B, C, H, W] and np [B, H, W, C] in [0, 1]; or latent, x0
        before it is decoded. further: the other settings of config_sample.Sampling, such as eta. What is not given is
        as in the pipeline's config. Raises ConfigError for arguments that contradict the pipeline or each other.
        """
        given = {"prompt": prompt, "class_labels": class_labels, "image": image}
        sizes = (original_size, crops_coords_top_left, target_size)
        wanted, n = wanted_of(self, given, sizes, batch_size, noise=noise_augmentation, generator=generator)
        sampler = self.sampler(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **further)
        settings, space = sampler.settings, self.space()
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ConfigError(f"output_type must be pil, pt, np or latent, got {output_type!r}")
        if self.config.conditioning == "none" and self.guide is None and settings.guidance_scale not in (0, 1):
            scale = settings.guidance_scale
            raise ConfigError(f"there is no condition to guide with: guidance_scale must be 1, got {scale:g}")
        if self.config.dropped == "" and self.guide is None and settings.guidance_scale != 1:
            raise ConfigError("guidance needs the unconditional case, which was never trained (condition_dropout 0): "
                              f"guidance_scale must be 1, got {settings.guidance_scale:g}")  # fmt: skip
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
            low_res = "low_res" in kinds_of(self)
            return PixelSpace(channels=self.unet.config.in_channels // (1 + low_res), size=size)
        return LatentSpace(self.vae, size=size)

    def conditioner(self) -> Conditioner:
        """What turns prompts, class labels and the like into the UNet's arguments, as in training."""
        return conditioner_of(self)

    def _guided(self, wanted: Any, n: int, settings: Sampling) -> guidance.Guided:
        """The network under the condition, guided as the settings say."""
        conditioner, scale = self.conditioner(), settings.guidance_scale
        condition = conditioner.unconditional(n) if wanted is None else conditioner.condition(wanted)
        alone = self._network(self.unet, condition)
        if scale == 1:
            return guidance.unguided(alone)
        if self.guide is not None:
            pair = guidance.two(self._network(self.guide, condition), alone)
        else:
            unconditional = conditioner.guided_from(condition)
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
        # Half precision has no room for sizes: bfloat16 makes 1024 of 1023.
        exact = {k for k, v in condition.items() if k == "time_ids" or not v.is_floating_point()}
        condition = {k: v.to(device, None if k in exact else dtype) for k, v in condition.items()}
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
    text = text_modules(conditioner)
    if stock and _is_unconditional(unet, space, conditioner):
        # They neither scale the model's input nor the first noise, so they are right for these two schedulers alone.
        if cfg.sampler == "ddpm":
            return DDPMPipeline(unet, sampler)
        if cfg.sampler == "ddim":
            return DDIMPipeline(unet, sampler)
    if stock and _is_stable_diffusion(unet, space, conditioner) and stable_diffusion_steps_so(sampler, cfg):
        modules = {"vae": space.vae, "unet": unet, "scheduler": sampler, **text}
        if conditioner.kind == "text":
            checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return StableDiffusionPipeline(**modules, **checker)
        zeros = conditioner.parts["text"].null == "zero"
        return StableDiffusionXLPipeline(**modules, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    if guide is None and cfg.sample.autoguidance is not None:
        guide = load_guide(cfg.sample.autoguidance, unet, scheduler)
    pipeline = UNetPipeline(
        unet=unet,
        scheduler=sampler,
        vae=space.vae if isinstance(space, LatentSpace) else None,
        guide=guide,
        **text,
        **_sampling(cfg),
        **condition_settings(conditioner, cfg),
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
    """Whether StableDiffusionPipeline or StableDiffusionXLPipeline would sample what was trained.

    They have no shift, want sides divisible by 8, and guide from an unconditional case that leaves out no layers.
    """
    if not (isinstance(unet, UNet2DConditionModel) and isinstance(space, LatentSpace) and "text" in conditioner.parts):
        return False
    text, parts = conditioner.parts["text"], conditioner.parts
    plain = conditioner.kind == "text" and text.null == "empty_prompt"
    xl = isinstance(text, TwoTexts) and parts.keys() == {"pooled_text", "text", "size"} and not parts["size"].dropout
    if not (plain or xl) or text.clip_skip or text.chunks > 1:
        return False
    return not space.vae.config.shift_factor and space.size * space.factor % 8 == 0

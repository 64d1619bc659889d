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

from finetune.conditioning import Conditioner
from finetune.conditions import Condition
from finetune.config import TrainConfig
from finetune.errors import ConfigError
from finetune.models import UNet, bind
from finetune.objective.process import VarianceExploding
from finetune.pipeline_conditions import condition_settings, conditioner_of, kinds_of, text_modules, wanted_of
from finetune.samplers import SOLVERS, flow_sigmas, karras_sigmas
from finetune.schedulers import ODE, ODE_SCHEDULERS, check_steps, process_of, sampling_scheduler, with_scheduler
from finetune.space import LatentSpace, PixelSpace, Space


class UNetPipeline(DiffusionPipeline):
    """Images from a UNet2DModel or UNet2DConditionModel, in pixels or latents, by any of the conditions, or by none.

    The conditions and the unconditional case are made by the very classes that made them in training.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]

    def __init__(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder_2: CLIPTextModel | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        conditioning: str = "none",
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        num_inference_steps: int = 1000,
        guidance_scale: float = 1.0,
        solver: str = "euler",
        zero_nulls: str = "",
        dropped: str | None = None,
        low_res_side: int | None = None,
    ) -> None:
        """conditioning: none, or class_label, pooled_text, text, low_res, size joined by "+". num_inference_steps,
        guidance_scale: the defaults. text_encoder_2, tokenizer_2: of the pooled text, if it has its own. zero_nulls:
        the conditions whose absence is zero, not an index or the empty prompt; dropped: those that training dropped,
        which guidance extrapolates from (unset: all); both joined by "+". low_res_side: of the small image.

        solver: euler or heun, with a scheduler of EDM or rectified flow; the others are their own solvers.
        """
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(
            conditioning=conditioning,
            num_classes=num_classes,
            class_names=class_names,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            solver=solver,
            zero_nulls=zero_nulls,
            dropped=dropped,
            low_res_side=low_res_side,
        )

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw one image per prompt, class label or small image; a single one, or none, is drawn batch_size times.

        image: of super-resolution, as `pipeline_conditions.small_images` takes them; noise_augmentation: std of noise
        added to them. original_size, target_size (height, width; unset: those of the image drawn),
        crops_coords_top_left (unset: (0, 0)): as in StableDiffusionXLPipeline.

        guidance_scale s: unconditional + s (conditional - unconditional), so 1 is no guidance (Ho & Salimans 2022 call
        it 1 + w). generator: one, or one per image, which then do not depend on each other. output_type: pil; pt
        [B, C, H, W] and np [B, H, W, C] in [0, 1]; or latent, x0 before it is decoded. Raises ConfigError for
        arguments that contradict the pipeline or each other.
        """
        given = {"prompt": prompt, "class_labels": class_labels, "image": image}
        sizes = (original_size, crops_coords_top_left, target_size)
        wanted, n = wanted_of(self, given, sizes, batch_size, noise=noise_augmentation, generator=generator)
        config = self.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = config.guidance_scale if guidance_scale is None else guidance_scale
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ConfigError(f"output_type must be pil, pt, np or latent, got {output_type!r}")
        if config.conditioning == "none" and guidance not in (0, 1):
            raise ConfigError(f"there is no condition to guide with: guidance_scale must be 1, got {guidance}")
        size, channels = self.unet.config.sample_size, self.space().channels
        if self.unet.config.out_channels != channels and guidance not in (0, 1):
            raise ConfigError(f"a learned variance cannot be guided: guidance_scale must be 1, got {guidance}")
        if isinstance(generator, list) and len(generator) != n:
            raise ConfigError(f"give one generator, or one per image: got {len(generator)} for {n} images")
        check_steps(self.scheduler, steps)

        network = self._guided(wanted, n, guidance)
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
            low_res = "low_res" in kinds_of(self)
            return PixelSpace(channels=self.unet.config.in_channels // (1 + low_res), size=size)
        return LatentSpace(self.vae, size=size)

    def conditioner(self) -> Conditioner:
        """What turns prompts, class labels and the like into the UNet's arguments, as in training."""
        return conditioner_of(self)

    def _guided(self, wanted: list | None, n: int, scale: float):
        """network(x, t) -> output, float32, guided by `scale` in one doubled batch."""
        conditioner = self.conditioner()
        condition = {} if wanted is None else conditioner.condition(wanted)
        if wanted is None or scale == 1:
            return self._network(condition)
        unconditional = conditioner.guided_from(condition)
        if scale == 0:
            return self._network(unconditional)
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
    text = text_modules(conditioner)
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
    return UNetPipeline(
        unet=unet,
        scheduler=sampler,
        vae=space.vae if isinstance(space, LatentSpace) else None,
        num_inference_steps=cfg.sample.num_inference_steps,
        guidance_scale=cfg.sample.guidance_scale,
        solver=ODE_SCHEDULERS.get(cfg.sample.scheduler, "euler"),
        **text,
        **condition_settings(conditioner, cfg),
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
    if conditioner.parts["text"].null != "empty_prompt":
        return False
    return not space.vae.config.shift_factor and space.size * space.factor % 8 == 0

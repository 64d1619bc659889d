"""A loaded pipeline with another sampler or with options that diffusers' own pipelines do not have."""

from __future__ import annotations

from dataclasses import asdict

from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, StableDiffusionXLPipeline

from finetune.config_sample import USED_BY, Sampling
from finetune.errors import ConfigError
from finetune.pipelines import UNetPipeline
from finetune.schedulers import ODE_SCHEDULERS, name_of, with_scheduler


def as_unet_pipeline(pipeline: DiffusionPipeline) -> UNetPipeline:
    """A DDPMPipeline, DDIMPipeline, StableDiffusionPipeline or StableDiffusionXLPipeline as a UNetPipeline, which has
    more options."""
    if isinstance(pipeline, UNetPipeline):
        return pipeline
    if isinstance(pipeline, DDPMPipeline | DDIMPipeline):
        return UNetPipeline(pipeline.unet, pipeline.scheduler)
    text = {"text_encoder": pipeline.text_encoder, "tokenizer": pipeline.tokenizer}
    settings = {"conditioning": "text"}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        text |= {"text_encoder_2": pipeline.text_encoder_2, "tokenizer_2": pipeline.tokenizer_2}
        nulls = "pooled_text+text" if pipeline.config.force_zeros_for_empty_prompt else ""
        settings = {"conditioning": "pooled_text+text+size", "dropped": "pooled_text+text", "zero_nulls": nulls}
    return UNetPipeline(pipeline.unet, pipeline.scheduler, vae=pipeline.vae, **settings, **text)


def set_sampler(pipeline: UNetPipeline, name: str) -> None:
    """Exchange the sampler; its defaults for settings that the new one does not use go back to none.

    Raises ConfigError for a sampler that does not fit the noise.
    """
    config, old = pipeline.scheduler.config, name_of(pipeline.scheduler, pipeline.config.solver)
    clip = config.get("clip_sample", pipeline.vae is None)
    scheduler = with_scheduler(pipeline.scheduler, name, clip_sample=clip)
    if name == "ddpm" and config.get("variance_type") is None:  # dpmsolver++ forgets it
        learned = pipeline.unet.config.out_channels > pipeline.space().channels
        scheduler.register_to_config(variance_type="learned_range" if learned else "fixed_small")
    pipeline.register_modules(scheduler=scheduler)
    dropped = {setting for setting, samplers in USED_BY.items() if old in samplers and name not in samplers}
    defaults = asdict(Sampling())
    pipeline.register_to_config(
        solver=ODE_SCHEDULERS.get(name, "euler"), **{setting: defaults[setting] for setting in dropped}
    )


def check_stable_diffusion_guidance(scale: float) -> None:
    """Raises ConfigError for a guidance that StableDiffusionPipeline would not apply."""
    if scale < 1:
        raise ConfigError(f"a Stable Diffusion pipeline ignores a guidance_scale below 1, got {scale}: use 1 for none")

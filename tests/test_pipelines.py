"""Pipelines sample what was trained: an analytic oracle, guidance by hand, round trips, and the choice of the class."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput

from finetune.conditioning import Unconditional
from finetune.config_objective import space_timesteps
from finetune.config_sample import Sampling
from finetune.conversion import as_unet_pipeline, set_sampler
from finetune.errors import ConfigError
from finetune.pipelines import UNetPipeline, build_pipeline
from finetune.sample import generate
from finetune.schedulers import SCHEDULERS, check_steps, with_scheduler
from finetune.space import PixelSpace
from tiny_models import COMBINATIONS, PROMPTS, UNET2D, build, config, parts, scheduler  # noqa: F401

VP = {"kind": "ddpm"}
CLIP = VP | {"clip_sample": True}
RANGE, LARGE = (VP | {"variance": {"kind": kind}} for kind in ("learned_range", "fixed_large"))


def pipeline_of(cfg, **training):
    unet, space, conditioner = build(cfg)
    pipeline = build_pipeline(unet, space, conditioner, scheduler(**training), cfg)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(cfg, **training):
    """A UNetPipeline also where a stock one exists, with the DDPM sampler of the stock one."""
    unet, space, conditioner = build(cfg)
    parts_ = {"vae": space.vae} if cfg.space.kind == "latent" else {}
    if "text" in conditioner.kind:
        parts_ |= {"text_encoder": conditioner.text_encoder, "tokenizer": conditioner.tokenizer}
    clip = cfg.space.kind == "pixel"
    sampler = with_scheduler(scheduler(**training), "ddpm", clip_sample=clip)
    return UNetPipeline(unet, sampler, conditioning=conditioner.kind, num_classes=3, **parts_)


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def conditions(pipeline, n):
    """Prompts or labels for n images."""
    kind = pipeline.config.get("conditioning", "text" if isinstance(pipeline, StableDiffusionPipeline) else "none")
    if kind == "class_label":
        return {"class_labels": [i % 3 for i in range(n)]}
    return {"prompt": [PROMPTS[i % 2] for i in range(n)]} if "text" in kind else {"batch_size": n}


# -- what is sampled ---------------------------------------------------------------------------------------------------


MEAN, STD = 0.1, 0.2


class ExactDenoiser(UNet2DModel):
    """The best prediction for pixels that are independent N(MEAN, STD^2): with x = a x0 + s e,
    E[x0 | x] = MEAN + a STD^2 (x - a MEAN) / (a^2 STD^2 + s^2)."""

    prediction_type = "epsilon"

    def forward(self, sample, timestep, **_):
        abar = scheduler(**self.training_schedule).alphas_cumprod[timestep.long()].double()
        a, s = abar.sqrt(), (1 - abar).sqrt()
        x0 = MEAN + a * STD**2 * (sample - a * MEAN) / (a**2 * STD**2 + s**2)
        e = (sample - a * MEAN) * s / (a**2 * STD**2 + s**2)
        output = e if self.training_schedule["prediction_type"] == "epsilon" else a * e - s * x0
        return UNet2DOutput(sample=output.float())


def exact_denoiser(**schedule):
    shape = {key: value for key, value in UNET2D.items() if key != "kind"}
    unet = ExactDenoiser(sample_size=16, in_channels=3, out_channels=3, **shape)
    unet.training_schedule = {"prediction_type": "epsilon", **schedule}
    return unet


def exact_pipeline(parts, name, steps, **schedule):  # noqa: F811
    objective = {"kind": "ddpm", "clip_sample": False}
    cfg = config(parts, sample={"scheduler": name, "num_inference_steps": steps}, objective=objective)
    unet = exact_denoiser(**schedule)
    training = scheduler(**unet.training_schedule)
    pipeline = build_pipeline(unet, PixelSpace(channels=3, size=16), Unconditional(), training, cfg)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def moments(pipeline, steps):
    pixels = pipeline(batch_size=32, generator=generators(32), num_inference_steps=steps, output_type="pt").images
    assert pixels.shape == (32, 3, 16, 16) or pixels.shape == (32, 16, 16, 3)
    pixels = torch.as_tensor(pixels) * 2 - 1
    return float(pixels.mean()), float(pixels.std())


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(name, schedule) for name in SCHEDULERS for schedule in ({}, ZERO_SNR) if name != "heun" or not schedule],
)
def test_every_sampler_draws_the_data_of_an_exact_denoiser(parts, name, schedule):  # noqa: F811
    steps = {"dpmsolver++": 100, "unipc": 100, "ddpm": 1000}.get(name, 250)  # solvers of second order need fewer
    mean, std = moments(exact_pipeline(parts, name, steps, **schedule), steps)
    # 24,576 values: standard errors 0.0013 and 0.0009; the rest is the error of finite steps
    assert abs(mean - MEAN) < 0.01 and abs(std - STD) < 0.016


def test_the_oracle_sees_a_missing_input_scale(parts, monkeypatch):  # noqa: F811
    pipeline = exact_pipeline(parts, "euler", 100)
    monkeypatch.setattr(pipeline.scheduler, "scale_model_input", lambda x, t: x)
    pipeline.scheduler.is_scale_input_called = True
    mean, std = moments(pipeline, 100)
    assert not (abs(mean - MEAN) < 0.01 and abs(std - STD) < 0.016)


def test_guidance_is_the_formula_in_one_doubled_batch(parts):  # noqa: F811
    pipeline = pipeline_of(config(parts, condition="class_label"))
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    sizes = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    c, u, guided = (pipeline._guided([0, 2], 2, Sampling(guidance_scale=scale))(x, t, 1.0) for scale in (1, 0, 4.0))
    assert sizes == [2, 2, 4]
    torch.testing.assert_close(guided, u + 4 * (c - u), rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(c, pipeline.unet(x, t, torch.tensor([0, 2])).sample)
        torch.testing.assert_close(u, pipeline.unet(x, t, torch.tensor([3, 3])).sample)
    assert (c - u).abs().max() > 1e-4


def latents(pipeline, n=2, **arguments):
    """Images drawn for n conditions with the seeds 0, 1, ..."""
    given = {**conditions(pipeline, n), "generator": generators(n), **arguments}
    return pipeline(**given, output_type="latent").images


def test_an_interval_guides_where_it_says(parts):  # noqa: F811
    pipeline = pipeline_of(config(parts, condition="class_label"))
    none, plain = (latents(pipeline, guidance_scale=scale) for scale in (1.0, 6.0))
    everywhere, nowhere, half = (
        latents(pipeline, guidance_scale=6.0, guidance_interval=interval)
        for interval in ([0.0, 1e9], [1e8, 1e9], [0.0, 1.0])
    )
    torch.testing.assert_close(everywhere, plain, rtol=0, atol=0)
    torch.testing.assert_close(nowhere, none, rtol=0, atol=0)
    assert (half - plain).abs().max() > 1e-3 and (half - none).abs().max() > 1e-3


def test_autoguidance_extrapolates_from_the_guide_with_the_same_condition(parts):  # noqa: F811
    pipeline = pipeline_of(config(parts, condition="class_label"))
    none, plain = (latents(pipeline, guidance_scale=scale) for scale in (1.0, 3.0))
    pipeline.register_modules(guide=copy.deepcopy(pipeline.unet))
    torch.testing.assert_close(latents(pipeline, guidance_scale=3.0), none, rtol=0, atol=1e-4)
    assert (plain - none).abs().max() > 1e-3, "negative control: guidance by the condition"
    with torch.no_grad():
        pipeline.guide.conv_out.weight.mul_(0.5)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        guided = pipeline._guided([0, 2], 2, Sampling(guidance_scale=3.0))(x, t, 1.0)
        weak, strong = (unet(x, t, labels).sample for unet in (pipeline.guide, pipeline.unet))
    torch.testing.assert_close(guided, weak + 3 * (strong - weak))
    unconditional = pipeline_of(config(parts, sample={"scheduler": "euler"}))
    with pytest.raises(ConfigError, match="no condition to guide with"):
        unconditional(guidance_scale=3.0)
    unconditional.register_modules(guide=copy.deepcopy(unconditional.unet))
    none = latents(unconditional)
    torch.testing.assert_close(latents(unconditional, guidance_scale=3.0), none, rtol=0, atol=1e-3)


def test_a_learned_variance_is_not_guided(parts):  # noqa: F811
    cfg = config(parts, condition="class_label", objective=RANGE, sample={"num_inference_steps": 5})
    pipeline = pipeline_of(cfg, variance_type="learned_range")
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    c, u, guided = (pipeline._guided([0, 2], 2, Sampling(guidance_scale=s))(x, t, 1.0) for s in (1, 0, 4.0))
    torch.testing.assert_close(guided[:, :3], (u + 4 * (c - u))[:, :3], rtol=0, atol=1e-5)
    torch.testing.assert_close(guided[:, 3:], c[:, 3:], rtol=0, atol=1e-5)
    assert (c - u)[:, 3:].abs().max() > 1e-4
    assert latents(pipeline, guidance_scale=4.0).isfinite().all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_our_steps_are_those_of_the_stock_pipelines(parts, sampler):  # noqa: F811
    stock = pipeline_of(config(parts, sample={"scheduler": sampler}))
    own = as_unet_pipeline(stock)
    assert type(stock) is not UNetPipeline and type(own) is UNetPipeline
    corrected = {"use_clipped_model_output": True} if sampler == "ddim" else {}
    arguments = {"batch_size": 2, "num_inference_steps": 50, "output_type": "np"}
    theirs = stock(**arguments, **corrected, generator=generators(2)).images
    ours_ = own(**arguments, generator=generators(2)).images
    np.testing.assert_allclose(ours_, theirs, rtol=0, atol=2e-4)  # float32 tables there
    fewer = own(**arguments | {"num_inference_steps": 40}, generator=generators(2)).images
    assert np.abs(fewer - theirs).max() > 0.01


def test_the_network_is_given_the_time_that_it_was_trained_with(parts):  # noqa: F811
    """T = 100 with rescale_timesteps, 20 of them trained: t * 10, also by the schedulers of diffusers."""
    objective = {"kind": "ddpm", "num_train_timesteps": 100, "rescale_timesteps": True}
    trained = [t * 10.0 for t in space_timesteps(100, "20")[::-1]]
    for sample, kept, expected in (
        ({"scheduler": "ddpm", "num_inference_steps": None}, "20", trained),
        ({"scheduler": "ddim", "num_inference_steps": 4}, None, [990.0, 740.0, 490.0, 240.0]),
        ({"scheduler": "ddim", "num_inference_steps": None, "respacing": "3"}, None, [990.0, 500.0, 0.0]),
        ({"scheduler": "dpmsolver++", "num_inference_steps": 4}, None, [990.0, 740.0, 490.0, 240.0]),
    ):
        cfg = config(parts, condition="class_label", objective={**objective, "respacing": kept}, sample=sample)
        pipeline, seen = pipeline_of(cfg, num_train_timesteps=100), []
        pipeline.unet.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(float(inputs[1])))
        pipeline(class_labels=[0])
        assert seen == pytest.approx(expected)


@pytest.mark.parametrize("condition", ["class_label", "pooled_text", "text"])
def test_guidance_1_is_none(parts, condition):  # noqa: F811
    pipeline = pipeline_of(config(parts, condition=condition, model_kind="unet2d_condition"))
    draw = {**conditions(pipeline, 2), "output_type": "latent"}
    one, near, far = (
        pipeline(**draw, generator=generators(2), guidance_scale=s).images for s in (1.0, 1 + 1e-6, 6.0)
    )
    torch.testing.assert_close(one, near, rtol=0, atol=1e-4)
    assert (one - far).abs().max() > 1e-3


def test_stable_diffusion_pipeline_draws_what_ours_draws(parts):  # noqa: F811
    cfg = config(parts, "latent", "text", "unet2d_condition")
    stock, own = pipeline_of(cfg), ours(cfg)
    assert type(stock) is StableDiffusionPipeline
    for guidance in (1.0, 3.0):
        arguments = {"prompt": list(PROMPTS), "num_inference_steps": 5, "guidance_scale": guidance}
        a, b = (p(**arguments, generator=generators(2), output_type="np").images for p in (stock, own))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("space_kind", "condition", "model_kind"), COMBINATIONS)
def test_every_combination_samples_the_same_whatever_the_batch(parts, space_kind, condition, model_kind):  # noqa: F811
    check_batch_independence(ours(config(parts, space_kind, condition, model_kind), prediction_type="sample"))


@pytest.mark.parametrize(("kind", "settings"), [("ddim", {"eta": 1.0}), ("edm_heun", {"s_churn": 4.0})])
def test_further_noise_belongs_to_the_image_too(parts, kind, settings):  # noqa: F811
    objective = {"kind": "edm" if kind == "edm_heun" else "ddpm"}
    cfg = config(parts, condition="class_label", objective=objective, sample={"scheduler": kind, **settings})
    unet, space, conditioner = build(cfg)
    training = EDMEulerScheduler() if kind == "edm_heun" else scheduler()
    pipeline = build_pipeline(unet, space, conditioner, training, cfg)
    pipeline.set_progress_bar_config(disable=True)
    check_batch_independence(pipeline)
    calm = latents(pipeline, **dict.fromkeys(settings, 0.0))
    assert (calm - latents(pipeline)).abs().max() > 0.01, "negative control: the noise is there"


def check_batch_independence(pipeline):
    """Four images at once are those drawn three and one at a time."""
    wanted = conditions(pipeline, 4)
    wanted.pop("batch_size", None)
    arguments = {"num_inference_steps": 4, "output_type": "latent"}
    whole = pipeline(**conditions(pipeline, 4), generator=generators(4), **arguments).images
    for start, n in ((0, 3), (3, 1)):
        given = {name: values[start : start + n] for name, values in wanted.items()} or {"batch_size": n}
        part = pipeline(**given, generator=generators(n, seed=start), **arguments).images
        near = 1e-5 * max(1, float(whole.abs().max()))  # EDM starts at sigma 80
        torch.testing.assert_close(part, whole[start : start + n], rtol=0, atol=near)
    assert (whole[0] - whole[2]).abs().max() > 0.01, "the same condition with another seed is another image"
    vae = pipeline.components.get("vae")
    assert vae is None or not any(p.requires_grad for p in vae.parameters())


# -- which pipeline, which scheduler -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combination", "sampler", "cls"),
    [
        (("pixel", "none", "unet2d"), "ddpm", DDPMPipeline),
        (("pixel", "none", "unet2d"), "ddim", DDIMPipeline),
        (("pixel", "none", "unet2d"), "euler", UNetPipeline),
        (("pixel", "none", "unet2d_condition"), "ddpm", UNetPipeline),
        (("pixel", "text", "unet2d_condition"), "ddpm", UNetPipeline),
        (("latent", "none", "unet2d"), "ddpm", UNetPipeline),
        (("latent", "pooled_text", "unet2d_condition"), "ddim", UNetPipeline),
        (("latent", "text", "unet2d_condition"), "unipc", StableDiffusionPipeline),
    ],
)
def test_the_class_of_the_pipeline(parts, combination, sampler, cls):  # noqa: F811
    assert type(pipeline_of(config(parts, *combination, sample={"scheduler": sampler}))) is cls


def test_what_stable_diffusion_pipeline_cannot_sample_is_ours(parts):  # noqa: F811
    cfg = config(parts, "latent", "text", "unet2d_condition", data={"resolution": 24})
    assert type(pipeline_of(cfg)) is StableDiffusionPipeline
    unet, space, conditioner = build(cfg)
    space.vae.register_to_config(shift_factor=0.1)
    assert type(build_pipeline(unet, space, conditioner, scheduler(), cfg)) is UNetPipeline
    shallow = {"block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"]}
    shallow["up_block_types"] = ["CrossAttnUpBlock2D"]
    odd = config(parts, "latent", "text", "unet2d_condition", data={"resolution": 20}, model=shallow)
    assert type(pipeline_of(odd)) is UNetPipeline  # 20 is not divisible by 8


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("space_kind", ["pixel", "latent"])
def test_the_sampler_carries_the_noise_of_the_training(parts, name, space_kind):  # noqa: F811
    training = {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.015, "num_train_timesteps": 500}
    training |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    objective = {"kind": "ddpm", "num_train_timesteps": 500}
    cfg = config(parts, space_kind, objective=objective, sample={"scheduler": name, "num_inference_steps": 10})
    if name == "heun":
        with pytest.raises(ConfigError, match="heun cannot start at zero terminal SNR"):
            pipeline_of(cfg, **training)
        training |= {"rescale_betas_zero_snr": False}
    sampler = pipeline_of(cfg, **training).scheduler
    assert type(sampler) is SCHEDULERS[name][0]
    assert {key: sampler.config[key] for key in training} == training
    assert sampler.config.timestep_spacing == "trailing" and not sampler.config.get("thresholding")
    if name in ("ddpm", "ddim", "heun"):
        assert sampler.config.clip_sample is (space_kind == "pixel")
    sampler.set_timesteps(10)
    assert float(sampler.timesteps[0]) == 499 and len(sampler.timesteps.unique()) == 10


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_sampler_keeps_what_was_trained(parts, name):  # noqa: F811
    """Learned variance, respaced, 100 timesteps as 1000; what only the old sampler uses goes back to none."""
    objective = RANGE | {"num_train_timesteps": 100, "rescale_timesteps": True}
    sample = {"scheduler": "ddim", "eta": 0.5, "num_inference_steps": 5}
    cfg = config(parts, condition="class_label", objective=objective, sample=sample)
    pipeline = pipeline_of(cfg, num_train_timesteps=100, variance_type="learned_range")
    start = latents(pipeline)
    set_sampler(pipeline, name)
    assert pipeline.sampler().name == name and pipeline.config.rescale_timesteps
    assert pipeline.config.eta == (0.5 if name == "ddim" else 0.0)
    drawn = latents(pipeline)
    assert drawn.isfinite().all() and torch.equal(drawn, start) == (name == "ddim")
    set_sampler(pipeline, "ddpm")
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert latents(pipeline).isfinite().all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_that_a_class_does_not_know_is_given_as_numbers(name):
    training = scheduler(beta_schedule="sigmoid", beta_start=0.001, beta_end=0.015)
    sampler = with_scheduler(training, name, clip_sample=False)
    torch.testing.assert_close(sampler.betas, training.betas, rtol=0, atol=0)
    again = with_scheduler(sampler, "ddpm", clip_sample=False)
    torch.testing.assert_close(again.betas, training.betas, rtol=0, atol=0)
    assert not torch.equal(with_scheduler(scheduler(), name, clip_sample=False).betas, training.betas)


def test_stable_diffusion_pipeline_changes_no_config(parts):  # noqa: F811
    cfg = config(parts, "latent", "text", "unet2d_condition")
    pipeline = pipeline_of(cfg)
    assert pipeline.scheduler.config == with_scheduler(scheduler(), "ddpm", clip_sample=False).config
    assert pipeline.unet.config.sample_size == 4 and pipeline.vae_scale_factor == 4


def test_steps_that_diffusers_would_not_take_are_refused(parts):  # noqa: F811
    ddim, dpm = (with_scheduler(scheduler(), name, clip_sample=False) for name in ("ddim", "dpmsolver++"))
    for steps in (1, 50, 1000):
        check_steps(ddim, steps)
        check_steps(dpm, steps)
    check_steps(dpm, 30)
    with pytest.raises(ConfigError, match="divides num_train_timesteps 1000, got 30: use 25 or 40"):
        check_steps(ddim, 30)
    with pytest.raises(ConfigError, match="lie in 1..1000"):
        check_steps(dpm, 1001)
    with pytest.raises(ConfigError, match="timestep outside 0..999"):
        check_steps(with_scheduler(scheduler(), "ddpm", clip_sample=False), 61)
    zero_snr = scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    for name in ("euler", "euler_ancestral"):
        check_steps(with_scheduler(zero_snr, name, clip_sample=False), 250)
        with pytest.raises(ConfigError, match="noise levels would not fall"):
            check_steps(with_scheduler(zero_snr, name, clip_sample=False), 1000)
    with pytest.raises(ConfigError, match="cannot sample prediction_type sample"):
        with_scheduler(scheduler(prediction_type="sample"), "euler_ancestral", clip_sample=False)
    with pytest.raises(ConfigError, match="timestep outside 0..999"):
        check_steps(scheduler(timestep_spacing="leading", steps_offset=1), 1000)


@pytest.mark.parametrize(
    ("combination", "sections", "message"),
    [
        (("pixel", "none"), {"sample": {"scheduler": "euler"}, "objective": CLIP}, "does not clip"),
        (("pixel", "none"), {"sample": {"scheduler": "euler"}, "objective": VP | {"respacing": "250"}}, "use ddpm or"),
        (("pixel", "class_label"), {"sample": {"class_labels": [3]}}, "class labels are 0..2, got 3"),
        (("pixel", "none"), {"sample": {"scheduler": "dpmsolver++", "num_inference_steps": 61}}, "outside 0..999"),
    ],
)
def test_what_the_sampler_cannot_do_is_refused_before_it_draws(parts, combination, sections, message):  # noqa: F811
    with pytest.raises((ConfigError, ValueError), match=message):
        pipeline_of(config(parts, *combination, **sections))


TEXT = ("latent", "text", "unet2d_condition")
FEW = {"num_inference_steps": 10}


@pytest.mark.parametrize(
    ("combination", "sections", "cls"),
    [
        (("pixel", "none"), {"objective": RANGE, "sample": {"num_inference_steps": None}}, DDPMPipeline),
        (("pixel", "none"), {"objective": RANGE, "sample": FEW}, UNetPipeline),
        (("pixel", "none"), {"objective": LARGE, "sample": FEW}, UNetPipeline),
        (("pixel", "none"), {"objective": RANGE, "sample": FEW | {"scheduler": "ddim"}}, UNetPipeline),
        (("pixel", "none"), {"sample": {"num_inference_steps": 61}}, UNetPipeline),
        (("pixel", "none"), {"sample": {"scheduler": "ddim", "num_inference_steps": 30}}, UNetPipeline),
        (("pixel", "none"), {"sample": FEW | {"scheduler": "ddim", "eta": 0.5}}, UNetPipeline),
        (("pixel", "none"), {"objective": VP | {"respacing": "250"}}, UNetPipeline),
        (("pixel", "none"), {"objective": VP | {"num_train_timesteps": 500, "rescale_timesteps": True}}, UNetPipeline),
        (("pixel", "none"), {"objective": VP | {"rescale_timesteps": True}}, DDPMPipeline),
        (TEXT, {"sample": {"guidance_scale": 0}}, UNetPipeline),
        (TEXT, {"sample": {"guidance_scale": 3.0}}, StableDiffusionPipeline),
        (TEXT, {"sample": {"guidance_scale": 3.0, "guidance_rescale": 0.7}}, UNetPipeline),
        (TEXT, {"sample": {"guidance_scale": 3.0, "guidance_interval": [0.1, 2.0]}}, UNetPipeline),
        (TEXT, {"sample": {"scheduler": "ddim"}, "objective": CLIP}, UNetPipeline),
    ],
)
def test_what_stock_pipelines_cannot_do_is_ours(parts, combination, sections, cls):  # noqa: F811
    cfg = config(parts, *combination, **sections)
    variance = cfg.objective.variance.kind
    pipeline = pipeline_of(cfg, variance_type=variance, num_train_timesteps=cfg.objective.num_train_timesteps)
    assert type(pipeline) is cls
    if cls is UNetPipeline:
        assert latents(pipeline).isfinite().all()


# -- the call ----------------------------------------------------------------------------------------------------------


def test_call_defaults_and_outputs(parts):  # noqa: F811
    pipeline = pipeline_of(config(parts, "latent", "class_label", sample={"guidance_scale": 2.0}))
    assert (pipeline.config.num_inference_steps, pipeline.config.guidance_scale) == (5, 2.0)
    draw = {"class_labels": 1, "batch_size": 2}
    pt, array, pil, latent = (
        pipeline(**draw, generator=generators(2), output_type=kind).images for kind in ("pt", "np", "pil", "latent")
    )
    assert pt.shape == (2, 3, 16, 16) and array.shape == (2, 16, 16, 3) and latent.shape == (2, 4, 4, 4)
    np.testing.assert_array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype("uint8"))
    explicit = pipeline(class_labels=[1, 1], generator=generators(2), num_inference_steps=5, guidance_scale=2.0).images
    assert np.array_equal(np.asarray(pil[1]), np.asarray(explicit[1]))


@pytest.mark.parametrize(
    ("condition", "arguments", "message"),
    [
        ("none", {"prompt": "a cat"}, "takes no condition .* not prompt"),
        ("none", {"guidance_scale": 2}, "no condition to guide with"),
        ("class_label", {"prompt": "a cat"}, "takes class_labels .* not prompt"),
        ("class_label", {}, "needs class_labels"),
        ("class_label", {"class_labels": [3]}, "class labels are 0..2, got 3"),
        ("class_label", {"class_labels": []}, "at least 1"),
        ("class_label", {"class_labels": [0, 1], "batch_size": 3}, "must be the number of class_labels"),
        ("pooled_text", {"class_labels": 1}, "takes prompt .* not class_labels"),
        ("pooled_text", {"prompt": "a", "generator": [torch.Generator()] * 2}, "got 2 for 1 images"),
        ("none", {"output_type": "jpg"}, "output_type must be"),
        ("none", {"num_inference_steps": 0}, "num_inference_steps: Input should be greater"),
        ("none", {"num_inference_steps": 1001}, "lie in 1..1000"),
        ("none", {"num_inference_steps": 10, "respacing": "10"}, "give one of them"),
        ("none", {"eta": 0.5}, "eta: ddpm does not use it"),
        ("none", {"sigma_max": 5}, "sigma_max: Unexpected keyword argument"),
        ("class_label", {"class_labels": 1, "guidance_interval": [3, 2]}, "low below high"),
        ("class_label", {"class_labels": 1, "guidance_rescale": 0.7}, "guidance_scale 1 is none"),
        ("none", {"batch_size": 0}, "at least 1"),
    ],
)
def test_contradicting_arguments_are_refused(parts, condition, arguments, message):  # noqa: F811
    pipeline = pipeline_of(config(parts, "latent", condition))
    with pytest.raises(ConfigError, match=message):
        pipeline(**arguments)


def test_half_precision_draws_about_the_same(parts):  # noqa: F811
    pipeline = pipeline_of(config(parts, "latent", "pooled_text"))
    full = pipeline(list(PROMPTS), generator=generators(2), output_type="pt").images
    pipeline.to(torch.bfloat16)
    half = pipeline(list(PROMPTS), generator=generators(2), output_type="pt").images
    assert half.dtype == torch.float32 and 0 < (full - half).abs().mean() < 0.1


# -- round trips -------------------------------------------------------------------------------------------------------

FRESH = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
stock = [folder for folder in sys.argv[1:] if "stock" in folder]
for folder in [*stock, *(folder for folder in sys.argv[1:] if folder not in stock)]:
    if folder in stock:
        assert not any(name.startswith("finetune") for name in sys.modules)
        cls = DiffusionPipeline
    else:
        from finetune.pipelines import UNetPipeline as cls
    pipeline = cls.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    kind = pipeline.config.get("conditioning", "text" if "text_encoder" in pipeline.config else "none")
    given = {"none": {"batch_size": 2}, "class_label": {"class_labels": [0, 1]}}.get(kind)
    given = given or {"prompt": ["a red three", "a blue seven"]}
    if "DDIM" in type(pipeline).__name__:
        given["use_clipped_model_output"] = True
    if "UNet" not in type(pipeline).__name__:
        given["num_inference_steps"] = 5
    if "Stable" in type(pipeline).__name__:
        given["guidance_scale"] = 3.0
    images = pipeline(**given, generator=[torch.Generator().manual_seed(i) for i in range(2)]).images
    np.save(folder + "/images.npy", np.stack([np.asarray(image) for image in images]))
"""
GUIDED = {"guidance_scale": 3.0, "scheduler": "dpmsolver++"}
ROUND_TRIPS = {
    "stock pixel": (("pixel", "none", "unet2d"), {}),
    "stock ddim": (("pixel", "none", "unet2d"), {"scheduler": "ddim"}),
    "stock text": (("latent", "text", "unet2d_condition"), {"guidance_scale": 3.0}),
    "class": (("pixel", "class_label", "unet2d"), GUIDED),
    "pooled": (
        ("latent", "pooled_text", "unet2d"),
        {**GUIDED, "scheduler": "ddim", "eta": 0.5, "guidance_rescale": 0.7},
    ),
    "text": (("pixel", "text", "unet2d_condition"), GUIDED),
    "none": (("latent", "none", "unet2d_condition"), {}),
}


@pytest.fixture(scope="module")
def elsewhere(parts, tmp_path_factory):  # noqa: F811
    """name of ROUND_TRIPS -> (folder, images drawn here, those that a fresh process draws: by diffusers alone first)"""
    root, expected = tmp_path_factory.mktemp("elsewhere"), {}
    for name, (combination, sections) in ROUND_TRIPS.items():
        cfg = config(parts, *combination, sample={"num_inference_steps": 5, **sections})
        pipeline = pipeline_of(cfg)
        prompts = {"prompts": PROMPTS} if "text" in combination[1] else {}
        scale = None if combination[1] == "none" else 3.0
        pipeline.save_pretrained(root / name)
        images = generate(pipeline, num_images=2, seed=0, num_inference_steps=5, guidance_scale=scale, **prompts)
        expected[name] = np.stack([np.asarray(image) for image in images])
    done = subprocess.run([sys.executable, "-c", FRESH, *(str(root / name) for name in expected)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: (root / name, images, np.load(root / name / "images.npy")) for name, images in expected.items()}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_fresh_process_draws_the_same(elsewhere, name):
    """The stock pipelines with diffusers alone; ours are known by what pipeline they are, and diffusers says so."""
    folder, images, drawn = elsewhere[name]
    np.testing.assert_array_equal(drawn, images)
    assert images.std() > 1, "an image of one colour would prove nothing"
    if "stock" not in name:
        again = UNetPipeline.from_pretrained(folder)
        named = (3, ["zero", "one", "two"]) if name == "class" else (None, None)
        assert (again.config.num_classes, again.config.class_names) == named
        with pytest.raises(Exception, match="UNetPipeline"):  # diffusers alone does not know it
            DiffusionPipeline.from_pretrained(folder)


def test_sampling_leaves_weights_and_conditions_alone(parts):  # noqa: F811
    pipeline = pipeline_of(config(parts, "latent", "pooled_text"))
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    before = [p.clone() for module in modules for p in module.parameters()]
    pipeline(list(PROMPTS), guidance_scale=3.0, generator=generators(2))
    after = [p for module in modules for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

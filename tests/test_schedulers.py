"""The levels that a sampler of diffusers visits, and the time embedding of its UNets, against the references'."""

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from finetune.schedulers import with_scheduler
from golden_numbers import arrays, compare, golden
from test_objective_golden import SD, make

torch.set_num_threads(1)


@pytest.mark.parametrize("steps", [1, 10, 20, 50])
def test_sampled_levels_are_those_of_generative_models(steps):
    scheduler = with_scheduler(make(**SD).scheduler, "euler", clip_sample=False)
    scheduler.set_timesteps(steps)
    compare("sgm_discretization", f"LegacyDDPM_{steps}", scheduler.sigmas, rtol=5e-6)  # float32 products of diffusers
    other = make(**SD).scheduler  # "leading", which does not start at the last level
    other.set_timesteps(steps)
    assert other.timesteps[0] < scheduler.timesteps[0] == 999


@pytest.mark.parametrize("steps", [10, 20, 25, 50])
def test_sampled_timesteps_are_those_of_generative_models(steps):
    scheduler = with_scheduler(make(**SD).scheduler, "ddpm", clip_sample=False)
    scheduler.set_timesteps(steps)
    compare("sgm_discretization", f"legacy_timesteps_{steps}", scheduler.timesteps.flip(0), rtol=0)


@pytest.mark.parametrize("width", [128, 33])
def test_time_embedding_is_improved_diffusion_s(width):
    """As UNet2DModel makes it by default."""
    time = golden("iddpm_misc")["emb_t"]
    ours = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)(time)
    compare("iddpm_misc", f"timestep_embedding_{width}", ours, rtol=5e-5, floor=1)  # float32 angles up to 1000
    other = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=1)(time)
    assert (other - torch.tensor(arrays("iddpm_misc")[f"timestep_embedding_{width}"])).abs().max() > 0.01

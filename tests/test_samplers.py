"""The solvers of EDM and rectified flow: numbers of k-diffusion and generative-models, order, and a whole tiny run."""

from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image

import finetune.run
from finetune.errors import ConfigError
from finetune.sample import generate, grid, load_pipeline
from finetune.samplers import SOLVERS, Churn, euler, flow_sigmas, heun, karras_sigmas
from finetune.schedulers import with_scheduler
from forked import log, run
from golden_numbers import arrays, compare
from tiny import config
from tiny_models import scheduler

K, SGM = arrays("kdiff_samplers"), arrays("sgm_samplers")
CLOSE = {"rtol": 2e-6, "floor": 1.0}  # ten or more float32 steps from 80 down to 1


def denoise(x, sigma):
    """That of the golden numbers: exact for data of N(0, 1)."""
    return x / (1 + float(sigma) ** 2)


def train(cfg):
    """The exit code is none of its results."""
    finetune.run.train(cfg)


@pytest.mark.parametrize("steps", [10, 18, 50])
def test_sigmas_are_those_of_k_diffusion(steps):
    compare("kdiff_schedules", f"karras_{steps}", karras_sigmas(steps), rtol=2e-6)  # theirs: seventh powers in float32
    latent = karras_sigmas(10, sigma_min=0.0292, sigma_max=14.6146, rho=5)
    compare("kdiff_schedules", "karras_10_0.0292_14.6146_rho5", latent, rtol=2e-6)
    assert not np.allclose(karras_sigmas(steps, rho=5), arrays("kdiff_schedules")[f"karras_{steps}"], rtol=1e-3)


def test_sigmas_are_those_of_generative_models():
    for steps in (10, 20, 50):
        compare("sgm_discretization", f"EDM_{steps}", karras_sigmas(steps), rtol=2e-6)
    other = karras_sigmas(18, sigma_min=0.01, sigma_max=20, rho=5)
    compare("sgm_discretization", "EDM_18_smin0.01_smax20_rho5_nozero_flip", other[:-1].flip(0), rtol=2e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_are_those_of_k_diffusion(name):
    sample = SOLVERS[name](denoise, torch.tensor(K["x_start"]), karras_sigmas(10))
    compare("kdiff_samplers", f"{name}/final", sample, **CLOSE)
    other = {"euler": "heun", "heun": "euler"}[name]
    assert np.abs(sample.numpy() - K[f"{other}/final"]).max() > 1e-3


@pytest.mark.parametrize("solver", ["Euler", "Heun"])
@pytest.mark.parametrize("churned", [False, True])
def test_steps_are_those_of_generative_models(solver, churned):
    sigmas, calls = karras_sigmas(10), count()
    x = torch.tensor(SGM["x_init"]) * float((1 + sigmas[0] ** 2).sqrt())
    churn = partial(Churn, noise=lambda: torch.tensor(SGM["noises"][next(calls)]), s_tmin=0.05, s_tmax=50)
    given = {"churn": churn(s_churn=5, s_noise=1.003)} if churned else {}
    key = f"{solver}EDM_edm_10{'_churn' * churned}/final"
    sample = SOLVERS[solver.lower()](denoise, x, sigmas, **given)
    compare("sgm_samplers", key, sample, **CLOSE)
    assert next(calls) > 3 or not churned


def test_orders_of_convergence():
    """Exact for data of N(0.3, 0.5^2): noise e of sigma 1 of the flow ends at 0.3 + 0.5 e."""

    def exact(x, sigma):
        a, s, std = 1 - float(sigma), float(sigma), 0.5
        return 0.3 + a * std**2 * (x - a * 0.3) / (a**2 * std**2 + s**2)

    x = torch.tensor([0.7, -1.2], dtype=torch.float64)
    error = {
        (solver, n): float((solver(exact, x, flow_sigmas(n, shift=2)) - (0.3 + 0.5 * x)).abs().max())
        for solver in (euler, heun)
        for n in (64, 128)
    }
    assert 1.8 < error[euler, 64] / error[euler, 128] < 2.2
    assert 3.4 < error[heun, 64] / error[heun, 128] < 4.6
    assert float(flow_sigmas(10, shift=3)[-2]) == pytest.approx(0.25)  # 3 (0.1) / 1.2: shifted once


def test_a_sampler_of_another_noise_is_refused():
    with pytest.raises(ConfigError, match="edm_heun does not remove the noise of objective.kind ddpm"):
        with_scheduler(scheduler(), "edm_heun", clip_sample=False)


@pytest.mark.parametrize(("kind", "sampler"), [("edm", "edm_heun"), ("flow", "flow_euler"), ("flow", "flow_heun")])
def test_trained_exported_and_loaded_it_draws_the_same(kind, sampler, tmp_path):
    sample = {"scheduler": sampler, "num_inference_steps": 3, "guidance_scale": 1.5}
    conditioning = {"kind": "class_label", "condition_dropout": 0.1}
    sections = {"objective": {"kind": kind}, "sample": sample, "conditioning": conditioning}
    cfg = config(tmp_path / "run", train={"max_train_steps": 3}, **sections)
    assert run(cfg, body=train) == [0], log(cfg)
    pipeline = load_pipeline(cfg.output_dir)
    assert pipeline.config.solver == sampler.split("_")[1]
    images = generate(pipeline, num_images=2, seed=0)
    drawn = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-00000003.png")).astype(int)
    names = pipeline.config.class_names
    ours = np.asarray(grid(images, names[:2] if names else ["0", "1"], columns=2)).astype(int)
    assert ours.shape == drawn.shape and np.abs(ours - drawn).max() <= 1
    assert np.abs(ours[:, ::-1] - drawn).max() > 20


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_the_default_sampler_is_refused_with_the_right_names(kind, tmp_path):
    cfg = config(tmp_path / "run", objective={"kind": kind})
    assert run(cfg, body=train) == [2]
    assert f"use {kind}_euler or {kind}_heun" in log(cfg)

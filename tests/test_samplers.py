"""The solvers of EDM and rectified flow, and diffusers' own: numbers of k-diffusion and generative-models, order of
convergence, and whole tiny runs."""

from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

import finetune.run
from finetune.config_sample import Sampling
from finetune.errors import ConfigError
from finetune.sample import generate, grid, load_pipeline
from finetune.samplers import SOLVERS, Churn, euler, flow_sigmas, heun, karras_sigmas
from finetune.sampling import Sampler
from finetune.schedulers import process_of, with_scheduler
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


class Recorded:
    """The denoiser, and what it was asked: x [calls, B, ...] and sigma [calls]."""

    def __init__(self):
        self.xs, self.sigmas = [], []

    def __call__(self, x, sigma):
        self.xs.append(x)
        self.sigmas.append(float(sigma))
        return denoise(x, sigma)


GOLDEN_SOLVERS = {"euler": ("euler", 1), "heun": ("heun", 2), "dpmsolver++": ("dpmpp_2m", 1)}
"""Our name, and k-diffusion's; evaluations per step."""


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_are_those_of_k_diffusion(name):
    (golden, each), asked = GOLDEN_SOLVERS[name], Recorded()
    sample = SOLVERS[name](asked, torch.tensor(K["x_start"]), karras_sigmas(10))
    compare("kdiff_samplers", f"{golden}/final", sample, **CLOSE)
    compare("kdiff_samplers", f"{golden}/x_at_step", torch.stack(asked.xs[::each]), **CLOSE)
    other = {"euler": "heun", "heun": "euler", "dpmsolver++": "euler"}[name]
    assert np.abs(sample.numpy() - K[f"{other}/final"]).max() > 1e-3


@pytest.mark.parametrize(
    ("solver", "churned"),
    [("EulerEDM", ""), ("HeunEDM", ""), ("DPMPP2M", ""), ("EulerEDM", "_churn"), ("HeunEDM", "_churn")],
)
@pytest.mark.parametrize("grid_", ["edm", "legacy"])
def test_steps_are_those_of_generative_models(solver, churned, grid_):
    if f"{solver}_{grid_}_10{churned}/final" not in SGM:
        assert churned, "there are no numbers of churn on the other grid"
        return
    key, calls, asked = f"{solver}_{grid_}_10{churned}", count(), Recorded()
    sigmas = karras_sigmas(10) if grid_ == "edm" else torch.tensor(arrays("sgm_discretization")["LegacyDDPM_10"])
    x = torch.tensor(SGM["x_init"]) * float((1 + sigmas[0] ** 2).sqrt())
    churn = partial(Churn, noise=lambda: torch.tensor(SGM["noises"][next(calls)]), s_tmin=0.05, s_tmax=50)
    given = {"churn": churn(s_churn=5, s_noise=1.003)} if churned else {}
    solve = SOLVERS[{"EulerEDM": "euler", "HeunEDM": "heun", "DPMPP2M": "dpmsolver++"}[solver]]
    sample = solve(asked, x, sigmas.double(), **given)
    compare("sgm_samplers", f"{key}/final", sample, **CLOSE)
    # They take the root of the difference of two squares in float32, which churn is made of.
    compare("sgm_samplers", f"{key}/x_at_call", torch.stack(asked.xs), rtol=2e-5 if churned else 2e-6, floor=1.0)
    compare("sgm_samplers", f"{key}/sigma_at_call", asked.sigmas, rtol=2e-6)
    assert next(calls) > 3 or not churned


CHURN = {"s_churn": 5, "s_tmin": 0.05, "s_tmax": 50, "s_noise": 1.003}


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn_is_that_of_k_diffusion(name):
    rows = count(1)  # it draws at the first step too, and does not use it: sigma 80 is above s_tmax
    churn = Churn(noise=lambda: torch.tensor(K["noises"][next(rows)]), **CHURN)
    asked = Recorded()
    sample = SOLVERS[name](asked, torch.tensor(K["x_start"]), karras_sigmas(10), churn=churn)
    compare("kdiff_samplers", f"{name}_churn/final", sample, **CLOSE)
    each = GOLDEN_SOLVERS[name][1]
    compare("kdiff_samplers", f"{name}_churn/x_at_step", torch.stack(asked.xs[::each]), rtol=2e-5, floor=1.0)
    assert np.abs(sample.numpy() - K[f"{name}/final"]).max() > 0.1


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_churned_pipeline_draws_the_numbers_of_generative_models(name, monkeypatch):
    """Through the sampler that the pipeline runs, with the preconditioning of EDM around the exact denoiser."""
    scheduler, rows = EDMEulerScheduler(sigma_data=0.5), count()
    _, prediction = process_of(scheduler)

    def network(scaled, time, sigma):
        sigma = torch.tensor([sigma], dtype=torch.float64)
        x = scaled * float((sigma**2 + 0.25).sqrt())
        c_skip, c_out = prediction.pair(torch.ones_like(sigma), sigma)
        return (denoise(x, sigma) - float(c_skip) * x) / float(c_out)

    monkeypatch.setattr("finetune.sampling.randn_tensor", lambda *_, **__: torch.tensor(SGM["noises"][next(rows)]))
    x = torch.tensor(SGM["x_init"]) * (1 + 80.0**-2) ** 0.5  # there pure noise gets the variance of the data too
    given = {"scheduler": scheduler, "solver": name}
    sample = Sampler(**given, settings=Sampling(num_inference_steps=10, **CHURN))(network, x)
    compare("sgm_samplers", f"{name.capitalize()}EDM_edm_10_churn/final", sample, **CLOSE)
    calm = Sampler(**given, settings=Sampling(num_inference_steps=10))(network, x)
    compare("sgm_samplers", f"{name.capitalize()}EDM_edm_10/final", calm, **CLOSE)


@pytest.mark.parametrize(
    ("name", "golden"),
    {"euler": "EulerEDM", "heun": "HeunEDM", "dpmsolver++": "DPMPP2M", "euler_ancestral": "EulerAncestral"}.items(),
)
def test_the_schedulers_of_diffusers_are_configured_as_generative_models(name, golden, monkeypatch):
    """On the noise of Stable Diffusion, with the exact denoiser: epsilon = (x - D(x)) / sigma of the scaled input."""
    training = scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours, rows, x = with_scheduler(training, name, clip_sample=False), count(), torch.tensor(SGM["x_init"])
    ours.set_timesteps(10)
    if "euler" in name or name == "heun":  # these start at sigma x, generative-models at sqrt(1 + sigma^2) x
        x = x * float((1 + ours.sigmas[0] ** -2) ** 0.5)
    draw = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
    monkeypatch.setattr(draw, lambda *_, **__: torch.tensor(SGM["noises"][next(rows)]))
    sampler = Sampler(scheduler=ours, settings=Sampling(num_inference_steps=10))
    sampler.check()
    sample = sampler(lambda x, time, ratio: x * ratio / (1 + ratio**2) ** 0.5, x)
    compare("sgm_samplers", f"{golden}_legacy_10/final", sample, **CLOSE)
    assert np.abs(sample.numpy() - SGM["LMS_legacy_10/final"]).max() > 1e-3


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


def test_order_of_dpmsolver():
    """Second order, with one evaluation per step, on data of N(0.3, 0.5^2), whose flow from sigma 80 is known."""
    std, x = 0.5, torch.tensor([70.0, -120.0], dtype=torch.float64)
    truth = 0.3 + (x - 0.3) * std / (std**2 + 80.0**2) ** 0.5
    error = {}
    for n in (64, 128, 256):
        asked = []

        def exact(x, sigma, asked=asked):
            asked.append(sigma)
            return (std**2 * x + float(sigma) ** 2 * 0.3) / (std**2 + float(sigma) ** 2)

        error[n] = float((SOLVERS["dpmsolver++"](exact, x, karras_sigmas(n)) - truth).abs().max())
        assert len(asked) == n
    assert 3 < error[64] / error[128] < 5 and 3 < error[128] / error[256] < 5, error


@pytest.mark.parametrize(
    ("kind", "solver", "steps", "churn"),
    [("edm", "euler", 400, 0.0), ("edm", "heun", 40, 0.0), ("edm", "heun", 80, 20.0), ("edm", "euler", 800, 20.0),
     ("flow", "euler", 400, 0.0), ("flow", "heun", 60, 0.0)],
)  # fmt: skip
def test_the_data_of_an_exact_denoiser_are_drawn(kind, solver, steps, churn):
    """x0 of N(0.1, 0.2^2), through the parametrisation of the network."""
    ours = EDMEulerScheduler() if kind == "edm" else FlowMatchEulerDiscreteScheduler()
    process, prediction = process_of(ours)

    def network(read, time, ratio):
        sigma = torch.tensor([ratio if kind == "edm" else float(time) / 1000], dtype=torch.float64)
        alpha, s = torch.ones_like(sigma) if kind == "edm" else 1 - sigma, float(sigma)
        x, a = read * float((sigma**2 + 0.25).sqrt() if kind == "edm" else 1), float(alpha)
        x0 = 0.1 + a * 0.04 * (x - 0.1 * a) / (a**2 * 0.04 + s**2)
        c_skip, c_out = prediction.pair(alpha, sigma)
        return (x0 - float(c_skip) * x) / float(c_out)

    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(scheduler=ours, solver=solver, settings=Sampling(num_inference_steps=steps, s_churn=churn))
    sampler.check()
    sample = sampler(network, torch.randn((50000, 1), generator=generator), generator)
    assert abs(float(sample.mean()) - 0.1) < 0.004 and abs(float(sample.std()) - 0.2) < 0.004
    few = Sampler(scheduler=ours, solver="euler", settings=Sampling(num_inference_steps=6))
    rough = few(network, torch.randn((50000, 1), generator=generator), generator)
    assert abs(float(rough.std()) - 0.2) > 0.02, "negative control: six steps are too few"


def test_a_sampler_of_another_noise_is_refused():
    with pytest.raises(ConfigError, match="edm_heun does not remove the noise of objective.kind ddpm: use one of ddpm"):
        with_scheduler(scheduler(), "edm_heun", clip_sample=False)
    with pytest.raises(ConfigError, match="ddim does not remove the noise of objective.kind edm: use one of edm_heun"):
        with_scheduler(EDMEulerScheduler(), "ddim", clip_sample=False)


LEARNED = {
    "kind": "ddpm",
    "num_train_timesteps": 100,
    "scale_betas": True,
    "rescale_timesteps": True,
    "respacing": "20",
    "variance": {"kind": "learned_range"},
}
RUNS = [
    ({"kind": "edm"}, "edm_heun", {"s_churn": 1.0, "guidance_rescale": 0.5}),
    ({"kind": "flow"}, "flow_euler", {"guidance_interval": [0.5, 5.0]}),
    ({"kind": "flow"}, "flow_heun", {}),
    (LEARNED, "ddpm", {"guidance_interval": [0.5, 5.0]}),
    (LEARNED, "ddim", {"eta": 0.5}),
]


@pytest.mark.parametrize(("objective", "sampler", "settings"), RUNS)
def test_trained_exported_and_loaded_it_draws_the_same(objective, sampler, settings, tmp_path):
    sample = {"scheduler": sampler, "num_inference_steps": 3, "guidance_scale": 1.5} | settings
    conditioning = {"kind": "class_label", "condition_dropout": 0.1}
    sections = {"objective": objective, "sample": sample, "conditioning": conditioning}
    cfg = config(tmp_path / "run", train={"max_train_steps": 3}, **sections)
    assert run(cfg, body=train) == [0], log(cfg)
    pipeline = load_pipeline(cfg.output_dir)
    assert pipeline.sampler().name == sampler
    assert {name: pipeline.config[name] for name in settings} == settings
    assert pipeline.config.rescale_timesteps is (objective is LEARNED)
    images = generate(pipeline, num_images=2, seed=0)
    drawn = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-00000003.png")).astype(int)
    names = pipeline.config.class_names
    ours = np.asarray(grid(images, names[:2] if names else ["0", "1"], columns=2)).astype(int)
    assert ours.shape == drawn.shape and np.abs(ours - drawn).max() <= 1
    assert np.abs(ours[:, ::-1] - drawn).max() > 20


def test_a_run_guided_by_an_earlier_checkpoint_exports_the_guide(tmp_path):
    first = config(tmp_path / "first", train={"max_train_steps": 2})
    assert run(first, body=train) == [0], log(first)
    weak = tmp_path / "first" / "checkpoints" / "step-00000002"
    sample = {"guidance_scale": 2.0, "autoguidance": str(weak)}
    cfg = config(tmp_path / "second", train={"max_train_steps": 4}, sample=sample)
    assert run(cfg, body=train) == [0], log(cfg)
    pipeline = load_pipeline(cfg.output_dir)
    average = load_file(weak / "ema_0.9.safetensors")
    assert all(torch.equal(tensor, average[name]) for name, tensor in pipeline.guide.state_dict().items())
    assert str(tmp_path) not in (tmp_path / "second" / "pipeline" / "config.yaml").read_text()
    (image,) = generate(pipeline, num_images=1, seed=0)
    drawn = np.asarray(Image.open(tmp_path / "second" / "samples" / "step-00000004.png")).astype(int)
    alone = np.asarray(grid([image])).astype(int)[4:100, 4:100]
    assert np.abs(drawn[4:100, 4:100] - alone).max() <= 1
    pipeline.register_modules(guide=None)
    (other,) = generate(pipeline, num_images=1, seed=0)
    assert np.abs(np.asarray(grid([other])).astype(int)[4:100, 4:100] - alone).max() > 1

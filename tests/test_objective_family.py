"""Every process, prediction, weighting and loss: numbers of generative-models and k-diffusion, and analytic answers."""

import math
from dataclasses import replace

import pytest
import torch

from finetune.objective import levels, weighting
from finetune.objective.prediction import Prediction
from finetune.objective.process import per_sample, snr
from finetune.objective.regression import pseudo_huber
from finetune.seeding import PositionRandom
from golden_numbers import compare, golden
from test_objective_golden import SD, make

torch.set_num_threads(1)
FAMILY = {
    "epsilon": {"kind": "ddpm", "prediction_type": "epsilon"},
    "sample": {"kind": "ddpm", "prediction_type": "sample"},
    "v": {"kind": "ddpm", "prediction_type": "v_prediction"},
    "edm": {"kind": "edm"},
    "edm_v": {"kind": "edm", "prediction_type": "v_prediction", "sigma_data": 1.0},
    "flow": {"kind": "flow"},
}
LEVELS = {"ddpm": [20, 300, 900], "edm": [0.05, 0.5, 5.0], "flow": [0.1, 0.5, 0.9]}


def unscaled(objective, x, sigma):
    """x_t from what the network is given."""
    return x / objective.process.scale_input(torch.ones_like(x), sigma)


# ---- parametrisation


@pytest.mark.parametrize("name", FAMILY)
def test_target_recovers_x0_and_noise(name):
    objective = make(**FAMILY[name])
    level = torch.tensor(LEVELS[FAMILY[name]["kind"]])
    alpha, sigma, _ = objective.process(level)
    x0, noise = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
    target = objective.prediction.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(objective.prediction.x0(x_t, target, alpha, sigma), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(objective.prediction.noise(x_t, target, alpha, sigma), noise, rtol=0, atol=1e-11)
    torch.testing.assert_close(objective.x0(target, x_t, level), x0, rtol=0, atol=1e-5)
    assert (objective.prediction.x0(x_t, -target, alpha, sigma) - x0).abs().mean() > 0.05


@pytest.mark.parametrize("name", FAMILY)
def test_exact_denoiser_reaches_theory(name):
    """x0 ~ N(0, s^2): E[x0 | x_t] = alpha s^2 x_t / V, V = alpha^2 s^2 + sigma^2, and its error is s^2 sigma^2 / V."""
    objective, n, std = make(**FAMILY[name]), 4096, 0.5
    for step, value in enumerate(LEVELS[FAMILY[name]["kind"]]):
        level = torch.full((n,), value)
        alpha, sigma, _ = objective.process(level)
        variance = alpha**2 * std**2 + sigma**2
        c_skip, c_out = objective.prediction.pair(alpha, sigma)

        def exact(x, time, a=alpha, s=sigma, v=variance, c_skip=c_skip, c_out=c_out):
            x_t = unscaled(objective, x, s)
            return (per_sample(a * std**2 / v, x) * x_t - per_sample(c_skip, x) * x_t) / per_sample(c_out, x)

        theory = float((std**2 * sigma**2 / variance / c_out**2)[0])
        random = PositionRandom(step, torch.arange(n))
        x0, noise = std * random.normal("data", (1, 4, 4)), random.normal("noise", (1, 4, 4))
        loss = objective.loss_at(exact, x0, level, noise).per_sample.mean().item()
        assert loss == pytest.approx(theory, rel=5 * (2 / (16 * n)) ** 0.5)
        biased = objective.loss_at(lambda *a, f=exact: f(*a) + 0.1, x0, level, noise).per_sample.mean().item()
        assert biased - loss == pytest.approx(0.1**2, abs=5 * 0.2 * (theory / (16 * n)) ** 0.5)


def test_time_and_input_of_each_process():
    sigma = torch.tensor([0.1, 0.5, 40.0], dtype=torch.float64)
    edm = make("edm").process
    torch.testing.assert_close(edm(sigma)[2], (sigma.log() / 4).float())
    x_t = torch.ones(3, 1, 2, 2)
    torch.testing.assert_close(edm.scale_input(x_t, sigma)[:, 0, 0, 0], (1 / (sigma**2 + 0.25).sqrt()).float())
    flow = make("flow").process
    alpha, _, time = flow(sigma[:2])
    assert alpha.tolist() == pytest.approx([0.9, 0.5]) and time.tolist() == pytest.approx([100, 500])
    assert flow.scale_input(x_t, sigma) is x_t
    assert edm.fraction(torch.tensor([0.5])).item() == pytest.approx(0.5) and flow.fraction(sigma[:1]) == sigma[:1]
    for process, bad in [(edm, 0.0), (flow, 0.0), (flow, 1.1)]:
        with pytest.raises(AssertionError):
            process(torch.tensor([bad]))


# ---- generative-models


def test_scalings_and_weightings_are_sgm_s():
    data = golden("sgm_scaling_weighting")
    sigma = data["sigma"].double()
    for name, process, prediction in [
        ("EDMScaling_0.5", make("edm").process, Prediction("edm", sigma_data=0.5)),
        ("EDMScaling_1.0", make("edm", sigma_data=1.0).process, Prediction("edm", sigma_data=1.0)),
        ("VScalingWithEDMcNoise", make("edm", sigma_data=1.0).process, Prediction("v_prediction", sigma_data=1.0)),
    ]:
        alpha, _, time = process(sigma)
        c_skip, c_out = prediction.pair(alpha, sigma)
        c_in = process.scale_input(torch.ones(len(sigma), 1), sigma)[:, 0]
        for key, ours in {"c_skip": c_skip, "c_out": c_out, "c_in": c_in, "c_noise": time}.items():
            # ln(sigma) and the root of a sum lose digits around 0: theirs are float32 arithmetic.
            compare("sgm_scaling_weighting", f"{name}/{key}", ours, floor=0.1)
    # The same process in variance-preserving coordinates: x / sqrt(1 + sigma^2).
    alpha = 1 / (1 + sigma**2).sqrt()
    for name, prediction in [("EpsScaling", Prediction("epsilon")), ("VScaling", Prediction("v_prediction"))]:
        c_skip, c_out = prediction.pair(alpha, sigma * alpha)
        for key, ours in {"c_skip": c_skip * alpha, "c_out": c_out, "c_in": alpha}.items():
            compare("sgm_scaling_weighting", f"{name}/{key}", ours)
    ratio, one = sigma**-2, torch.ones_like(sigma)
    for name, ours in {
        "EDMWeighting_0.5": weighting.edm(0.5), "EDMWeighting_1.0": weighting.edm(1.0),
        "VWeighting": weighting.edm(1.0), "EpsWeighting": weighting.by_snr, "UnitWeighting": weighting.x0,
    }.items():  # fmt: skip
        compare("sgm_scaling_weighting", name, ours(ratio, one))
        compare("sgm_scaling_weighting", f"denoiser_weighting.{name}", ours(ratio, one))
    assert not torch.allclose(weighting.edm(0.6)(ratio, one).float(), data["EDMWeighting_0.5"], rtol=0.01)


BY_V = {"kind": "edm", "weighting_sigma_data": 1.0}
SGM = {
    "edm": {"kind": "edm", "weighting": {"kind": "edm"}},
    "edm_unit": {"kind": "edm", "weighting": {"kind": "x0"}},
    "v_edm_cnoise": {**FAMILY["edm_v"], "weighting": BY_V},
    "eps_discrete": {**SD, "weighting": {"kind": "snr"}},
    "v_discrete": {**SD, "prediction_type": "v_prediction", "weighting": BY_V},
    "v_discrete_eps_weight": {**SD, "prediction_type": "v_prediction", "weighting": {"kind": "snr"}},
}


@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("case", SGM)
def test_loss_is_sgm_s(case, loss):
    """Also SGM's absolute error of x0, which is |c_out| times that of the output."""
    data, objective = golden("sgm_loss"), make(**SGM[case], loss={"kind": loss})
    discrete = "discrete" in case
    u, seen = torch.special.ndtr(data["rand"].double()), []
    level = data["idx"] if discrete else levels.log_normal(-1.2, 1.2)(u)

    def network(x, c):
        seen[:] = [x, torch.tanh(0.5 * x) + 0.1 * c.view(-1, 1, 1, 1) / (1000 if discrete else 1)]
        return seen[1]

    terms = objective.loss_at(network, data["input"], level, data["noise"])
    compare("sgm_loss", f"{case}/{loss}/loss", terms.per_sample)
    alpha, sigma, _ = objective.process(level)
    compare("sgm_loss", f"{case}/sigma", sigma / alpha)
    x_t = unscaled(objective, seen[0], sigma)  # x0 + sigma noise times alpha, a sum of terms of about 1 or sigma
    compare("sgm_loss", f"{case}/noised", x_t / per_sample(alpha, x_t), floor=1)
    compare("sgm_loss", f"{case}/denoised", objective.x0(seen[1], x_t, level), rtol=2e-6, floor=1)
    assert not torch.allclose(terms.per_sample, data[f"{case}/{'l1' if loss == 'l2' else 'l2'}/loss"], rtol=0.01)


def test_levels_are_sgm_s():
    data = golden("sgm_discretization")
    u = torch.special.ndtr(data["rand"].double())
    compare("sgm_discretization", "EDMSampling", levels.log_normal(-1.2, 1.2)(u))
    compare("sgm_discretization", "EDMSampling_m0_s1", levels.log_normal(0, 1)(u))
    alpha, sigma, _ = make(**SD).process(data["idx"])
    compare("sgm_discretization", "DiscreteSampling", sigma / alpha)
    alpha, sigma, _ = make(**SD).process(torch.arange(1000))
    compare("sgm_discretization", "discrete_denoiser_sigmas", sigma / alpha)
    compare("sgm_discretization", "LegacyDDPM_1000_nozero_flip", sigma / alpha)
    compare("sgm_discretization", "quant_sigma", (sigma / alpha)[data["quant_idx"]])


# ---- k-diffusion


KDIFF = {"rtol": 5e-6}  # its coefficients are float32, and its target is divided by c_out


def kdiff_network(x, c):
    return torch.tanh(0.5 * x) + 0.1 * c.view(-1, 1, 1, 1)


@pytest.mark.parametrize("case, settings", [
    ("Denoiser_0.5_karras", {}),
    ("Denoiser_0.5_soft-min-snr", {"weighting": {"kind": "soft_min_snr"}}),
    ("Denoiser_0.5_snr", {"weighting": {"kind": "snr"}}),
    ("SimpleLossDenoiser_0.5", {"weighting": {"kind": "snr"}}),
])  # fmt: skip
def test_loss_is_k_diffusion_s(case, settings):
    data = golden("kdiff_losses")
    objective, sigma = make("edm", **settings), data["sigma"].double()
    terms = objective.loss_at(kdiff_network, data["input"], sigma, data["noise"])
    compare("kdiff_losses", f"{case}/loss", terms.per_sample, **KDIFF)
    if "weighting" in settings or case.endswith("karras"):
        ratio, (_, c_out) = data["sigma"].double() ** -2, objective.prediction.pair(*objective.process(sigma)[:2])
        key = f"weighting_{case.removeprefix('Denoiser_0.5_')}"
        if key in data:
            compare("kdiff_losses", key, objective.weighting(ratio, c_out**2))
    other = make("edm", weighting={"kind": "debiased"})
    wrong = other.loss_at(kdiff_network, data["input"], data["sigma"].double(), data["noise"])
    assert not torch.allclose(wrong.per_sample, data[f"{case}/loss"], rtol=0.01)


def test_v_loss_is_k_diffusion_s():
    """Its network is told another time, 2 / pi atan(sigma)."""
    data = golden("kdiff_losses")
    network = lambda x, c: kdiff_network(x, data["VDenoiser/sigma_to_t"])  # noqa: E731
    loss = make(**FAMILY["edm_v"]).loss_at(network, data["input"], data["sigma"].double(), data["noise"]).per_sample
    compare("kdiff_losses", "VDenoiser/loss", loss, **KDIFF)
    compare("kdiff_losses", "VDenoiser/sigma_to_t", make(**FAMILY["edm_v"]).process.fraction(data["sigma"].double()))


class AsTold:
    """A variance-preserving process at the sigmas and times of k-diffusion, which also lie between timesteps."""

    def __init__(self, time):
        self.time = time

    def __call__(self, level):
        alpha = 1 / (1 + level**2).sqrt()
        return alpha, level * alpha, self.time

    def scale_input(self, x_t, sigma):
        return x_t


@pytest.mark.parametrize("quantize", [0, 1])
@pytest.mark.parametrize("name, prediction_type", [("eps", "epsilon"), ("v", "v_prediction")])
def test_loss_of_sigmas_between_timesteps_is_k_diffusion_s(name, prediction_type, quantize):
    data, case = golden("kdiff_losses"), f"Discrete_{name}_quantize{quantize}"
    objective = make(**SD, prediction_type=prediction_type)
    compare("kdiff_losses", "alphas_cumprod_sd", objective.process.alphas_cumprod)
    objective, seen = replace(objective, process=AsTold(data[f"{case}/sigma_to_t"])), []

    def network(x, c):
        seen[:] = [x, kdiff_network(x, c / 1000)]
        return seen[1]

    terms = objective.loss_at(network, data["input"], data["sigma"].double(), data["noise"])
    compare("kdiff_losses", f"{case}/loss", terms.per_sample, **KDIFF)
    denoised = objective.x0(seen[1], seen[0], data["sigma"].double())
    compare("kdiff_losses", f"{case}/forward", denoised, rtol=5e-6, floor=1)


def test_denoiser_is_k_diffusion_s():
    data, objective, seen = golden("kdiff_losses"), make("edm"), []
    sigma = data["sigma"].double()
    objective.loss_at(lambda x, c: seen.append(kdiff_network(x, c)) or seen[0], data["input"], sigma, data["noise"])
    x_t = data["input"] + per_sample(sigma, data["input"]) * data["noise"]
    compare("kdiff_losses", "Denoiser_0.5/forward", objective.x0(seen[0], x_t, sigma), floor=1)


def test_sigmas_of_evenly_kept_timesteps_are_k_diffusion_s():
    alpha, sigma, _ = make(**SD, respacing="10").process(torch.arange(9, -1, -1))
    theirs = golden("kdiff_losses")["DiscreteSchedule/get_sigmas_10"]
    compare("kdiff_losses", "DiscreteSchedule/get_sigmas_10", sigma / alpha, theirs[:-1], rtol=2e-5)  # float32 products


def test_uncertainty_is_k_diffusion_s():
    """Its loss is half of ours: (error / exp(u) + u) / 2."""
    data = golden("kdiff_losses")
    objective = replace(make("edm"), uncertainty=lambda time: data["logvar"])
    terms = objective.loss_at(kdiff_network, data["input"], data["sigma"].double(), data["noise"])
    compare("kdiff_losses", "DenoiserWithVariance_0.5/loss", terms.per_sample / 2, **KDIFF)


def test_level_distributions_are_k_diffusion_s():
    data = golden("kdiff_schedules")
    u = data["u"].double()
    compare("kdiff_schedules", "rand_log_normal_-1.2_1.2", levels.log_normal(-1.2, 1.2)(u), rtol=5e-6)  # float32 erfinv
    compare("kdiff_schedules", "rand_v_diffusion", levels.v_diffusion(0.5, 1e-3, 1e3)(u))
    within = u * (1 - 2e-6) + 1e-6  # it draws between 1e-3 and 1e3, whose cdf are 1e-6 and 1 - 1e-6
    compare("kdiff_schedules", "rand_log_logistic_0_0.5", levels.log_logistic(0, 0.5)(within))
    compare("kdiff_schedules", "rand_log_uniform", levels.log_uniform(0.002, 80)(u))
    assert not torch.allclose(levels.v_diffusion(0.6, 1e-3, 1e3)(u).float(), data["rand_v_diffusion"], rtol=0.01)


# ---- weighting

PUBLISHED = [
    ("epsilon", {"kind": "snr"}, lambda s, S: torch.ones_like(S)),
    ("epsilon", {"kind": "min_snr", "snr_gamma": 2.0}, lambda s, S: S.clamp(max=2) / S),
    ("v", {"kind": "min_snr"}, lambda s, S: S.clamp(max=5) / (S + 1)),
    ("sample", {"kind": "min_snr"}, lambda s, S: S.clamp(max=5)),
    ("epsilon", {"kind": "p2", "p2_k": 2.0, "p2_gamma": 0.5}, lambda s, S: (2 + S) ** -0.5),
    ("epsilon", {"kind": "debiased"}, lambda s, S: S**-0.5),
    ("v", {"kind": "edm", "weighting_sigma_data": 1.0}, lambda s, S: torch.ones_like(S)),
    ("edm", {"kind": "edm"}, lambda s, S: torch.ones_like(S)),
    ("edm", {"kind": "x0"}, lambda s, S: (0.5 * s) ** 2 / (s**2 + 0.25)),
    ("v", {"kind": "x0"}, lambda s, S: 1 / (S + 1)),
    ("edm", {"kind": "soft_min_snr"}, lambda s, S: (s * 0.5) ** 2 / (s**2 + 0.25) ** 2),
    ("edm", {"kind": "snr"}, lambda s, S: 0.25 / (s**2 + 0.25)),
    ("flow", {"kind": "sd3_sigma_sqrt"}, lambda s, S: s**-2),
    ("flow", {"kind": "sd3_cosmap"}, lambda s, S: 2 / (math.pi * (1 - 2 * s + 2 * s**2))),
    ("flow", {"kind": "snr"}, lambda s, S: (1 - s) ** 2),
]  # fmt: skip


@pytest.mark.parametrize("name, settings, published", PUBLISHED, ids=[f"{n}-{w['kind']}" for n, w, _ in PUBLISHED])
def test_weighting_is_the_formula_published_for_the_output(name, settings, published):
    objective = make(**FAMILY[name], weighting=settings)
    level = torch.tensor(LEVELS[FAMILY[name]["kind"]])
    alpha, sigma, _ = objective.process(level)
    ratio, (_, c_out) = snr(alpha, sigma), objective.prediction.pair(alpha, sigma)
    ours = objective.weighting(ratio, c_out**2)
    torch.testing.assert_close(ours, published(sigma, ratio).to(ours.dtype), rtol=1e-6, atol=0)
    other = published(1.2 * sigma, ratio / 1.3)
    assert torch.allclose(ours, other.to(ours.dtype), rtol=0.01) == bool((ours - ours[0]).abs().max() < 1e-9)


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap", "none"])
def test_flow_weighting_is_that_of_diffusers(name):
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    sigma = golden("diffusers_0421_pins")["sigma"].double()
    ours = make("flow", weighting={"kind": "none" if name == "none" else f"sd3_{name}"})
    weight = ours.weighting(snr(1 - sigma, sigma), sigma**2)
    compare("diffusers_0421_pins", f"sd3_weight_{name}", weight)
    torch.testing.assert_close(weight, compute_loss_weighting_for_sd3(name, sigma).double(), rtol=1e-6, atol=0)


def test_flow_levels_are_those_of_diffusers():
    """Its densities are drawn by a u of its own, which is the one without a name; logit_normal has the logit -mean."""
    data, file = golden("diffusers_0421_pins"), "diffusers_0421_pins"
    u = data["density_none_seed0"].double()
    compare(file, "density_mode_1.29_seed0", levels.mode(1.29)(u))
    normal = torch.logit(data["density_logit_normal_0_1_seed0"].double())
    moved = levels.logit_normal(0.5, 1)(torch.special.ndtr(normal))
    compare(file, "density_logit_normal_0.5_1_seed0", moved)
    for shift in (1.0, 3.0):
        inverse_cdf = make("flow", shift=shift).levels.inverse_cdf
        ours = inverse_cdf(torch.arange(1000, dtype=torch.float64) / 1000)
        compare(file, f"flow_train_sigmas_shift{shift}", ours)


@pytest.mark.parametrize("name", ["min_snr", "debiased", "snr"])
def test_weighting_weights_the_error_of_x0(name):
    """Computed without c_out: w times the squared error of the x0 that the output stands for."""
    weights = {"min_snr": lambda S: S.clamp(max=5), "debiased": torch.sqrt, "snr": lambda S: S}
    for family in FAMILY:
        objective = make(**FAMILY[family], weighting={"kind": name})
        level = torch.tensor(LEVELS[FAMILY[family]["kind"]])
        alpha, sigma, _ = objective.process(level)
        x0, noise, output = torch.randn(3, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
        error = (objective.x0(output, x_t, level) - x0).double().square().flatten(1).mean(1)
        loss = objective.loss_at(lambda x, t, output=output: output, x0, level, noise).per_sample
        torch.testing.assert_close(loss.double(), weights[name](snr(alpha, sigma)) * error, rtol=1e-4, atol=0)


# ---- losses


def test_huber_is_squared_for_small_and_absolute_for_large_errors():
    d = torch.tensor([1e-4, 1e-3, 0.5, 100.0, -100.0])
    ours = pseudo_huber(0.1).function(d)
    torch.testing.assert_close(ours[:2], d[:2] ** 2, rtol=1e-3, atol=0)
    torch.testing.assert_close(ours[3:], 2 * 0.1 * (d[3:].abs() - 0.1), rtol=1e-4, atol=0)
    exact = 2 * 0.1 * ((d[2].double() ** 2 + 0.01).sqrt() - 0.1)
    assert ours[2].item() == pytest.approx(exact.item())
    x0 = torch.zeros(2, 1, 4, 4)
    terms = make(loss={"kind": "huber"}).loss_at(lambda x, t: x * 0 + 2, x0, torch.tensor([5, 9]), x0)
    assert terms.terms.keys() == {"huber"} and terms.per_sample[0] == pytest.approx(0.2 * (math.sqrt(4.01) - 0.1))


# ---- noise


def test_input_perturbation_is_not_in_the_target():
    """Returning the plain noise costs nothing, although the input holds more."""
    random, x0, seen = PositionRandom(0, torch.arange(64)), torch.zeros(64, 3, 8, 8), []
    noise = random.normal("noise", (3, 8, 8))
    terms = make(input_perturbation=0.3).loss(lambda x, t: seen.append(x) or noise, x0, random)
    assert terms.per_sample.abs().max() == 0
    sigma = make().process.sigma[terms.level].float().view(-1, 1, 1, 1)
    assert (seen[0] / sigma - noise).std() == pytest.approx(0.3, rel=0.02)
    assert make(noise_offset=0.3).loss(lambda x, t: noise, x0, random).per_sample.mean() > 0.05


def test_pyramid_noise_has_variance_one_and_more_low_frequencies():
    random, shape = PositionRandom(0, torch.arange(512)), (1, 8, 8)
    pyramid, white = (make(pyramid_noise_discount=d).noise.sample(random, shape)[0] for d in (0.8, 0.0))
    assert pyramid.var() == pytest.approx(1, rel=0.05) and white.var() == pytest.approx(1, rel=0.03)
    strength = [0.8 ** (2 * octave) for octave in range(4)]  # sides 8, 4, 2, 1
    means = sum(s * (4**octave) / 64 for octave, s in enumerate(strength)) / sum(strength)
    assert pyramid.mean((1, 2, 3)).var() == pytest.approx(means, rel=0.3)
    assert white.mean((1, 2, 3)).var() == pytest.approx(1 / 64, rel=0.3)
    assert torch.equal(make().noise.sample(random, shape)[0], random.normal("noise", shape))
    terms = make(pyramid_noise_discount=0.8).loss(lambda x, t: pyramid, torch.zeros(512, 1, 8, 8), random)
    assert terms.per_sample.max() == 0  # the target holds it


# ---- schedulers


def test_schedulers_are_built_from_the_same_numbers():
    edm = make("edm", sigma_data=0.7).scheduler
    assert type(edm).__name__ == "EDMEulerScheduler" and edm.config.sigma_data == 0.7
    assert make(**FAMILY["edm_v"]).scheduler.config.prediction_type == "v_prediction"
    flow = make("flow", shift=3.0).scheduler
    assert type(flow).__name__ == "FlowMatchEulerDiscreteScheduler" and flow.config.shift == 3.0
    for kind in ("fixed_small", "fixed_large", "learned_range"):
        assert make(variance={"kind": kind}).scheduler.config.variance_type == kind


@pytest.mark.parametrize("name", ["edm", "edm_v"])
def test_edm_scheduler_and_training_agree(name):
    objective = make(**FAMILY[name])
    scheduler, sigma = objective.scheduler, torch.tensor([2.5], dtype=torch.float64)
    x_t, output = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = objective.x0(output, x_t, sigma)
    torch.testing.assert_close(scheduler.precondition_outputs(x_t, output, sigma.float()), ours)
    given = objective.process.scale_input(x_t, sigma)
    torch.testing.assert_close(scheduler.precondition_inputs(x_t, sigma.float()), given)
    torch.testing.assert_close(scheduler.precondition_noise(sigma.float()), objective.process(sigma)[2])


def test_flow_scheduler_and_training_agree():
    """One Euler step to 0 with the exact output lands on x0, and the shifted levels are the scheduler's."""
    objective = make("flow", shift=3.0)
    x0, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    level = objective.levels.inverse_cdf(torch.tensor([0.5], dtype=torch.float64))
    assert level.item() == pytest.approx(0.75)
    table = make("flow", shift=3.0).scheduler
    assert table.sigmas[500].item() == pytest.approx(0.75, abs=1e-3)
    alpha, sigma, time = objective.process(level)
    output = objective.prediction.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(output, noise - x0)
    x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
    torch.testing.assert_close(x_t - sigma.float() * output, x0)
    assert time.item() == pytest.approx(750)

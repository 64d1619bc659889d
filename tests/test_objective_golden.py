"""Numbers of the reference implementations: improved-diffusion (iddpm_*), generative-models (sgm_*), diffusers."""

import pytest
import torch
from pydantic import TypeAdapter

from finetune import config_objective as config
from finetune.objective import Objective, build_objective
from finetune.objective.process import per_sample, snr
from golden_numbers import compare, golden

torch.set_num_threads(1)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
IDDPM = {  # improved-diffusion scales the linear betas by 1000 / T, diffusers does not
    "linear_1000": {"beta_schedule": "linear"},
    "linear_4000": {"beta_schedule": "linear", "beta_start": 0.1 / 4000, "beta_end": 20 / 4000},
    "cosine_1000": {"beta_schedule": "squaredcos_cap_v2"},
    "cosine_4000": {"beta_schedule": "squaredcos_cap_v2"},
}


def make(kind: str = "ddpm", *, global_batch: int = 1, **settings) -> Objective:
    cfg = TypeAdapter(config.Objective).validate_python({"kind": kind, **settings})
    return build_objective(cfg, clip_sample=True, global_batch=global_batch)


def make_iddpm(name: str, **settings) -> Objective:
    return make(num_train_timesteps=int(name.split("_")[1]), **IDDPM[name], **settings)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() / reference.double() - 1).abs().max())


# ---- process


@pytest.mark.parametrize("name", IDDPM)
def test_tables_are_iddpm_s(name):
    """The betas are diffusers' float32 ones (6e-8 each), which leaves 2.3e-7; float32 products leave 1e-4 to 3e-3."""
    objective, key = make_iddpm(name), f"alphas_cumprod_{name}"
    process, reference = objective.process, golden("iddpm_schedules")[key]
    compare("iddpm_schedules", key, process.sigma**2, 1 - reference, rtol=1e-7)
    compare("iddpm_schedules", key, process.alpha[:-1] ** 2, reference[:-1], rtol=3e-7)
    # The last cosine beta is capped at 0.999, of which float32 keeps 1 - beta = 0.001 to 1.3e-5; abar there is 2e-9.
    compare("iddpm_schedules", key, process.alpha[-1:] ** 2, reference[-1:], rtol=2e-5 if "cosine" in name else 3e-7)
    assert relative(1 - objective.scheduler.alphas_cumprod.double(), 1 - reference) > 1e-4  # what we do not use


def test_iddpm_scales_linear_betas_with_the_number_of_steps():
    reference = golden("iddpm_schedules")["alphas_cumprod_linear_4000"]
    unscaled = make(num_train_timesteps=4000, beta_schedule="linear").process
    assert reference[-1] > 1e-5 > 1e-16 > unscaled.alpha[-1] ** 2


@pytest.mark.parametrize("name", ["linear_1000", "cosine_1000", "cosine_4000"])
def test_x_t_and_x0_are_iddpm_s(name):
    data, objective = golden("iddpm_posterior"), make_iddpm(name)
    level, x0, noise = data[f"t_{name}"], data["x_start"], data["noise"]
    seen = {}

    def network(x_t, time):
        seen.update(x_t=x_t, time=time)
        return noise

    assert objective.loss_at(network, x0, level, noise).per_sample.abs().max() == 0
    compare("iddpm_posterior", f"x_t_{name}", seen["x_t"], rtol=1e-6, floor=0.1)  # a sum of terms of size 1
    assert torch.equal(seen["time"], level)
    alpha, sigma, _ = objective.process(level)
    x_t = data[f"x_t_{name}"]
    # At the last level x_t is multiplied by 1/alpha = 2e4 and float32 cancels: compare at the scale of that product.
    scale = (x_t.abs().amax((1, 2, 3)) / alpha).clamp(min=1).view(-1, 1, 1, 1)
    ours, theirs = objective.prediction.x0(x_t, noise, alpha, sigma), data[f"xstart_from_eps_{name}"]
    compare("iddpm_posterior", f"xstart_from_eps_{name}", ours / scale, theirs / scale, rtol=1e-6, floor=1)
    assert (ours - x0).abs().max() < 1e-2
    eps = objective.prediction.noise(x_t, noise, alpha, sigma)
    torch.testing.assert_close(eps, noise, rtol=1e-6, atol=1e-6)
    wrong = make_iddpm(name, prediction_type="v_prediction").prediction.x0(x_t, noise, alpha, sigma)
    assert (wrong - x0).abs().max() > 0.1


def test_add_noise_velocity_and_snr_are_diffusers():
    """diffusers works from float32 alphas_cumprod, whose 1 - abar has few digits left at the first levels."""
    data = golden("diffusers_0421_pins")
    objective = make(**SD, prediction_type="v_prediction")
    alpha, sigma, _ = objective.process(data["t"])
    compare("diffusers_0421_pins", "snr_sd", snr(alpha, sigma), rtol=5e-5)
    velocity = objective.prediction.target(data["x0"], data["noise"], alpha, sigma)
    compare("diffusers_0421_pins", "velocity_sd", velocity, rtol=2e-5, floor=0.1)
    x_t = per_sample(alpha, data["x0"]) * data["x0"] + per_sample(sigma, data["x0"]) * data["noise"]
    compare("diffusers_0421_pins", "add_noise_sd", x_t, rtol=2e-5, floor=0.1)
    zero = make(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    alpha, sigma, _ = zero.process(torch.arange(1000))
    # diffusers rescales in float32, whose rounding differs between machines: 2e-7 against the one that made the pin.
    compare("diffusers_0421_pins", "alphas_cumprod_sd_zero_terminal", alpha**2, rtol=1e-6, floor=1)
    compare("diffusers_0421_pins", "snr_sd_zero_terminal", snr(alpha, sigma)[data["t"]], rtol=1e-5, floor=1e-2)
    assert zero.process.alpha[-1] == 0 == data["alphas_cumprod_sd_zero_terminal"][-1]


# ---- loss

CASES = [
    ("linear1000_EPSILON_FIXED_SMALL_MSE", "epsilon"),
    ("linear1000_EPSILON_FIXED_LARGE_MSE", "epsilon"),
    # With a learned variance, the mse term and the gradient of the mean head are those of the plain loss.
    ("linear1000_EPSILON_LEARNED_RANGE_RESCALED_MSE", "epsilon"),
    ("cosine1000_EPSILON_LEARNED_RANGE_MSE", "epsilon"),
    ("cosine4000_EPSILON_LEARNED_RANGE_MSE", "epsilon"),
    ("linear1000_START_X_LEARNED_RANGE_RESCALED_MSE", "sample"),
]


@pytest.mark.parametrize("case, prediction_type", CASES)
def test_loss_and_gradient_are_iddpm_s(case, prediction_type):
    data = golden("iddpm_losses")
    schedule = f"{case[:6]}_{case[6:10]}"
    level = data[f"t_{case[6:10]}"]

    def run(prediction_type: str):
        output = data["model_output"][:, :3].clone().requires_grad_()
        objective = make_iddpm(schedule, prediction_type=prediction_type)
        terms = objective.loss_at(lambda x_t, time: output, data["x_start"], level, data["noise"])
        terms.per_sample.sum().backward()
        return terms, output.grad.flatten(1).norm(dim=1)

    terms, gradient = run(prediction_type)
    compare("iddpm_losses", f"{case}/mse", terms.terms["mse"])
    compare("iddpm_losses", f"{case}/mse", terms.per_sample)
    compare("iddpm_losses", f"{case}/grad_mean", gradient)
    other, _ = run("v_prediction")
    assert not torch.allclose(other.per_sample, data[f"{case}/mse"], rtol=0.01)


@pytest.mark.parametrize("prediction_type, case", [("epsilon", "eps_discrete"), ("v_prediction", "v_discrete")])
def test_loss_is_sgm_s(prediction_type, case):
    """SGM noises variance-exploding, scales the input by c_in and weights the x0 error: the same loss in VP."""
    data = golden("sgm_loss")
    level = data["idx"]

    def network(x_t, time):
        return torch.tanh(0.5 * x_t) + 0.1 * time.view(-1, 1, 1, 1) / 1000

    loss = make(**SD, prediction_type=prediction_type).loss_at(network, data["input"], level, data["noise"]).per_sample
    compare("sgm_loss", f"{case}/l2/loss", loss)
    wrong = make(**SD, prediction_type="sample").loss_at(network, data["input"], level, data["noise"]).per_sample
    assert not torch.allclose(wrong, data[f"{case}/l2/loss"], rtol=0.01)

"""The variational bound: numbers of improved-diffusion, and what the bound of known data must be."""

import math

import pytest
import torch

from finetune.config import AdamW
from finetune.config_objective import space_timesteps
from finetune.objective.likelihood import (
    _normal_cdf,
    bits,
    bits_per_dim,
    check_8_bit,
    discretized_gaussian_log_likelihood,
    normal_kl,
    prior_bits,
)
from finetune.objective.process import per_sample
from finetune.optimization import learning_rate
from golden_numbers import compare, golden
from test_objective_golden import make, make_iddpm

torch.set_num_threads(1)
CAPPED = 2e-5
"""The last cosine beta is 0.999, of which diffusers' float32 keeps 1 - beta to 1.3e-5; the bound there is in the
thousands. All other levels agree ten times as closely."""


def compare_levels(file: str, name: str, ours: torch.Tensor, theirs=None, *, floor: float = 1.0) -> None:
    """compare, with the tolerance CAPPED for the last level if the schedule is cosine; a bound, and a log variance, is
    a sum of terms of about 1, hence the floor."""
    theirs = golden(file)[name] if theirs is None else theirs
    compare(file, name, ours[:-1], theirs[:-1], floor=floor)
    compare(file, name, ours[-1:], theirs[-1:], rtol=CAPPED if "cosine" in name else 1e-6, floor=floor)


# ---- tables and posterior


@pytest.mark.parametrize("name", ["linear_1000", "cosine_1000", "linear_4000", "cosine_4000"])
def test_posterior_tables_are_iddpm_s(name):
    data, posterior = golden("iddpm_schedules"), make_iddpm(name).posterior
    tables = {"posterior_log_variance_clipped": posterior.log_variance, "betas": posterior.log_beta.exp()}
    if name.endswith("1000"):
        tables |= {
            "posterior_variance": posterior.log_variance.exp(),
            "posterior_mean_coef1": posterior.coefficient_x0,
            "posterior_mean_coef2": posterior.coefficient_x_t,
        }
    for key, ours in tables.items():
        first = 1 if key == "posterior_variance" else 0  # theirs is 0 at level 0, which has no log: see Posterior
        theirs = data[f"{key}_{name}"]
        compare_levels("iddpm_schedules", f"{key}_{name}", ours[first:], theirs[first:], floor=0)


@pytest.mark.parametrize("name", ["linear_1000", "cosine_1000", "cosine_4000"])
def test_posterior_is_iddpm_s(name):
    data, objective = golden("iddpm_posterior"), make_iddpm(name)
    level, x0, x_t = data[f"t_{name}"], data["x_start"], data[f"x_t_{name}"]
    posterior, (alpha, sigma, _) = objective.posterior, objective.process(level)
    mean = posterior.mean(x0, x_t, level)
    compare_levels("iddpm_posterior", f"posterior_mean_{name}", mean)
    log_variance = per_sample(posterior.log_variance[level], x0).expand_as(x0)
    compare_levels("iddpm_posterior", f"posterior_log_variance_clipped_{name}", log_variance)
    posterior_variance, theirs = log_variance.exp()[level > 0], data[f"posterior_variance_{name}"][level > 0]
    compare("iddpm_posterior", f"posterior_variance_{name}", posterior_variance, theirs)
    compare("iddpm_posterior", f"q_mean_{name}", per_sample(alpha, x0) * x0, floor=1)
    variance = per_sample(sigma**2, x0).expand_as(x0)
    compare("iddpm_posterior", f"q_variance_{name}", variance)
    compare("iddpm_posterior", f"q_log_variance_{name}", variance.log(), floor=0.1)
    noise = x_t - per_sample(alpha, x0) * x0  # a difference of terms of size 1: compared at that size
    theirs = data[f"eps_from_xstart_{name}"] * per_sample(sigma, x0)
    compare("iddpm_posterior", f"eps_from_xstart_{name}", noise, theirs, floor=1)


# ---- losses

CASES = sorted({key.rsplit("/", 1)[0] for key in golden("iddpm_losses") if key.endswith("/loss")})
PREDICTIONS = {"EPSILON": "epsilon", "START_X": "sample", "PREVIOUS_X": None}


def parsed(case: str):
    schedule, rest = case.split("_", 1)
    mean = next(name for name in PREDICTIONS if rest.startswith(name))
    variance = next(
        name for name in ("LEARNED_RANGE", "LEARNED", "FIXED_SMALL", "FIXED_LARGE")
        if rest.removeprefix(f"{mean}_").startswith(name)
    )  # fmt: skip
    return f"{schedule[:6]}_{schedule[6:]}", mean, variance, rest.removeprefix(f"{mean}_{variance}_")


DIRECT = [case for case in CASES if (p := parsed(case))[1] != "PREVIOUS_X" and p[2] != "LEARNED"]


def vb_loss(variance: str, loss: str) -> str:
    return "none" if (variance[:5], loss) == ("FIXED", "MSE") else loss.lower()


def run_case(case: str, loss: str | None = None):
    data, (schedule, mean, variance, reference_loss) = golden("iddpm_losses"), parsed(case)
    settings = {"kind": variance.lower(), "vb_loss": vb_loss(variance, loss or reference_loss)}
    objective = make_iddpm(schedule, prediction_type=PREDICTIONS[mean], variance=settings)
    channels = 6 if variance == "LEARNED_RANGE" else 3
    output = data["model_output"][:, :channels].clone().requires_grad_()
    level = data[f"t_{schedule.split('_')[1]}"]
    terms = objective.loss_at(lambda x_t, time: output, data["x_start"], level, data["noise"])
    terms.per_sample.sum().backward()
    return data, terms, output.grad


@pytest.mark.parametrize("case", DIRECT)
def test_loss_and_gradient_are_iddpm_s(case):
    data, terms, gradient = run_case(case)
    floor = float(case[6:10]) if case.endswith("RESCALED_KL") else 1.0  # terms of about 1, times T
    compare_levels("iddpm_losses", f"{case}/loss", terms.per_sample, floor=floor)
    for name in terms.terms.keys() & {"mse", "vb"}:
        if f"{case}/{name}" in data:
            compare_levels("iddpm_losses", f"{case}/{name}", terms.terms[name], floor=floor)
    # The mean head has no gradient of the bound in the losses that are called MSE, and has it in the KL losses.
    compare_levels("iddpm_losses", f"{case}/grad_mean", gradient[:, :3].flatten(1).norm(dim=1), floor=floor)
    if f"{case}/grad_var" in data:
        compare_levels("iddpm_losses", f"{case}/grad_var", gradient[:, 3:].flatten(1).norm(dim=1), floor=floor)
    if f"{case}/grad_full" in data:
        compare("iddpm_losses", f"{case}/grad_full", gradient, floor=0.1)  # differences of terms of about 1


def test_there_are_twenty_cases_and_another_loss_is_not_them():
    assert len(CASES) == 26 and len(DIRECT) == 20
    case = "cosine4000_EPSILON_LEARNED_RANGE_RESCALED_MSE"
    for other in ("MSE", "KL", "RESCALED_KL"):
        data, terms, gradient = run_case(case, other)
        assert not torch.allclose(terms.per_sample, data[f"{case}/loss"], rtol=0.01)
    assert not torch.allclose(gradient[:, :3].flatten(1).norm(dim=1), data[f"{case}/grad_mean"], rtol=0.01)


@pytest.mark.parametrize("case", [case for case in CASES if case not in DIRECT])
def test_bound_of_variances_and_means_that_diffusers_cannot_sample(case):
    """LEARNED gives the log variance itself, PREVIOUS_X the mean of p: settings of improved-diffusion that no
    scheduler of diffusers samples, so they are not offered; the functions under them give their losses all the same."""
    data, (schedule, mean_type, variance, loss) = golden("iddpm_losses"), parsed(case)
    objective = make_iddpm(schedule, variance={"kind": "learned_range"})
    posterior, level, x0 = objective.posterior, data["t_1000"], data["x_start"]
    alpha, sigma, _ = objective.process(level)
    x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * data["noise"]
    leaf = data["model_output"].requires_grad_()
    output, log_variance = leaf.chunk(2, dim=1)
    if variance == "LEARNED_RANGE":
        log_variance = posterior.model_log_variance(level, x0, log_variance)
    mean_output = output.detach() if loss.endswith("MSE") else output
    if mean_type == "PREVIOUS_X":
        mean, target = mean_output, posterior.mean(x0, x_t, level)
    else:
        predicted = objective.prediction.x0(x_t, mean_output, alpha, sigma)
        mean, target = posterior.mean(predicted, x_t, level), data["noise"]
    vb = posterior.bound_of(x0, x_t, level, mean=mean, log_variance=log_variance)
    mse = (output - target).square().flatten(1).mean(1)
    total = {"MSE": mse + vb, "RESCALED_MSE": mse + vb, "KL": vb, "RESCALED_KL": 1000 * vb}[loss]
    total.sum().backward()
    gradient = leaf.grad.split(3, dim=1)
    found = {"loss": total, "mse": mse, "vb": vb}
    found |= {"grad_mean": gradient[0].flatten(1).norm(dim=1), "grad_var": gradient[1].flatten(1).norm(dim=1)}
    for name, ours in found.items():
        if f"{case}/{name}" in data:
            scale = 1000 if loss == "RESCALED_KL" else 1  # gradients of the terms of about 1, times T
            compare("iddpm_losses", f"{case}/{name}", ours, rtol=1e-6, floor=scale)


# ---- likelihood


def test_likelihood_functions_are_iddpm_s():
    data = golden("iddpm_likelihood")
    x, means, log_scales = data["x"], data["means"], data["log_scales"]
    ours = discretized_gaussian_log_likelihood(x, means, log_scales)
    compare("iddpm_likelihood", "discretized_gaussian_log_likelihood", ours, rtol=5e-6, floor=0.1)  # of cdfs
    compare("iddpm_likelihood", "approx_standard_normal_cdf", _normal_cdf(data["cdf_in"]), floor=0.1)  # 1 + tanh
    kl = normal_kl(means, 2 * log_scales, data["kl_mean2"], data["kl_logvar2"])
    compare("iddpm_likelihood", "normal_kl", kl, floor=1)
    assert not torch.allclose(normal_kl(data["kl_mean2"], data["kl_logvar2"], means, 2 * log_scales), data["normal_kl"])


def test_discretized_likelihood_is_a_distribution_over_256_values():
    x = (torch.arange(256) / 127.5 - 1).view(1, -1)
    for mean, scale in [(0.0, 0.01), (0.3, 0.1), (-1.2, 0.3)]:
        log = discretized_gaussian_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, math.log(scale)))
        assert log.exp().sum() == pytest.approx(1, abs=1e-5)
        nearest = ((mean + 1) * 127.5) if mean > -1 else 0
        assert abs(int(log.argmax()) - nearest) < 1


@pytest.mark.parametrize("case", ["linear40_clip1", "linear40_clip0", "cosine40_clip1", "cosine40_clip0",
                                  "linear40_FIXED_LARGE", "linear40_FIXED_SMALL"])  # fmt: skip
def test_bits_per_dim_are_iddpm_s(case):
    data = golden("iddpm_bpd")
    fixed = case.removeprefix("linear40_").lower() if "FIXED" in case else None
    schedule = {"beta_schedule": "linear", "scale_betas": True}
    objective = make(
        num_train_timesteps=40,
        variance={"kind": fixed or "learned_range"},
        **(schedule if case.startswith("linear") else {"beta_schedule": "squaredcos_cap_v2"}),
    )

    def fake(x, t):
        t = t.view(-1, 1, 1, 1).float()
        mean, variance = 0.3 * x + 0.2 * torch.sin(x + 0.01 * t), 0.5 * torch.cos(2 * x - 0.02 * t)
        return mean if fixed else torch.cat([mean, variance], 1)

    result = bits_per_dim(objective, fake, data["x_start"], data["noises"], clip_denoised=not case.endswith("clip0"))
    names = {"total": "total_bpd", "prior": "prior_bpd", "vb": "vb", "x0_mse": "xstart_mse", "noise_mse": "mse"}
    for ours, theirs in names.items():
        if f"{case}/{theirs}" in data:
            capped = case == "cosine40_clip0"  # the last level is in each sum
            compare("iddpm_bpd", f"{case}/{theirs}", result[ours], rtol=CAPPED if capped else 1e-6, floor=1)


@pytest.mark.parametrize("name", ["linear_1000", "cosine_1000", "cosine_4000"])
def test_prior_is_iddpm_s(name):
    prior = prior_bits(make_iddpm(name).process, golden("iddpm_bpd")["x_start"])
    compare("iddpm_bpd", f"prior_bpd_{name.replace('_', '')}", prior, rtol=1e-7, floor=1)  # 1 - 1


def test_bound_is_what_gaussian_data_cost():
    """If the network knows x0 exactly, q = p at every level but 0, which costs the bits of its own variance."""
    objective = make(num_train_timesteps=40, scale_betas=True)
    x0 = ((torch.arange(48) * 5 % 256) / 127.5 - 1).view(1, 3, 4, 4)
    noises = torch.randn(40, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def oracle(x_t, time):
        alpha, sigma, _ = objective.process(time)
        return (x_t - alpha.float().view(-1, 1, 1, 1) * x0) / sigma.float().view(-1, 1, 1, 1)

    result = bits_per_dim(objective, oracle, x0, noises)
    assert result["vb"][:, :-1].abs().max() < 1e-4 and result["vb"][0, -1] > 0
    worse = bits_per_dim(objective, lambda *a: oracle(*a) + 0.1, x0, noises)
    assert (worse["vb"] > result["vb"]).all()


def test_what_is_no_8_bit_picture_is_refused():
    objective = make(num_train_timesteps=4, beta_end=0.1, variance={"kind": "learned_range"})
    good = (torch.arange(48) / 127.5 - 1).view(1, 3, 4, 4)
    check_8_bit(good)
    network = lambda x_t, time: torch.cat([x_t, x_t], 1)  # noqa: E731
    for bad in (good + 0.001, good * 0.18215, good + 2, good / 2):
        with pytest.raises(ValueError, match="8-bit"):
            bits_per_dim(objective, network, bad, torch.zeros(4, 1, 3, 4, 4))
        with pytest.raises(ValueError, match="8-bit"):
            objective.loss_at(network, bad, torch.tensor([0]), torch.zeros_like(bad))
        assert objective.loss_at(network, bad, torch.tensor([1]), torch.zeros_like(bad)).per_sample.isfinite()
    with pytest.raises(ValueError, match="ddpm"):
        bits_per_dim(make("flow"), lambda x_t, time: x_t, good, torch.zeros(4, 1, 3, 4, 4))


def test_output_must_have_both_halves():
    objective, x0 = make(variance={"kind": "learned_range"}), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="out_channels to twice"):
        objective.loss_at(lambda x_t, time: x_t, x0, torch.tensor([5, 6]), x0)
    assert objective.x0(torch.zeros(2, 6, 4, 4), x0, torch.tensor([5, 6])).shape == x0.shape


# ---- respacing


@pytest.mark.parametrize("key", sorted(golden("iddpm_space_timesteps")))
def test_kept_timesteps_are_iddpm_s(key):
    total, counts = key[1:].split(":")
    compare("iddpm_space_timesteps", key, space_timesteps(int(total), counts), rtol=0)


@pytest.mark.parametrize("respacing", ["ddim999", "1001", "600,600", "a", "ddim", "", "10,-1", "0", "ddim10,20"])
def test_respacing_that_cannot_be_is_refused(respacing):
    with pytest.raises(ValueError):
        space_timesteps(1000, respacing)
    with pytest.raises(ValueError, match="respacing"):
        make(respacing=respacing)


RESPACED = sorted({key.split("/")[0] for key in golden("iddpm_sampling_loop") if "/" in key})


@pytest.mark.parametrize("case", RESPACED)
def test_respaced_process_is_iddpm_s(case):
    data = golden("iddpm_sampling_loop")
    _, schedule, respacing = case.split("_")
    total = int(schedule[6:])
    settings = {"linear": {"scale_betas": True}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}[schedule[:6]]
    objective = make(num_train_timesteps=total, respacing=respacing, rescale_timesteps=True, **settings)
    compare("iddpm_sampling_loop", f"{case}/timestep_map", objective.process.timesteps, rtol=0)
    compare("iddpm_sampling_loop", f"{case}/betas", objective.posterior.log_beta.exp())
    levels = torch.arange(len(data[f"{case}/betas"])).flip(0)  # sampled from the last to the first
    compare("iddpm_sampling_loop", f"{case}/timesteps_seen_by_model", objective.process(levels)[2])


def test_scale_betas_is_iddpm_s_rule():
    objective = make(num_train_timesteps=4000, scale_betas=True)
    compare("iddpm_schedules", "alphas_cumprod_linear_4000", objective.process.alphas_cumprod)
    assert objective.scheduler.config.beta_end == pytest.approx(20 / 4000)


# ---- the real training loop


@pytest.mark.parametrize("case, micro_batches", [("hybrid_full", 1), ("hybrid_microbatch", 2)])
def test_trajectory_is_that_of_the_real_train_loop(case, micro_batches):
    """Eight steps of improved-diffusion's TrainLoop: hybrid loss, cosine T = 100, AdamW annealed linearly.

    It sums the gradients of micro-batches, we take the mean: the norms differ by the number of micro-batches, and AdamW
    makes the same step of both if its epsilon is divided by that number too. With the same epsilon the smallest
    gradients, 9e-8 here, make steps that differ by 5%.
    """
    data = {k.removeprefix(f"{case}/"): v for k, v in golden("iddpm_trainloop").items()}
    rate = learning_rate(AdamW(learning_rate=1e-3, lr_scheduler="linear", lr_warmup_steps=0), 8)
    conv, s = torch.nn.Conv2d(3, 6, 1), torch.nn.Parameter(torch.zeros(1, 6, 1, 1))
    with torch.no_grad():
        conv.weight.copy_(data["init_weight"]), conv.bias.copy_(data["init_bias"])
    parameters = [s, conv.weight, conv.bias]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, eps=1e-8 / micro_batches)
    settings = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "rescale_timesteps": True}
    objective = make(**settings, variance={"kind": "learned_range", "vb_loss": "rescaled_mse"})
    norms, trajectory = [], []
    for step in range(8):
        network = lambda x_t, time: conv(x_t) + time.view(-1, 1, 1, 1) / 1000 * s  # noqa: E731
        optimizer.zero_grad()
        for micro, images in enumerate(data["images"][step].chunk(micro_batches)):
            row = step * micro_batches + micro
            terms = objective.loss_at(network, images, data["t"][row], data["noise"][row])
            ((terms.per_sample * terms.weight).mean() / micro_batches).backward()
        norms.append(micro_batches * torch.cat([p.grad.flatten() for p in parameters]).norm())
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        trajectory.append(torch.cat([p.detach().flatten() for p in parameters]))
    compare("iddpm_trainloop", f"{case}/lr", [rate(step) for step in range(8)], rtol=1e-12)
    compare("iddpm_trainloop", f"{case}/grad_norm", torch.stack(norms))
    compare("iddpm_trainloop", f"{case}/params", torch.stack(trajectory), rtol=2e-6, floor=0.1)  # weights of 0.1


def test_bits_are_means_over_the_dimensions():
    assert bits(torch.full((2, 3, 4, 4), math.log(2))).tolist() == pytest.approx([1, 1])

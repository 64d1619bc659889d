"""The objective against analytic answers."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.config_objective import DDPM
from finetune.objective import build_objective
from finetune.objective.prediction import Prediction
from finetune.objective.process import NoiseProcess, snr
from finetune.objective.weighting import min_snr
from finetune.seeding import PositionRandom
from test_objective_golden import SD, make

torch.set_num_threads(1)
SRC = Path(__file__).parents[1] / "src" / "finetune"
TYPES = ["epsilon", "sample", "v_prediction"]
MIN_SNR = {"kind": "min_snr", "snr_gamma": 5.0}


def zero_network(x_t, time):
    return torch.zeros_like(x_t)


# ---- parametrisation


@pytest.mark.parametrize(
    "prediction_type, zero_snr", [(p, z) for p in TYPES for z in (False, True) if (p, z) != ("epsilon", True)]
)
def test_target_recovers_x0_and_noise_at_every_level(prediction_type, zero_snr):
    objective = make(**SD, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    alpha, sigma, _ = objective.process(torch.arange(1000))
    x0, noise = torch.randn(2, 1000, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise
    prediction = objective.prediction
    target = prediction.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(prediction.x0(x_t, target, alpha, sigma), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(prediction.noise(x_t, target, alpha, sigma), noise, rtol=0, atol=1e-11)
    other = Prediction(TYPES[TYPES.index(prediction_type) - 1])
    assert (other.x0(x_t, target, alpha, sigma)[:-1] - x0[:-1]).abs().mean() > 0.1


def test_targets_are_the_textbook_ones():
    objective = make()
    alpha, sigma, _ = objective.process(torch.tensor([0, 500, 999]))
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    a, s = (c.float().view(-1, 1, 1, 1) for c in (alpha, sigma))
    for prediction_type, target in [("epsilon", noise), ("sample", x0), ("v_prediction", a * noise - s * x0)]:
        torch.testing.assert_close(Prediction(prediction_type).target(x0, noise, alpha, sigma), target)
    with pytest.raises(ValueError, match="prediction_type"):
        Prediction("velocity").target(x0, noise, alpha, sigma)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_exact_denoiser_reaches_theory(prediction_type):
    """x0 ~ N(0, s^2): E[x0 | x_t] = alpha s^2 x_t / V, V = alpha^2 s^2 + sigma^2, and its error is s^2 sigma^2 / V."""
    std, n = 0.5, 4096
    objective = make(prediction_type=prediction_type)
    for t in (20, 300, 900):
        alpha, sigma, _ = objective.process(torch.tensor([t]))
        variance = alpha**2 * std**2 + sigma**2

        def exact(x_t, time, alpha=alpha, sigma=sigma, variance=variance):
            x0 = (alpha * std**2 / variance) * x_t.double()
            noise = (sigma / variance) * x_t.double()
            return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[prediction_type]

        bayes = float(std**2 * sigma**2 / variance)
        theory = bayes * {
            "epsilon": float(alpha / sigma) ** 2,
            "sample": 1.0,
            "v_prediction": 1 / float(sigma) ** 2,
        }[prediction_type]
        random = PositionRandom(t, torch.arange(n))
        x0 = std * random.normal("data", (1, 4, 4))
        level, noise = torch.full((n,), t), random.normal("noise", (1, 4, 4))
        loss = objective.loss_at(exact, x0, level, noise).per_sample.mean().item()
        assert loss == pytest.approx(theory, rel=5 * (2 / (16 * n)) ** 0.5)
        off = objective.loss_at(lambda *a, f=exact: f(*a) + 0.1, x0, level, noise).per_sample.mean().item()
        # A bias costs its square; the cross term is 0.2 times the mean of 16 n residuals of variance `theory`.
        assert off - loss == pytest.approx(0.1**2, abs=5 * 0.2 * (theory / (16 * n)) ** 0.5)
        if prediction_type != "sample" and t < 900:  # at 900 almost no signal is left, and all targets look alike
            wrong = make(prediction_type="sample").loss_at(exact, x0, level, noise).per_sample.mean().item()
            assert abs(wrong / theory - 1) > 0.05


# ---- weighting


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_published_formula(gamma):
    process = make().process
    alpha, sigma, _ = process(torch.arange(1000))
    ratio = snr(alpha, sigma)
    torch.testing.assert_close(ratio, alpha**2 / (1 - alpha**2), rtol=1e-8, atol=0)
    capped = torch.minimum(ratio, torch.tensor(gamma, dtype=torch.float64))
    published = {"epsilon": capped / ratio, "v_prediction": capped / (ratio + 1), "sample": capped}
    for prediction_type, weight in published.items():
        _, c_out = Prediction(prediction_type).pair(alpha, sigma)
        torch.testing.assert_close(min_snr(gamma)(ratio, c_out**2), weight, rtol=1e-9, atol=0)
        _, other = Prediction("epsilon" if prediction_type == "sample" else "sample").pair(alpha, sigma)
        assert not torch.allclose(min_snr(gamma)(ratio, other**2), weight, rtol=0.1)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_min_snr_weights_the_x0_error(prediction_type):
    """The loss is min(SNR, gamma) times the squared error of x0, computed without c_out."""
    objective = make(prediction_type=prediction_type, weighting=MIN_SNR)
    level = torch.tensor([50, 400, 800])
    x0, noise, output = torch.randn(3, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    terms = objective.loss_at(lambda x_t, time: seen.append(x_t) or output, x0, level, noise)
    alpha, sigma, _ = objective.process(level)
    error = objective.prediction.x0(seen[0], output, alpha, sigma) - x0
    expected = snr(alpha, sigma).clamp(max=5) * error.double().square().flatten(1).mean(1)
    torch.testing.assert_close(terms.per_sample.double(), expected, rtol=1e-4, atol=0)
    plain = make(prediction_type=prediction_type).loss_at(lambda *a: output, x0, level, noise)
    assert torch.equal(plain.per_sample, terms.terms["mse"]) and not torch.allclose(plain.per_sample, terms.per_sample)


# ---- zero terminal signal-to-noise ratio


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("weighting", [{"kind": "none"}, MIN_SNR])
def test_zero_terminal_snr_is_exact_and_finite(schedule, weighting):
    objective = make(
        beta_schedule=schedule, prediction_type="v_prediction", rescale_betas_zero_snr=True, weighting=weighting
    )
    assert objective.process.alpha[-1] == 0 and objective.process.sigma[-1] == 1
    assert objective.scheduler.alphas_cumprod[-1] == 0  # what it samples with
    assert make(beta_schedule=schedule).process.alpha[-1] > 0
    objective.scheduler.set_timesteps(10)
    assert objective.scheduler.timesteps[0] == 999
    x0, noise = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    terms = objective.loss_at(zero_network, x0, torch.tensor([999, 998, 1, 0]), noise)
    assert terms.per_sample.isfinite().all()
    # v = alpha noise - sigma x0 = -x0 at the end; min(S, g) / (S + 1) is 0 there.
    torch.testing.assert_close(terms.terms["mse"][0], x0[0].square().mean())
    assert (terms.per_sample[0] == 0) == (weighting is MIN_SNR)


def test_epsilon_with_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="v_prediction"):
        make(prediction_type="epsilon", rescale_betas_zero_snr=True)


# ---- the loss


def test_loss_is_loss_at_with_the_draws_of_the_positions():
    objective = make(noise_offset=0.1)
    random = PositionRandom(0, torch.arange(6) + 1000)
    x0 = PositionRandom(1, torch.arange(6)).normal("data", (3, 8, 8))
    terms = objective.loss(zero_network, x0, random)
    noise = random.normal("noise", (3, 8, 8)) + 0.1 * random.normal("offset_noise", (3, 1, 1))
    again = objective.loss_at(zero_network, x0, random.integers("level", 1000), noise)
    assert torch.equal(terms.per_sample, again.per_sample) and torch.equal(terms.level, again.level)
    assert torch.equal(terms.weight, torch.ones(6)) and torch.equal(again.weight, torch.ones(6))
    for half in (slice(0, 3), slice(3, 6)):
        part = objective.loss(zero_network, x0[half], PositionRandom(0, (torch.arange(6) + 1000)[half]))
        assert torch.equal(part.per_sample, terms.per_sample[half])
    moved = objective.loss(zero_network, x0, PositionRandom(0, torch.arange(6) + 1001))
    assert not torch.equal(moved.per_sample, terms.per_sample)


def test_levels_are_uniform():
    n, steps = 20000, 10
    objective = make(num_train_timesteps=steps)
    level, weight = objective.levels.sample(PositionRandom(0, torch.arange(n)))
    counts = torch.bincount(level, minlength=steps)
    assert len(counts) == steps and (counts - n / steps).abs().max() < 5 * (n * 0.09) ** 0.5
    assert weight.unique().tolist() == [1]


def test_fraction_is_the_place_among_the_levels():
    fraction = make().process.fraction(torch.tensor([0, 250, 999]))
    assert fraction.tolist() == pytest.approx([0, 0.25, 0.999]) and fraction.dtype == torch.float32


def test_offset_noise_is_in_the_target():
    """Returning what was really added costs nothing; returning only the plain noise costs the offset."""
    random, x0 = PositionRandom(0, torch.arange(64)), torch.zeros(64, 3, 8, 8)
    objective = make(noise_offset=0.3)

    def solve(x_t, time):  # x0 = 0, so the noise is x_t / sigma
        return x_t / objective.process.sigma[time].float().view(-1, 1, 1, 1)

    assert objective.loss(solve, x0, random).per_sample.max() < 1e-10
    plain = objective.loss(lambda x_t, time: random.normal("noise", (3, 8, 8)), x0, random).per_sample.mean()
    assert plain == pytest.approx(0.3**2, rel=5 * (2 / (3 * 64)) ** 0.5)
    assert make().loss(lambda x_t, time: random.normal("noise", (3, 8, 8)), x0, random).per_sample.max() < 1e-10


def test_offset_noise_is_constant_over_the_picture():
    seen = []
    for offset in (0.0, 0.5):
        make(noise_offset=offset).loss(
            lambda x_t, time: seen.append(x_t) or x_t, torch.zeros(4, 3, 8, 8), PositionRandom(0, torch.arange(4))
        )
    added = seen[1] - seen[0]
    assert added.flatten(2).std(2).max() < 1e-6 and added.mean((2, 3)).unique().numel() == 12


def test_bfloat16_data_keep_their_noise():
    """diffusers' add_noise in bfloat16 rounds abar to 1 and adds none for the first levels."""
    objective, level = make(**SD), torch.arange(4)
    noise, seen = torch.ones(4, 3, 4, 4, dtype=torch.bfloat16), []

    def network(x_t, time):
        seen.append(x_t)
        return noise

    x0 = torch.zeros(4, 3, 4, 4, dtype=torch.bfloat16)
    terms = objective.loss_at(network, x0, level, noise)
    assert terms.per_sample.dtype == seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0][:, 0, 0, 0], objective.process.sigma[:4].float(), rtol=1e-6, atol=0)
    assert objective.scheduler.add_noise(x0, noise, level)[0].abs().max() == 0


def test_network_gets_the_integer_timestep_and_gradients_flow():
    objective, level = make(), torch.tensor([0, 7, 999])
    weight = torch.nn.Parameter(torch.zeros(()))

    def network(x_t, time):
        assert x_t.dtype == torch.float32 and time.dtype == torch.int64 and torch.equal(time, level)
        return weight * x_t

    x0, noise = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    terms = objective.loss_at(network, x0, level, noise)
    terms.per_sample.sum().backward()
    assert weight.grad != 0 and not terms.terms["mse"].requires_grad


def test_wrong_output_shape_and_level_are_refused():
    objective, x0 = make(), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="out_channels"):  # [2, 1, 4, 4] would broadcast silently
        objective.loss_at(lambda x_t, time: x_t[:, :1], x0, torch.tensor([0, 1]), x0)
    for level in (-1, 1000):  # -1 would index the last level
        with pytest.raises(AssertionError):
            objective.loss_at(zero_network, x0, torch.tensor([0, level]), x0)
    with pytest.raises(AssertionError):
        NoiseProcess(objective.scheduler.alphas_cumprod)


# ---- the scheduler


def test_sampling_does_not_change_training():
    objective, x0 = make(), torch.ones(4, 3, 4, 4)
    before = objective.loss_at(zero_network, x0, torch.tensor([0, 10, 500, 999]), x0).per_sample
    scheduler = objective.scheduler
    scheduler.set_timesteps(5)
    sample = x0
    for t in scheduler.timesteps:
        sample = scheduler.step(sample * 0, t, sample).prev_sample
    scheduler.betas.zero_()
    scheduler.alphas_cumprod.zero_()
    after = objective.loss_at(zero_network, x0, torch.tensor([0, 10, 500, 999]), x0).per_sample
    assert torch.equal(before, after)


def test_scheduler_carries_the_settings():
    config = make(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False).scheduler.config
    assert config.prediction_type == "v_prediction" and config.beta_schedule == "scaled_linear"
    assert (config.beta_start, config.beta_end, config.num_train_timesteps) == (0.00085, 0.012, 1000)
    assert config.rescale_betas_zero_snr and config.timestep_spacing == "trailing" and not config.clip_sample
    config = make().scheduler.config
    assert config.timestep_spacing == "leading" and config.clip_sample and config.variance_type == "fixed_small"


@pytest.mark.parametrize("setting, default, clips", [(None, True, True), (None, False, False), (True, False, True)])
def test_clip_sample_unset_takes_the_space_s(setting, default, clips):
    assert build_objective(DDPM(clip_sample=setting), clip_sample=default).scheduler.config.clip_sample is clips


@pytest.mark.parametrize("prediction_type", TYPES)
def test_scheduler_and_training_agree_on_the_parametrisation(prediction_type):
    """The exact output makes the scheduler recover x0."""
    objective = make(prediction_type=prediction_type, clip_sample=False)
    x0, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (0, 400, 999):
        alpha, sigma, _ = objective.process(torch.tensor([t]))
        target = objective.prediction.target(x0, noise, alpha, sigma)
        x_t = alpha.float() * x0 + sigma.float() * noise
        torch.testing.assert_close(
            objective.scheduler.step(target, t, x_t).pred_original_sample, x0, rtol=1e-3, atol=1e-3
        )


# ---- rules


def test_objective_imports_only_torch_and_what_is_below_it():
    allowed = ("torch", "finetune.objective", "finetune.config", "finetune.seeding", "diffusers")
    allowed += ("finetune.errors", "finetune.own_code", "finetune.transfer")
    standard = sys.stdlib_module_names
    for file in [*(SRC / "objective").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in standard or name.startswith(allowed), f"{file.name} imports {name}"
            if isinstance(node, ast.ImportFrom) and node.module.startswith("diffusers"):
                assert all(a.name.endswith(("Scheduler", "SchedulerMixin")) for a in node.names)


def test_diffusers_is_imported_only_to_build():
    code = "import sys, finetune.objective; assert 'diffusers' not in sys.modules and 'torch' in sys.modules"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)

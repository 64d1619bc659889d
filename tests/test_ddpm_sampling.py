"""Ancestral and DDIM sampling of a DDPM: the numbers of improved-diffusion, and data whose exact denoiser is known."""

from itertools import count, pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from finetune.config_objective import space_timesteps
from finetune.config_sample import Sampling, visited_timesteps
from finetune.errors import ConfigError
from finetune.objective.likelihood import Posterior
from finetune.objective.prediction import Prediction
from finetune.objective.process import NoiseProcess
from finetune.samplers import ancestral, ancestral_step, ddim, ddim_step
from finetune.sampling import Sampler
from finetune.schedulers import with_scheduler
from golden_numbers import arrays, compare

STEP, LOOP, SCHEDULES = (arrays(f"iddpm_{name}") for name in ("sampling_step", "sampling_loop", "schedules"))
PREDICTIONS = {"EPSILON": "epsilon", "START_X": "sample"}
VARIANCES = ("learned_range", "fixed_small", "fixed_large")


def close(file, quantity, ours, rtol=1e-6, part=slice(None)):
    """rtol of the largest value: single values are differences of larger ones, computed in float32."""
    theirs = arrays(file)[quantity][part]
    compare(file, quantity, ours[part], theirs, rtol=rtol, floor=np.abs(theirs).max())


def table(name, **options):
    return NoiseProcess(torch.tensor(SCHEDULES[f"alphas_cumprod_{name}"]), **options)


# ---- the numbers of improved-diffusion

STEPS = [
    (schedule, prediction, variance, clip)
    for schedule in ("linear_1000", "cosine_1000")
    for prediction in PREDICTIONS
    for variance in VARIANCES
    for clip in (0, 1)
    if prediction == "EPSILON" or variance == "learned_range"  # those that there are numbers of
]


def predicted(process, prediction, clip, level):
    """(x, x0, variance half) of the stored output at `level` [4]."""
    x, output = torch.tensor(STEP["x"]), torch.tensor(STEP["model_output"])
    alpha, sigma, _ = process(level)
    x0 = Prediction(prediction).x0(x, output[:, :3], alpha, sigma)
    return x, x0.clamp(-1, 1) if clip else x0, output[:, 3:]


@pytest.mark.parametrize(("schedule", "prediction", "variance", "clip"), STEPS)
def test_p_sample(schedule, prediction, variance, clip):
    process, level = table(schedule), torch.tensor(STEP["t_1000"])
    x, x0, fraction = predicted(process, PREDICTIONS[prediction], clip, level)
    posterior, noise = Posterior(process, variance), torch.tensor(STEP["noise"])
    golden = f"p_sample/{schedule.replace('_', '')}_{prediction}_{variance.upper()}_clip{clip}"
    close("iddpm_sampling_step", f"{golden}/pred_xstart", x0)
    close("iddpm_sampling_step", f"{golden}/mean", posterior.mean(x0, x, level))
    log_variance = posterior.model_log_variance(level, x, fraction).expand_as(x)
    close("iddpm_sampling_step", f"{golden}/log_variance", log_variance)
    sample = ancestral_step(posterior, x, x0, level, noise=noise, fraction=fraction)
    close("iddpm_sampling_step", f"{golden}/sample", sample)
    assert torch.equal(sample[0], posterior.mean(x0, x, level)[0]), "no noise at level 0"
    other = Posterior(process, {"fixed_small": "fixed_large"}.get(variance, "fixed_small"))
    wrong = ancestral_step(other, x, x0, level, noise=noise)
    assert np.abs(wrong.numpy() - STEP[f"{golden}/sample"]).max() > 1e-4


@pytest.mark.parametrize("schedule", ["linear_1000", "cosine_1000"])
@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("eta", ["0.0", "0.5", "1.0", "reverse"])
def test_ddim_sample(schedule, clip, eta):
    process, level, name = table(schedule), torch.tensor(STEP["t_1000"]), schedule.replace("_", "")
    x, x0, _ = predicted(process, "epsilon", clip, level)
    abar = process.alphas_cumprod
    if eta == "reverse":
        there, golden = torch.cat([abar[1:], abar.new_zeros(1)])[level], f"ddim_reverse_sample/{name}_clip{clip}"
        noise = {}
    else:
        there, golden = torch.cat([abar.new_ones(1), abar[:-1]])[level], f"ddim_sample/{name}_eta{eta}_clip{clip}"
        noise = {"eta": float(eta), "noise": torch.tensor(STEP["noise"])}
    here = process(level)[:2]
    there = (there.sqrt(), (1 - there).sqrt())
    sample = ddim_step(x, x0, here, there, **noise)
    # At 999 of the cosine schedule x0 is 1e4 times the output.
    close("iddpm_sampling_step", golden, sample, 3e-6, slice(2, None))
    # At levels 0 and 1 the reference divides a float32 difference by sigma = 0.01, and ours is nearer to the exact.
    close("iddpm_sampling_step", golden, sample, 3e-4, slice(2))
    exact = ddim_step(x.double(), x0.double(), here, there, **noise)
    compare("float64", golden, sample, exact, rtol=5e-6, floor=float(exact.abs().max()))
    shifted = ddim_step(x, x0, here, here, **noise)
    assert np.abs(shifted.numpy() - STEP[golden]).max() > 1e-2


def fake(x, time, ratio=None):
    """The network of the golden loops."""
    return torch.cat([0.3 * x + 0.2 * torch.sin(x + 0.01 * time), 0.5 * torch.cos(2 * x - 0.02 * time)], 1)


LOOPS = sorted({key.split("/")[0] for key in LOOP} - {"x_T", "noises"})


@pytest.mark.parametrize("key", LOOPS)
def test_whole_loops_over_kept_timesteps(key):
    """The tables of the reference, then the scheduler's own float32 betas through the sampler of the pipeline."""
    kind, schedule, respacing = key.split("_")
    name, total = schedule[:6], int(schedule[6:])
    kept = space_timesteps(total, respacing)
    compare("iddpm_sampling_loop", f"{key}/timestep_map", kept, rtol=0)
    process = table(f"{name}_{total}", kept=kept, rescale_timesteps=True)
    x, rows, seen, xs = torch.tensor(LOOP["x_T"]), count(), [], []

    def predict(x, level):
        alpha, sigma, time = process(level)
        seen.append(float(time))
        xs.append(x)
        output = fake(x, time.float()[0])
        return Prediction("epsilon").x0(x, output[:, :3], alpha, sigma).clamp(-1, 1), output[:, 3:]

    def noise():
        return torch.tensor(LOOP["noises"][next(rows)])

    posterior = Posterior(process, "learned_range")
    final = ddim(predict, x, process, noise=noise) if kind == "ddim" else ancestral(predict, x, posterior, noise)
    close("iddpm_sampling_loop", f"{key}/final", final, 2e-6)  # up to 60 steps in float32
    close("iddpm_sampling_loop", f"{key}/first", xs[1], 2e-6)
    compare("iddpm_sampling_loop", f"{key}/timesteps_seen_by_model", seen, rtol=1e-7)
    wrong = ancestral(predict, x, Posterior(process, "fixed_large"), lambda: torch.tensor(LOOP["noises"][0]))
    assert np.abs(wrong.numpy() - LOOP[f"{key}/final"]).max() > 1e-3

    schedule = {"beta_start": 0.1 / total, "beta_end": 20 / total} if name == "linear" else {}
    training = DDPMScheduler(
        num_train_timesteps=total,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[name],
        variance_type="learned_range",
        **schedule,
    )
    sampler = Sampler(
        scheduler=with_scheduler(training, "ddim" if kind == "ddim" else "ddpm", clip_sample=True),
        settings=Sampling(respacing=respacing),
        rescale_timesteps=True,
    )
    rows = count()
    sampler.check()
    draws = pytest.MonkeyPatch()
    draws.setattr("finetune.sampling.randn_tensor", lambda *_, **__: noise())
    with draws.context():
        sample = sampler(fake, x)
    draws.undo()
    # The scheduler's betas are float32: 1 - abar of few kept timesteps is 1e-6 off.
    close("iddpm_sampling_loop", f"{key}/final", sample, 1e-5)


# ---- data of N(MEAN, STD^2), whose denoiser is known

MEAN, STD = 0.1, 0.2


def gaussian(process, x, level):
    """E[x0 | x_t] and Var[x0 | x_t]."""
    alpha, sigma, _ = process(level)
    a, s = float(alpha), float(sigma)
    variance = a**2 * STD**2 + s**2
    return MEAN + a * STD**2 * (x - a * MEAN) / variance, STD**2 * s**2 / variance


def process_of_steps(steps, total=1000):
    abar = (1 - torch.linspace(0.1 / total, 20 / total, total, dtype=torch.float64)).cumprod(0)
    return NoiseProcess(abar, kept=space_timesteps(total, str(steps)))  # timestep 0 is one of them


def normal(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def drawn(steps, variance, share=None):
    """Mean and standard deviation of what ancestral sampling draws. share: (posterior, level, Var[x0 | x_t]) -> f."""
    process = process_of_steps(steps)
    posterior, noise = Posterior(process, variance), normal((60000, 1))

    def predict(x, level):
        x0, spread = gaussian(process, x, level)
        return x0, None if share is None else torch.full_like(x, share(posterior, level, spread))

    sample = ancestral(predict, noise(), posterior, noise)
    return float(sample.mean()), float(sample.std())


def best(posterior, level, spread):
    """The variance half that makes p exact: Var[x_t-1 | x_t] = Var[x_t-1 | x_t, x0] + c^2 Var[x0 | x_t]."""
    low, high = float(posterior.log_variance[level]), float(posterior.log_beta[level])
    exact = np.log(np.exp(low) + float(posterior.coefficient_x0[level]) ** 2 * spread)
    return 2 * (exact - low) / (high - low) - 1


def test_a_learned_variance_makes_few_ancestral_steps_exact():
    mean, std = drawn(25, "learned_range", best)
    assert abs(mean - MEAN) < 0.004 and abs(std - STD) < 0.006  # standard errors 0.0008 and 0.0006, and x0 of level 0
    for variance in ("fixed_small", "fixed_large"):
        assert abs(drawn(25, variance)[1] - STD) > 0.02, "negative control: with so few steps the fixed ones are off"


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_converges(variance):
    errors = [abs(drawn(steps, variance)[1] - STD) for steps in (25, 100, 400)]
    assert errors[0] > 2.5 * errors[1] > 5 * errors[2]


def flow_end(process, x):
    """Where the probability flow takes pure noise: x - alpha mean over its standard deviation stays."""
    alpha, sigma = process.alpha[-1], process.sigma[-1]
    return MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def deterministic(steps, x, eta=0.0):
    process = process_of_steps(steps)
    noise = normal(x.shape)
    sample = ddim(lambda x, level: (gaussian(process, x, level)[0], None), x, process, eta=eta, noise=noise)
    return sample, flow_end(process, x)


def test_ddim_is_of_first_order():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = [float((a - b).abs().max()) for a, b in (deterministic(steps, x) for steps in (125, 250, 500))]
    assert all(1.7 < coarse / fine < 2.3 for coarse, fine in pairwise(errors))
    wild, smooth = deterministic(500, x, eta=1.0)
    assert (wild - smooth).abs().max() > 0.1, "negative control: eta 1 draws noise"


def test_ddim_with_eta_draws_the_data():
    x = normal((60000, 1), seed=1)()
    for eta in (0.0, 0.5, 1.0):
        sample, _ = deterministic(500, x, eta)
        assert abs(float(sample.mean()) - MEAN) < 0.005 and abs(float(sample.std()) - STD) < 0.006


def test_ddim_inverts():
    process = process_of_steps(1000)
    rates = [process(torch.tensor([t]))[:2] for t in range(1000)]
    start = x = torch.linspace(-0.5, 0.7, 9, dtype=torch.float64)[:, None]
    for t, (here, there) in enumerate(pairwise(rates)):
        x = ddim_step(x, gaussian(process, x, torch.tensor([t]))[0], here, there)
    back, _ = deterministic(1000, x)
    assert (back - start).abs().max() < 0.01
    assert (x - start).abs().max() > 1 and (deterministic(1000, x, eta=1.0)[0] - start).abs().max() > 0.1


def test_zero_terminal_snr_starts_where_there_is_no_signal():
    """v says what x0 is even there; the first step must not depend on x beyond that."""
    training = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False)
    process = NoiseProcess.from_scheduler(training)
    x, seen = normal((4000, 1, 4, 4))(), []

    def network(x, time, ratio):
        alpha, sigma, _ = process(time[None])
        x0, _ = gaussian(process, x, time[None])
        seen.append((int(time), ratio))
        return (x - (x0 * float(alpha) + 0 * x)) / float(sigma) * float(alpha) - float(sigma) * x0

    for name, steps in (("ddpm", 250), ("ddim", 250)):
        seen.clear()
        scheduler = with_scheduler(training, name, clip_sample=False)
        sample = Sampler(scheduler=scheduler, settings=Sampling(num_inference_steps=steps))(
            network, x, torch.Generator().manual_seed(0)
        )
        assert seen[0] == (999, float("inf")) and seen[-1][0] == 3 and len(seen) == steps
        assert abs(float(sample.mean()) - MEAN) < 0.005 and abs(float(sample.std()) - STD) < 0.012


def test_one_step_is_the_prediction():
    training, x = DDPMScheduler(prediction_type="sample"), torch.ones(1, 1, 2)
    for name in ("ddpm", "ddim"):
        scheduler = with_scheduler(training, name, clip_sample=True)
        sampler = Sampler(scheduler=scheduler, settings=Sampling(num_inference_steps=1))
        assert torch.equal(sampler(lambda x, time, ratio: 0.3 * x + 0 * time, x), 0.3 * x)
        assert torch.equal(sampler(lambda x, time, ratio: 3.0 * x, x), x), "clipped"


# ---- which timesteps


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_steps_are_the_trailing_ones_of_diffusers(cls):
    scheduler = cls(timestep_spacing="trailing")
    for steps in (1, 2, 3, 7, 16, 25, 30, 50, 250, 333, 999, 1000):
        scheduler.set_timesteps(steps)
        ours = visited_timesteps(Sampling(num_inference_steps=steps), 1000, tuple(range(1000)))
        assert list(ours[::-1]) == scheduler.timesteps.tolist()
    scheduler.set_timesteps(61)  # which diffusers makes 62 of, the last -1
    ours = visited_timesteps(Sampling(num_inference_steps=61), 1000, tuple(range(1000)))
    assert len(set(ours)) == 61 and ours[-1] == 999 and scheduler.timesteps.tolist()[:61] == list(ours[::-1])


def test_only_what_is_trained_is_visited():
    trained = space_timesteps(1000, "ddim50")
    assert visited_timesteps(Sampling(), 1000, trained) == trained
    assert visited_timesteps(Sampling(num_inference_steps=10), 1000, trained) == trained[4::5]
    assert visited_timesteps(Sampling(respacing="ddim10"), 1000, trained) == trained[::5]
    with pytest.raises(ValueError, match="visits timestep 111, which objective.respacing does not train"):
        visited_timesteps(Sampling(respacing="10"), 1000, trained)
    with pytest.raises(ValueError, match="must lie in 1..50"):
        visited_timesteps(Sampling(num_inference_steps=51), 1000, trained)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ddpm", {"eta": 0.5}, "eta: ddpm does not use it, only ddim"),
        ("euler", {"respacing": "50"}, "respacing: euler does not use it, only ddpm and ddim"),
        ("ddim", {"s_churn": 5.0}, "s_churn: ddim does not use it"),
        ("ddim", {"guidance_rescale": 0.7}, "guidance_rescale: it changes guidance, and guidance_scale 1 is none"),
        ("ddim", {"respacing": "2000"}, "a section of 1000 timesteps cannot keep 2000"),
    ],
)
def test_what_a_sampler_does_not_use_is_refused(name, settings, message):
    scheduler = with_scheduler(DDPMScheduler(), name, clip_sample=False)
    with pytest.raises(ConfigError, match=message):
        Sampler(scheduler=scheduler, settings=Sampling(**settings)).check()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(variance_type="fixed_small_log"), "variance_type fixed_small_log: it must be one of"),
        (DDIMScheduler(thresholding=True), "thresholding"),
        (EulerDiscreteScheduler(), "timesteps that were not trained .objective.respacing 50"),
    ],
)
def test_schedulers_that_would_sample_something_else_are_refused(scheduler, message):
    trained = "50" if isinstance(scheduler, EulerDiscreteScheduler) else None
    with pytest.raises(ConfigError, match=message):
        Sampler(scheduler=scheduler, settings=Sampling(num_inference_steps=10), trained_respacing=trained).check()

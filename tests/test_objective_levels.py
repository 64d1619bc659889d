"""Which levels are drawn: distributions, strata, importance sampling; and what is learned beside the network."""

import math

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import compute_density_for_timestep_sampling

from finetune.meter import Meter
from finetune.objective import LossTerms, levels
from finetune.objective.levels import LossSecondMoment
from finetune.objective.weighting import Uncertainty
from finetune.seeding import PositionRandom, key
from finetune.trainer import Trainer
from forked import log, run, state
from golden_numbers import compare, golden
from test_objective_golden import make
from tiny import config

torch.set_num_threads(1)
KL = {"variance": {"kind": "learned_range", "vb_loss": "kl"}, "levels": {"kind": "loss_second_moment"}}


# ---- distributions

DENSITIES = [
    ("ddpm", {"kind": "uniform"}, lambda x: (x + 1) / 1000),
    ("ddpm", {"kind": "logit_normal", "logit_mean": 0.5}, lambda x: normal_cdf(logit((x + 1) / 1000) - 0.5)),
    ("edm", {"kind": "log_normal"}, lambda x: normal_cdf((x.log() + 1.2) / 1.2)),
    ("edm", {"kind": "v_diffusion"}, lambda x: torch.atan(x / 0.5) * 2 / math.pi),
    ("flow", {"kind": "uniform"}, lambda x: x),
    ("flow", {"kind": "logit_normal", "logit_mean": 0.5}, lambda x: normal_cdf(logit(x) - 0.5)),
    ("flow", {"kind": "cosmap"}, lambda x: torch.atan(x / (1 - x)) * 2 / math.pi),
]  # fmt: skip


def normal_cdf(x):
    return torch.special.ndtr(x)


def logit(x):
    return torch.logit(x.double())


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("kind, settings, cdf", DENSITIES, ids=[f"{k}-{s['kind']}" for k, s, _ in DENSITIES])
def test_levels_have_their_distribution(kind, settings, cdf, stratified):
    """Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by 1 in 1000 samples of the right distribution."""
    n = 4096
    sampler = make(kind, levels={**settings, "stratified": stratified}, global_batch=64).levels
    level, weight = sampler.sample(PositionRandom(3, torch.arange(n)))
    assert weight.unique().tolist() == [1]

    def distance(level):
        u = cdf(level.double()).sort().values
        return (u - (torch.arange(n) + 0.5) / n).abs().max() * n**0.5

    assert distance(level) < 1.95 + (0.1 if kind == "ddpm" else 0)  # integers step by 1 / 1000
    assert distance(level * 0.8) > 4


@pytest.mark.parametrize("scheme, ours", [("mode", levels.mode(1.29)), ("logit_normal", None)])
def test_densities_are_those_of_diffusers(scheme, ours):
    """Both in distribution: the mean and the spread of 20000 draws."""
    u = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(
        scheme, 20000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=generator
    )
    mine = (ours or levels.logit_normal(0.0, 1.0))(u)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    torch.testing.assert_close(mine.quantile(quantiles), theirs.double().quantile(quantiles), rtol=0, atol=0.015)
    assert (levels.mode(-0.5)(u).quantile(quantiles) - theirs.double().quantile(quantiles)).abs().max() > 0.03


@pytest.mark.parametrize("scale", [-1, 0, 1.29, 2 / (math.pi - 2)])
def test_mode_is_monotone_over_the_whole_range(scale):
    u = torch.linspace(0, 1, 10001, dtype=torch.float64)
    level = levels.mode(scale)(u)
    assert level[0] == 1 and level[-1].abs() < 1e-12 and (level.diff() <= 1e-12).all()
    assert not (levels.mode(2.5)(u).diff() <= 1e-12).all()
    for bad in (-1.1, 1.8):
        with pytest.raises(ValueError):
            make("flow", levels={"kind": "mode", "mode_scale": bad})


# ---- stratification


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_each_global_batch_covers_each_stratum_once_however_it_is_split(kind):
    n = 20
    positions = torch.arange(3 * n, 4 * n)

    def strata(stratified, *parts):
        sampler = make(kind, levels={"kind": "uniform", "stratified": stratified}, global_batch=n).levels
        level = torch.cat([sampler.sample(PositionRandom(0, part))[0] for part in parts])
        share = level / 1000 if kind == "ddpm" else 1 - level
        return (share * n).long().sort().values.tolist()

    assert strata(True, positions) == list(range(n))
    assert strata(True, positions[:5], positions[5:12], positions[12:]) == list(range(n))
    assert strata(False, positions) != list(range(n))


def test_strata_are_k_diffusion_s():
    """Its process 1 of 3 with a batch of 4 has the shares 1, 4, 7 and 10 of the global batch of 12; u is 0.5."""
    turn = key(0, "level turn", 0)
    random = PositionRandom(0, torch.tensor([(share - turn) % 12 for share in (1, 4, 7, 10)]))
    shift = (random.uniform("level") - 0.5) / 12
    compare("kdiff_schedules", "stratified_uniform_4_of_group1_groups3", random.stratified("level", 12) - shift)


def test_no_place_in_the_batch_always_has_the_same_levels():
    """The rows of one shard come at the same places of batch after batch."""
    n, batches = 16, 200
    places = PositionRandom(0, torch.arange(0, n * batches, n)).stratified("level", n)
    counts = torch.histc(places, bins=4, min=0, max=1)
    assert counts.sum() == batches and counts.min() > batches / 8


# ---- importance sampling


def test_history_and_probabilities_are_iddpm_s():
    data = golden("iddpm_resample")
    sampler = LossSecondMoment(30, history_per_term=10, uniform_prob=0.001)
    warm = None
    for i, (t, loss) in enumerate(zip(data["history_t"], data["history_loss"], strict=True), start=1):
        sampler.update(t.view(1), loss.view(1))
        if i == 100:
            compare("iddpm_resample", "weights_after_100", 30 * sampler.probabilities(), rtol=1e-12)
        if warm is None and bool((sampler.counts == 10).all()):
            warm = i
    file = "iddpm_resample"
    compare(file, "n_updates_until_warm", warm, rtol=0)
    compare(file, "loss_history", sampler.losses, rtol=0)
    compare(file, "loss_counts", sampler.counts, rtol=0)
    compare(file, "p", sampler.probabilities(), rtol=1e-12)
    compare(file, "weights", sampler.probabilities(), data["weights"] / data["weights"].sum(), rtol=1e-12)
    compare(file, "importance_weight_per_t", 1 / (30 * sampler.probabilities()), rtol=1e-12)
    level, weight = sampler.sample(PositionRandom(0, torch.arange(256)))
    compare(file, "importance_weight_per_t", weight, data["importance_weight_per_t"][level], rtol=1e-12)
    compare(file, "sampled_weights", 1 / (30 * sampler.probabilities()[data["sampled_t"]]))
    compare(file, "uniform_weights", make().levels.sample(PositionRandom(0, torch.arange(256)))[1], rtol=0)
    other = LossSecondMoment(30, history_per_term=5, uniform_prob=0.1)
    other.update(data["history_t"], data["history_loss"])
    theirs = data["weights_h5_u01"] / data["weights_h5_u01"].sum()
    compare(file, "weights_h5_u01", other.probabilities(), theirs, rtol=1e-12)
    assert not torch.allclose(other.probabilities(), data["p"], rtol=0.01)


def warmed(strata=1):
    sampler = LossSecondMoment(8, history_per_term=2, uniform_prob=0.01, strata=strata)
    loss = torch.tensor([100.0, 10, 3, 1, 1, 1, 2, 0.1], dtype=torch.float64)
    sampler.update(torch.arange(8).repeat(2), loss.repeat(2))
    return sampler, loss


@pytest.mark.parametrize("strata", [1, 50])
def test_importance_sampled_loss_is_unbiased_with_less_variance(strata):
    sampler, loss = warmed(strata)
    level, weight = sampler.sample(PositionRandom(0, torch.arange(20000)))
    drawn = loss[level] * weight
    error = float(drawn.std()) / 20000**0.5
    assert drawn.mean() == pytest.approx(float(loss.mean()), abs=5 * error)
    assert loss[level].mean() > 3 * loss.mean()  # the weights are needed
    assert drawn.std() < loss.std() / 5  # what it is for
    frequency = torch.bincount(level, minlength=8) / 20000
    torch.testing.assert_close(frequency.double(), sampler.probabilities(), rtol=0, atol=0.02)


def test_draw_is_a_function_of_seed_position_and_history():
    (one, _), (two, _) = warmed(), warmed()
    two.sample(PositionRandom(0, torch.arange(99)))  # what was drawn before does not matter
    random = PositionRandom(5, torch.arange(100, 200))
    assert torch.equal(one.sample(random)[0], two.sample(random)[0])
    parts = [one.sample(PositionRandom(5, part))[0] for part in torch.arange(100, 200).split(30)]
    assert torch.equal(torch.cat(parts), one.sample(random)[0])
    fresh = LossSecondMoment(8, history_per_term=2, uniform_prob=0.01)
    assert not torch.equal(fresh.sample(random)[0], one.sample(random)[0])
    fresh.load_state_dict(one.state_dict())
    assert torch.equal(fresh.sample(random)[0], one.sample(random)[0])
    one.update(torch.tensor([3]), torch.tensor([500.0]))
    assert not torch.equal(fresh.sample(random)[0], one.sample(random)[0])  # and the state was copied


def gathered_as_iddpm(cfg):
    data = golden("iddpm_resample_2proc")
    accelerator = Accelerator(cpu=True)
    settings = {"kind": "loss_second_moment", "history_per_term": int(data["history_per_term"])}
    objective = make(**{**KL, "levels": settings}, num_train_timesteps=int(data["num_timesteps"]))
    rank = accelerator.process_index
    for t, loss in zip(data["t"][rank], data["loss"][rank], strict=True):
        terms = LossTerms(per_sample=loss.requires_grad_(), weight=2 * torch.ones(4), level=t, terms={})
        objective.update(terms, accelerator.gather)
    compare("iddpm_resample_2proc", "loss_history", objective.levels.losses, rtol=0)
    compare("iddpm_resample_2proc", "loss_counts", objective.levels.counts, rtol=0)
    p = objective.levels.probabilities()
    compare("iddpm_resample_2proc", "weights", p, data["weights"] / data["weights"].sum(), rtol=1e-12)


def test_two_processes_hold_iddpm_s_history(tmp_path):
    cfg = config(tmp_path / "run")
    assert run(cfg, processes=2, body=gathered_as_iddpm) == [0, 0], log(cfg)
    assert run(config(tmp_path / "alone"), body=gathered_as_iddpm) == [1]  # one process sees half of the losses


IMPORTANCE = {
    "objective": {
        "kind": "ddpm",
        "num_train_timesteps": 3,
        "beta_end": 0.3,
        "variance": {"kind": "learned_range", "vb_loss": "rescaled_kl"},
        "levels": {"kind": "loss_second_moment", "history_per_term": 3},
    },
    "sample": {"num_images": 2, "num_inference_steps": 3},
    "data": {"random_flip": False},
}


@pytest.mark.parametrize("processes", [1, 2])
def test_interrupted_run_with_importance_sampling_is_the_whole_run(tmp_path, processes):
    whole, parts = (config(tmp_path / name, **IMPORTANCE) for name in ("whole", "parts"))
    ends = [0] * processes
    assert run(whole, processes=processes) == ends, log(whole)
    assert run(parts, processes=processes, body=until(6)) == ends, log(parts)
    assert "objective.safetensors" in state(parts, 6)
    assert run(parts, processes=processes) == ends, log(parts)
    assert state(parts, 9) == state(whole, 9)
    assert state(whole, 9)["objective.safetensors"] != state(whole, 8)["objective.safetensors"]


def until(step):
    """Train to a step and save, without the samples."""

    def body(cfg):
        trainer = Trainer(cfg)
        meter = Meter(trainer.accelerator, trainer.modules.objective)
        batches = meter.waiting(iter(trainer.loader()))
        while trainer.step < step:
            trainer.train_step(batches, meter)
        trainer.save(required=True)

    return body


# ---- uncertainty


def test_uncertainty_learns_the_log_of_the_loss():
    """At the minimum, u = ln(loss) at every level, and the loss is 1 + u."""
    time = torch.tensor([-1.2, -0.5, 0.1, 0.6])
    loss, u = torch.tensor([3.0, 0.2, 0.05, 1.0]), Uncertainty(64)
    assert u(time).abs().max() == 0
    optimizer = torch.optim.LBFGS(u.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = (loss / u(time).exp() + u(time)).sum()
        total.backward()
        return total

    optimizer.step(closure)
    torch.testing.assert_close(u(time), loss.log(), rtol=0, atol=0.01)


def test_uncertainty_enters_the_loss():
    objective = make("edm", weighting={"kind": "uncertainty", "fourier_channels": 8})
    x0, noise = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    plain = make("edm").loss_at(lambda x, t: 0 * x, x0, level, noise).per_sample
    start = objective.loss_at(lambda x, t: 0 * x, x0, level, noise)
    assert torch.equal(start.per_sample.detach(), plain)  # u is 0 at the start
    with torch.no_grad():
        objective.uncertainty.weight.normal_()
    terms = objective.loss_at(lambda x, t: 0 * x, x0, level, noise)
    u = objective.uncertainty(objective.process(level)[2])
    torch.testing.assert_close(terms.per_sample, plain / u.exp() + u)
    torch.testing.assert_close(terms.terms["uncertainty"], u.detach())
    (name,) = objective.parameters()
    assert name == "uncertainty.weight" and objective.parameters()[name].requires_grad
    copy = make("edm", weighting={"kind": "uncertainty", "fourier_channels": 8})
    copy.load_state_dict(objective.state_dict())
    again = copy.loss_at(lambda x, t: 0 * x, x0, level, noise)
    assert torch.equal(again.per_sample, terms.per_sample)
    assert make("edm").state_dict() == make("edm").parameters() == {}


LEARNED = {"objective": {"kind": "edm", "weighting": {"kind": "uncertainty", "fourier_channels": 8}}}


@pytest.mark.parametrize("processes", [1, 2])
def test_uncertainty_is_trained_and_resumed_exactly(tmp_path, processes):
    whole, parts = (config(tmp_path / name, **LEARNED) for name in ("whole", "parts"))
    assert run(whole, body=until(5), processes=processes) == [0] * processes, log(whole)
    for step in (2, 5):
        assert run(parts, body=until(step), processes=processes) == [0] * processes, log(parts)
    assert state(parts, 5) == state(whole, 5) and state(parts, 2)["objective.safetensors"] != (
        state(parts, 5)["objective.safetensors"]
    )


def test_processes_train_the_same_uncertainty(tmp_path):
    def body(cfg):
        trainer = Trainer(cfg)
        meter = Meter(trainer.accelerator, trainer.modules.objective)
        batches = meter.waiting(iter(trainer.loader()))
        for _ in range(3):
            trainer.train_step(batches, meter)
        weight = trainer.modules.objective.uncertainty.weight.detach()
        every = trainer.accelerator.gather(weight.view(1, -1))
        assert torch.equal(every[0], every[1]) and every.abs().max() > 0

    cfg = config(tmp_path / "run", **LEARNED)
    assert run(cfg, processes=2, body=body) == [0, 0], log(cfg)


# ---- every objective through the real loop

OBJECTIVES = [
    {"kind": "ddpm", "variance": {"kind": "learned_range"}},
    {"kind": "ddpm", "respacing": "ddim50", "levels": {"kind": "uniform", "stratified": True}},
    {"kind": "edm", "levels": {"kind": "v_diffusion", "stratified": True}, "loss": {"kind": "l1"}},
    {"kind": "edm", "prediction_type": "v_prediction", "sigma_data": 1.0, "weighting": {"kind": "soft_min_snr"}},
    {"kind": "flow", "shift": 3.0, "levels": {"kind": "logit_normal"}, "weighting": {"kind": "sd3_cosmap"}},
    {"kind": "flow", "loss": {"kind": "huber"}, "noise_offset": 0.1, "input_perturbation": 0.1,
     "pyramid_noise_discount": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: "-".join(objective))
def test_objective_trains_in_the_one_loop(tmp_path, objective):
    cfg = config(tmp_path / "run", objective=objective, data={"random_flip": False})

    def body(cfg):
        trainer = Trainer(cfg)
        meter = Meter(trainer.accelerator, trainer.modules.objective)
        batches = meter.waiting(iter(trainer.loader()))
        before = {name: p.clone() for name, p in trainer.parameters.items()}
        for _ in range(3):
            assert trainer.train_step(batches, meter)
        assert math.isfinite(meter.read()["loss"])
        assert any(not torch.equal(p, before[name]) for name, p in trainer.parameters.items())

    assert run(cfg, body=body) == [0], log(cfg)


def log_of_importance_samples(cfg):
    objective = make(num_train_timesteps=8, beta_end=0.2, variance={"kind": "learned_range"})
    sampler, loss = warmed()
    level, weight = sampler.sample(PositionRandom(0, torch.arange(20000)))
    terms = LossTerms(per_sample=loss[level].float(), weight=weight.float(), level=level, terms={"mse": loss[level]})
    meter = Meter(Accelerator(cpu=True), objective)
    next(meter.waiting(iter([0])))
    meter.add(terms)
    meter.commit(0.0)
    means = meter.read()
    assert means["loss"] == pytest.approx(float(loss.mean()), rel=0.02)
    assert means["mse"] == pytest.approx(means["loss"])
    assert means["loss_q0"] == pytest.approx(55, rel=0.02)
    assert float(loss[level].mean()) > 3 * means["loss"]


def test_log_undoes_importance_weights(tmp_path):
    """With weights 1 / (T p), the logged means are those of uniform levels."""
    cfg = config(tmp_path / "run")
    assert run(cfg, body=log_of_importance_samples) == [0], log(cfg)

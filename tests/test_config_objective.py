"""The objective section: choices inside a choice, what is refused and why, and the names of diffusers' flags."""

import pytest

from finetune import config_objective as co
from finetune.config_io import config_main, dump, load, load_text, read, resolved
from finetune.config_levels import LogNormal, MinSNR, NoWeighting, Uniform
from finetune.errors import ConfigError

BASE = ["--output_dir", "out", "--train_data_dir", "pics", "--resolution", "64"]


def objective(*options):
    return load([*BASE, *options], env={}).objective


def problems(*options):
    with pytest.raises(ConfigError) as caught:
        load([*BASE, *options], env={})
    return str(caught.value)


def test_defaults_are_those_of_ho_et_al():
    default = objective()
    assert default == co.DDPM().filled() and (default.levels, default.weighting) == (Uniform(), NoWeighting())
    assert (default.loss.kind, default.variance.kind, default.variance.vb_loss) == ("l2", "fixed_small", "none")
    assert objective("--objective.kind", "edm").levels == LogNormal()
    assert objective("--objective.kind", "flow").levels == Uniform()


@pytest.mark.parametrize("options", [
    "--objective.kind edm --objective.weighting.kind uncertainty --objective.levels.p_mean -0.4",
    "--objective.kind flow --objective.levels.kind mode --objective.levels.stratified --shift 3",
    "--objective.variance.kind learned_range --objective.variance.vb_loss kl "
    "--objective.levels.kind loss_second_moment --objective.respacing ddim50 --scale_betas",
    "--objective.loss.kind huber --huber_c 0.2 --objective.weighting.kind p2 --p2_gamma 0.5",
])  # fmt: skip
def test_every_choice_survives_a_dump(options, capsys):
    loaded = read([*BASE, *options.split()], env={})
    assert load_text(dump(loaded.config)) == loaded.config
    assert dump(loaded.config) in [dump(load_text(dump(loaded.config)))]
    assert "objective.levels.kind" in resolved(loaded)
    assert config_main(["--help"]) == 0 and "--objective.levels.stratified" in capsys.readouterr().out


def test_flags_of_diffusers():
    assert objective("--snr_gamma", "3").weighting == MinSNR(kind="min_snr", snr_gamma=3)
    both = objective("--noise_offset", "0.1", "--input_perturbation", "0.2")
    assert (both.noise_offset, both.input_perturbation) == (0.1, 0.2)
    flow = objective("--objective.kind=flow", "--objective.levels.kind=logit_normal", "--logit_mean=1")
    assert flow.levels.logit_mean == 1


def test_kind_on_the_command_line_replaces_the_section(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "output_dir: out\ndata: {train_data_dir: pics, resolution: 64}\n"
        "objective:\n  noise_offset: 0.1\n  weighting: {kind: p2, p2_k: 2}\n  levels: {stratified: true}\n"
    )
    load_it = lambda *options: load(["--config", str(recipe), *options], env={}).objective  # noqa: E731
    assert load_it().weighting.p2_k == 2 and load_it().levels.stratified
    one = load_it("--snr_gamma", "4")
    assert one.weighting == MinSNR(kind="min_snr", snr_gamma=4) and one.levels.stratified and one.noise_offset == 0.1
    assert load_it("--objective.kind", "edm") == co.EDM(kind="edm")
    same = load_it("--objective.kind", "ddpm", "--objective.weighting.kind", "p2")
    assert same == load_it()


@pytest.mark.parametrize("options, message", [
    ("--objective.kind edm --objective.variance.kind learned_range", "objective.kind is edm, which does not have it"),
    ("--objective.kind edm --objective.levels.kind uniform", "expected one of log_normal, log_logistic"),
    ("--objective.levels.p_mean 1", "objective.kind is ddpm, which does not have it: objective.kind edm does"),
    ("--objective.levels.logit_mean 1", "objective.levels.kind is uniform, which does not have it"),
    ("--objective.weighting.kind uncertainty", "expected one of none, x0, snr"),
    ("--objective.levels.stratified maybe", "expected true or false, got 'maybe'"),
    ("--objective.kind flow --shift 0", "must be greater than 0"),
    ("--objective.levels.kind loss_second_moment", "use vb_loss kl or rescaled_kl"),
    ("--objective.levels.kind loss_second_moment --objective.variance.kind learned_range", "is rescaled_mse"),
    ("--objective.variance.vb_loss kl --snr_gamma 5", "neither weighting.kind min_snr"),
    ("--objective.variance.vb_loss kl --objective.loss.kind l1", "nor loss.kind l1"),
    ("--objective.variance.kind learned_range --noise_offset 0.1", "the bound of white noise"),
    ("--rescale_betas_zero_snr", "use prediction_type v_prediction"),
    ("--scale_betas --beta_schedule sigmoid", "scale_betas belongs to beta_schedule linear"),
    ("--scale_betas --num_train_timesteps 10 --num_inference_steps 10", "below 1 after scale_betas with 10"),
    ("--objective.respacing ddim999", "no integer stride gives 999"),
    ("--objective.respacing 1", "at least 2"),
    ("--objective.kind edm --objective.weighting.kind uncertainty --objective.loss.kind l1", "use l2"),
    ("--objective.kind edm --objective.levels.kind v_diffusion --objective.levels.sigma_min 99", "below sigma_max"),
    ("--space.kind latent --vae v --objective.variance.kind learned_range", "no meaning for space.kind latent"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_reason(options, message):
    text = problems(*options.split())
    assert message in text and len(text.splitlines()) == 1, text


def test_out_channels_factor():
    assert co.DDPM().out_channels_factor == co.EDM(kind="edm").out_channels_factor == 1
    assert co.DDPM(variance=co.LearnedRange(kind="learned_range")).out_channels_factor == 2

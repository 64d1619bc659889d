"""The objective of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from finetune.config_objective import space_timesteps
from finetune.errors import ConfigError
from finetune.objective import levels, regression, weighting
from finetune.objective.likelihood import Posterior
from finetune.objective.noise import Noise
from finetune.objective.objective import Objective, VariationalLoss
from finetune.objective.prediction import Prediction
from finetune.objective.process import NoiseProcess, RectifiedFlow, VarianceExploding
from finetune.own_code import described, make
from finetune.seeding import PositionRandom

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    import finetune.config_objective as config


def build_objective(
    cfg: config.Objective, *, clip_sample: bool, global_batch: int = 1, trust: Collection[str] = ()
) -> Objective:
    """The objective of the config's `objective` section, with the diffusers scheduler that it trains and exports.

    clip_sample: what an unset cfg.clip_sample means; right for x0 in [-1, 1], wrong for latents. Sampling only.
    global_batch: samples per optimizer step, over which stratified levels are spread. trust: the packages whose code
    a `kind: custom` may name. Raises ConfigError if that code is not trusted or does not make what it should.
    """
    if cfg.kind == "custom":
        return _own("objective", cfg, trust)
    pieces = {"weighting": cfg.weighting, "levels": cfg.levels, "loss": cfg.loss}
    own = {name: _own(f"objective.{name}", piece, trust) for name, piece in pieces.items() if piece.kind == "custom"}
    own |= {"regression": own.pop("loss")} if "loss" in own else {}
    cfg = without_own_code(cfg)
    cfg = cfg.filled() if cfg.kind == "ddpm" else cfg
    match cfg.kind:
        case "ddpm":
            return replace(_ddpm(cfg, clip_sample, global_batch), **own)
        case "edm":
            return replace(_edm(cfg, global_batch), **own)
    return replace(_flow(cfg, global_batch), **own)


THREE = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
OWN: dict[str, tuple[str, Callable]] = {
    "objective": ("a finetune.objective.Objective", lambda piece: isinstance(piece, Objective)),
    "objective.loss": (
        "a finetune.objective.regression.Regression", lambda piece: isinstance(piece, regression.Regression)
    ),
    "objective.weighting": (
        "a function of snr [B] and scale [B], float64, that returns the weights [B]",
        lambda piece: piece(THREE, THREE).shape == (3,),
    ),
    "objective.levels": (
        "an object whose sample(random) returns levels [B] and weights [B]",
        lambda piece: [part.shape for part in piece.sample(PositionRandom(0, torch.arange(3)))] == [(3,), (3,)],
    ),
}  # fmt: skip
"""What the target of a custom setting makes, in words and as a trial."""


def _own(setting: str, cfg: config.Custom, trust: Collection[str]) -> object:
    piece, (words, is_right) = make(setting, cfg, trust), OWN[setting]
    try:
        problem = "" if is_right(piece) else f"got {type(piece).__name__}"
    except Exception as error:
        problem = described(error)
    if problem:
        raise ConfigError(f"{setting}: {cfg.target} must make {words}; {problem}")
    return piece


def without_own_code(cfg: config.Objective) -> config.Objective:
    """The same noise process and prediction, which need no code of the user's: the parts that only training has are
    the defaults where they were custom.
    """
    plain = vars(type(cfg)(kind=cfg.kind))
    own = [name for name in ("levels", "weighting", "loss") if vars(cfg)[name].kind == "custom"]
    return replace(cfg, **{name: plain[name] for name in own})


def _ddpm(cfg: config.DDPM, clip_sample: bool, global_batch: int) -> Objective:
    """Ho et al. 2020 (epsilon, linear), Salimans & Ho 2022 (v_prediction), Nichol & Dhariwal 2021 (learned_range,
    respacing), Lin et al. 2023 (rescale_betas_zero_snr) are settings of it."""
    scheduler = _ddpm_scheduler(cfg, clip_sample)
    process = NoiseProcess.from_scheduler(
        scheduler,
        kept=None if cfg.respacing is None else space_timesteps(cfg.num_train_timesteps, cfg.respacing),
        rescale_timesteps=cfg.rescale_timesteps,
    )
    count = len(process.alpha)
    variational = {
        "none": None,
        "mse": VariationalLoss(1, alone=False),
        "rescaled_mse": VariationalLoss(count / 1000, alone=False),
        "kl": VariationalLoss(1, alone=True),
        "rescaled_kl": VariationalLoss(count, alone=True),
    }
    return Objective(
        process=process,
        prediction=Prediction(cfg.prediction_type),
        levels=_integer_levels(cfg.levels, count, global_batch),
        posterior=Posterior(process, cfg.variance.kind),
        variational=variational[cfg.variance.vb_loss],
        scheduler=scheduler,
        **_common(cfg),
    )


def _ddpm_scheduler(cfg: config.DDPM, clip_sample: bool) -> DDPMScheduler:
    from diffusers import DDPMScheduler  # seconds to import: only who trains pays

    return DDPMScheduler(
        num_train_timesteps=cfg.num_train_timesteps,
        beta_schedule=cfg.beta_schedule,
        beta_start=cfg.beta_start * cfg.beta_scale,
        beta_end=cfg.beta_end * cfg.beta_scale,
        prediction_type=cfg.prediction_type,
        variance_type=cfg.variance.kind,
        clip_sample=clip_sample if cfg.clip_sample is None else cfg.clip_sample,
        rescale_betas_zero_snr=cfg.rescale_betas_zero_snr,
        # Sampling must start where the signal is exactly zero (Lin et al. 2023, section 3.3): "leading" never does.
        timestep_spacing="trailing" if cfg.rescale_betas_zero_snr else "leading",
    )


def _edm(cfg: config.EDM, global_batch: int) -> Objective:
    from diffusers import EDMEulerScheduler

    uncertain = cfg.weighting.kind == "uncertainty"
    return Objective(
        process=VarianceExploding(cfg.sigma_data),
        prediction=Prediction(cfg.prediction_type, sigma_data=cfg.sigma_data),
        levels=levels.Density(_sigmas(cfg), strata=_strata(cfg.levels, global_batch)),
        uncertainty=weighting.Uncertainty(cfg.weighting.fourier_channels) if uncertain else None,
        # diffusers calls EDM's own parametrisation epsilon.
        scheduler=EDMEulerScheduler(
            sigma_data=cfg.sigma_data, prediction_type={"edm": "epsilon"}.get(cfg.prediction_type, cfg.prediction_type)
        ),
        **_common(cfg),
    )


def _flow(cfg: config.Flow, global_batch: int) -> Objective:
    from diffusers import FlowMatchEulerDiscreteScheduler

    density = levels.shifted(_unit_levels(cfg.levels), cfg.shift)
    return Objective(
        process=RectifiedFlow(),
        prediction=Prediction(cfg.prediction_type),
        levels=levels.Density(density, strata=_strata(cfg.levels, global_batch)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=cfg.shift),
        **_common(cfg),
    )


def _common(cfg: config.Objective) -> dict:
    return {
        "weighting": _weighting(cfg.weighting),
        "regression": _regression(cfg.loss),
        "noise": Noise(
            offset=cfg.noise_offset,
            input_perturbation=cfg.input_perturbation,
            pyramid_discount=cfg.pyramid_noise_discount,
        ),
    }


def _regression(cfg: config.Loss) -> regression.Regression:
    match cfg.kind:
        case "l1":
            return regression.absolute
        case "huber":
            return regression.pseudo_huber(cfg.huber_c)
    return regression.squared


def _weighting(cfg: config.WeightingEDM | config.WeightingFlow) -> weighting.Weighting:
    match cfg.kind:
        case "min_snr":
            return weighting.min_snr(cfg.snr_gamma)
        case "soft_min_snr":
            return weighting.soft_min_snr(cfg.soft_gamma)
        case "edm":
            return weighting.edm(cfg.weighting_sigma_data)
        case "p2":
            return weighting.p2(cfg.p2_k, cfg.p2_gamma)
    return {
        "none": weighting.constant,
        "x0": weighting.x0,
        "snr": weighting.by_snr,
        "debiased": weighting.debiased,
        "sd3_sigma_sqrt": weighting.sigma_sqrt,
        "sd3_cosmap": weighting.cosmap,
        "uncertainty": weighting.constant,  # what it learns does the weighting
    }[cfg.kind]


def _strata(cfg: config.Levels | config.LevelsEDM | config.LevelsFlow, global_batch: int) -> int:
    return global_batch if cfg.stratified else 1


def _integer_levels(cfg: config.Levels, count: int, global_batch: int) -> levels.LevelSampler:
    strata = _strata(cfg, global_batch)
    if cfg.kind == "loss_second_moment":
        return levels.LossSecondMoment(
            count, history_per_term=cfg.history_per_term, uniform_prob=cfg.uniform_prob, strata=strata
        )
    if cfg.kind == "uniform" and not cfg.stratified:
        return levels.UniformIntegers(count)
    return levels.Density(levels.to_integers(_unit_levels(cfg), count), strata=strata)


def _unit_levels(cfg: config.Levels | config.LevelsFlow) -> Callable[[torch.Tensor], torch.Tensor]:
    """u -> level in [0, 1]."""
    match cfg.kind:
        case "logit_normal":
            return levels.logit_normal(cfg.logit_mean, cfg.logit_std)
        case "mode":
            return levels.mode(cfg.mode_scale)
        case "cosmap":
            return levels.cosmap
    return levels.uniform


def _sigmas(cfg: config.EDM) -> Callable[[torch.Tensor], torch.Tensor]:
    """u -> sigma."""
    match cfg.levels.kind:
        case "log_logistic":
            return levels.log_logistic(cfg.levels.logistic_loc, cfg.levels.logistic_scale)
        case "log_uniform":
            return levels.log_uniform(cfg.levels.sigma_min, cfg.levels.sigma_max)
        case "v_diffusion":
            return levels.v_diffusion(cfg.sigma_data, cfg.levels.sigma_min, cfg.levels.sigma_max)
    return levels.log_normal(cfg.levels.p_mean, cfg.levels.p_std)

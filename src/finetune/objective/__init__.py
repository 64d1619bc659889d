"""What the network learns: noise process, parametrisation, level sampler, weighting, and the loss they make.

Knows no UNet, only `network(x_t, timestep) -> output`. A new objective is added here (its piece, and its case in
`build_objective`) and in the configuration; the training loop stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.objective.levels import UniformIntegers
from finetune.objective.objective import LossTerms, Network, Objective
from finetune.objective.prediction import Prediction
from finetune.objective.process import NoiseProcess
from finetune.objective.weighting import MinSNR, constant

if TYPE_CHECKING:
    from finetune.config_choices import DDPM

__all__ = [
    "LossTerms", "MinSNR", "Network", "NoiseProcess", "Objective", "Prediction", "UniformIntegers",
    "build_objective", "constant",
]  # fmt: skip


def build_objective(cfg: DDPM, *, clip_sample: bool) -> Objective:
    """The objective of the config's `objective` section, with the diffusers scheduler that it trains and exports.

    clip_sample: what an unset cfg.clip_sample means; right for x0 in [-1, 1], wrong for latents. Sampling only.

    Ho et al. 2020 (epsilon, linear), Salimans & Ho 2022 (v_prediction), Hang et al. 2023 (snr_gamma), Lin et al. 2023
    (rescale_betas_zero_snr) are settings of it.
    """
    from diffusers import DDPMScheduler  # seconds to import: only who trains pays

    assert cfg.kind == "ddpm", cfg.kind
    assert not (cfg.rescale_betas_zero_snr and cfg.prediction_type == "epsilon"), "x0 = (x_T - noise) / 0 at the end"
    scheduler = DDPMScheduler(
        num_train_timesteps=cfg.num_train_timesteps,
        beta_schedule=cfg.beta_schedule,
        beta_start=cfg.beta_start,
        beta_end=cfg.beta_end,
        prediction_type=cfg.prediction_type,
        clip_sample=clip_sample if cfg.clip_sample is None else cfg.clip_sample,
        rescale_betas_zero_snr=cfg.rescale_betas_zero_snr,
        # Sampling must start where the signal is exactly zero (Lin et al. 2023, section 3.3): "leading" never does.
        timestep_spacing="trailing" if cfg.rescale_betas_zero_snr else "leading",
    )
    return Objective(
        process=NoiseProcess.from_scheduler(scheduler),
        prediction=Prediction(scheduler.config.prediction_type),
        levels=UniformIntegers(cfg.num_train_timesteps),
        weighting=constant if cfg.snr_gamma is None else MinSNR(cfg.snr_gamma),
        noise_offset=cfg.noise_offset,
        scheduler=scheduler,
    )

"""The optimizer and its learning rate."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from finetune.config import Optimizer
from finetune.config_optimizer import AdamW
from finetune.errors import ConfigError

PACKAGES = {
    "adamw_8bit": "bitsandbytes",
    "lion": "lion-pytorch",
    "prodigy": "prodigyopt",
    "schedule_free_adamw": "schedulefree",
}
"""The package of each kind that needs one; the extra `optimizers` of this project has them all."""


def require_package(cfg: Optimizer) -> None:
    """Raise ConfigError, with what to install, if the package that optimizer.kind needs is absent."""
    package = PACKAGES.get(cfg.kind)
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ConfigError(f"optimizer.kind {cfg.kind} needs a package that is not installed: pip install {package}")


def build_optimizer(
    cfg: Optimizer, parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer that `cfg` names, over float32 parameters, or groups of them as torch.optim takes them.

    Raises ConfigError if its package is absent.
    """
    require_package(cfg)
    if cfg.kind == "adafactor":
        from transformers import Adafactor  # torch's caps the learning rate at 1 / sqrt(step), and scales it

        return Adafactor(
            parameters,
            lr=cfg.learning_rate,
            beta1=cfg.beta1,
            decay_rate=cfg.decay_rate,
            clip_threshold=cfg.clip_threshold,
            weight_decay=cfg.weight_decay,
            relative_step=False,
            scale_parameter=False,
        )
    if cfg.kind == "lion":
        from lion_pytorch import Lion

        betas = (cfg.beta1, cfg.beta2)
        return Lion(parameters, lr=cfg.learning_rate, betas=betas, weight_decay=cfg.weight_decay)
    return _build_adam(cfg, parameters)


def _build_adam(cfg: AdamW, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW and its kin, which share its numbers."""
    shared = {
        "lr": cfg.learning_rate,
        "betas": (cfg.adam_beta1, cfg.adam_beta2),
        "weight_decay": cfg.adam_weight_decay,
        "eps": cfg.adam_epsilon,
    }
    if cfg.kind == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **shared)
    if cfg.kind == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            parameters,
            **shared,
            beta3=cfg.beta3,
            decouple=cfg.decouple,
            use_bias_correction=cfg.use_bias_correction,
            safeguard_warmup=cfg.safeguard_warmup,
            d_coef=cfg.d_coef,
        )
    if cfg.kind == "schedule_free_adamw":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(parameters, **shared)
        optimizer.train()
        return optimizer
    return torch.optim.AdamW(parameters, **shared, fused=True)  # on CPU and CUDA several times faster than the loops


@contextlib.contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the parameters hold what is to be sampled: of a schedule-free optimizer, the average it keeps."""
    if not callable(getattr(optimizer, "eval", None)):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]  # the way back rounds: training would go on changed
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)


def schedule_free_average(
    weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], beta1: float
) -> dict[str, Tensor]:
    """What `evaluation_weights` shows of a checkpoint: its weights y and the optimizer's z, y = beta1 x + (1 - beta1) z
    (Defazio et al. 2024, equation 3), give the average x. optimizer: as training_state.optimizer_tensors names it."""
    pairs = ((name, weight, optimizer.get(f"{name}/z")) for name, weight in weights.items())
    return {name: weight.lerp(z, 1 - 1 / beta1) for name, weight, z in pairs if z is not None}


def learning_rate(cfg: Optimizer, steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step 0, 1, ..., steps - 1 as a function of the step alone.

    diffusers' schedule, whose state is thrown away: stepped by a loop it depends on accumulation and, prepared by
    Accelerate, on the number of processes.
    """
    scheduler = get_scheduler(
        cfg.lr_scheduler,
        torch.optim.SGD([torch.zeros(())], lr=cfg.learning_rate),
        num_warmup_steps=cfg.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=cfg.lr_num_cycles or 1,
        power=cfg.lr_power or 1.0,
    )
    (factor,) = scheduler.lr_lambdas
    return lambda step: cfg.learning_rate * factor(step)

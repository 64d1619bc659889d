"""The optimizer and its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from finetune.config import Optimizer


def build_optimizer(
    cfg: Optimizer, parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.AdamW:
    """AdamW over float32 parameters, or groups of them as torch.optim takes them.

    In torch's fused form: on CPU and CUDA several times faster than the loops.
    """
    return torch.optim.AdamW(
        parameters,
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.adam_weight_decay,
        eps=cfg.adam_epsilon,
        fused=True,
    )


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

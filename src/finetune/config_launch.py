"""What the launcher decides: its precision and accumulation, and how the global batch splits over its processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from finetune.config import TrainConfig
from finetune.config_train import fused_backward_contradictions
from finetune.errors import ConfigError

PRECISION = "ACCELERATE_MIXED_PRECISION"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


class BatchPlan(NamedTuple):
    """Images per optimizer step; micro-steps per optimizer step; images per process and micro-step."""

    global_batch: int
    accumulation: int
    micro_batch: int


def launch_settings(cfg: TrainConfig, env: Mapping[str, str]) -> TrainConfig:
    """cfg with train.mixed_precision and train.gradient_accumulation_steps decided: cfg's, else the launcher's, else
    "no" and 1. ConfigError of `setting: problem` lines if both say something and it differs.

    `accelerate launch` always sets the precision, to "no" if nothing was asked; so the launcher's "no" means unsaid.
    """
    said_precision = env.get(PRECISION, "no")
    said_accumulation = env.get(ACCUMULATION)
    problems = []
    if said_precision not in ("no", "fp16", "bf16"):
        problems.append(f"train.mixed_precision: {PRECISION} is {said_precision!r}, which is none of no, fp16, bf16")
    elif said_precision != "no" and cfg.train.mixed_precision not in (None, said_precision):
        problems.append(
            f"train.mixed_precision: {cfg.train.mixed_precision} here, but {said_precision} from `accelerate launch` "
            f"({PRECISION}): make them the same, or leave one out"
        )
    accumulation = cfg.train.gradient_accumulation_steps
    if said_accumulation is not None and not (said_accumulation.isdecimal() and int(said_accumulation) > 0):
        problems.append(
            f"train.gradient_accumulation_steps: {ACCUMULATION} is {said_accumulation!r}, not a whole number above 0"
        )
    elif said_accumulation is not None and accumulation not in (None, int(said_accumulation)):
        problems.append(
            f"train.gradient_accumulation_steps: {accumulation} here, but {said_accumulation} from `accelerate launch` "
            f"({ACCUMULATION}): make them the same, or leave one out"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    train = replace(
        cfg.train,
        mixed_precision=cfg.train.mixed_precision or said_precision,
        gradient_accumulation_steps=accumulation or int(said_accumulation or 1),
    )
    if found := list(fused_backward_contradictions(train, cfg.optimizer)):
        raise ConfigError("\n".join(f"{place}: {problem}" for place, problem in found))
    return replace(cfg, train=train)


def batch_plan(cfg: TrainConfig, world_size: int) -> BatchPlan:
    """How train.global_batch_size splits over `world_size` processes and the accumulation steps; without it,
    global batch = train.train_batch_size (16 if unset) x world_size x accumulation.

    ConfigError `setting: problem` with the valid choices if it does not split evenly.
    """
    assert world_size >= 1
    accumulation = cfg.train.gradient_accumulation_steps or 1
    share = world_size * accumulation
    total = cfg.train.global_batch_size
    if total is None:
        micro = cfg.train.train_batch_size or 16  # train_unconditional's default
        return BatchPlan(micro * share, accumulation, micro)
    if total % share == 0:
        return BatchPlan(total, accumulation, total // share)
    below = total // share * share
    choices = " or ".join(str(n) for n in (below, below + share) if n)
    steps = [n for n in range(1, total // world_size + 1) if total % (world_size * n) == 0]
    steps = sorted(sorted(steps, key=lambda n: abs(n - accumulation))[:6])
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    raise ConfigError(
        f"train.global_batch_size: {total} images do not split evenly over {processes} x {accumulation} "
        f"gradient_accumulation_steps: use a global_batch_size of {choices}"
        + (f", or gradient_accumulation_steps {', '.join(map(str, steps))}" if steps else "")
    )

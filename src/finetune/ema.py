"""Moving averages of the trained weights: of constant decay, and of constant relative width (power functions).

Own code instead of diffusers' EMAModel: that one reads the model's class back from its config, copies the weights to
the host to sample with them, keeps bfloat16 averages that hardly move, and takes twice the time of `_foreach_lerp_`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from finetune import checkpoint, retention
from finetune.config import Ema as EmaConfig
from finetune.config import TrainConfig
from finetune.errors import ConfigError, surviving
from finetune.sharding import sharded

log = logging.getLogger(__name__)


class Ema:
    """Averages of named parameters, as `cfg` lists them, float32 on the parameters' device."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], cfg: EmaConfig) -> None:
        """Each average starts as a copy of the parameters."""
        self._parameters = dict(parameters)
        self._cfg = cfg
        self._max_decays = dict(zip(parts_of(cfg), cfg.ema_max_decay, strict=False))
        self._gammas = {part_of(width): gamma_of(width) for width in cfg.relative_widths}
        self.updates = 0
        """Optimizer steps that were counted; the averages are those of the last that update_every divides."""
        self.averages: dict[str, dict[str, Tensor]] = {
            part: {name: p.detach().float().clone() for name, p in self._parameters.items()} for part in parts_of(cfg)
        }
        """By the name of their part of a checkpoint: ema_0.9999 (decay), ema_width_0.05 (relative width)."""

    def decay(self, part: str) -> float:
        """The share that the average `part` keeps of itself when it is moved at the end of the next step, number n: of
        constant parameters it then is what one move per step would have made of it."""
        n, every = self.updates + 1, self._cfg.update_every
        if part in self._gammas:
            # Karras et al. 2024, section 3.1; 0 for the first move. The product over all steps since the last one.
            return (1 - every / n) ** (self._gammas[part] + 1)
        return math.prod(self._decay_of_step(step, self._max_decays[part]) for step in range(n - every + 1, n + 1))

    def _decay_of_step(self, n: int, max_decay: float) -> float:
        if self._cfg.ema_warmup == "power":
            return min(max_decay, 1 - (1 + (n - 1) / self._cfg.ema_inv_gamma) ** -self._cfg.ema_power)
        if self._cfg.ema_warmup == "ratio":
            return min(max_decay, (1 + n) / (10 + n))
        return max_decay

    @torch.no_grad()
    def step(self) -> None:
        """Count a step and, if it is one of those at which that is done, move each average towards the parameters.

        Call after an optimizer step that really changed them.
        """
        if (self.updates + 1) % self._cfg.update_every == 0:
            parameters = [p.detach().float() for p in self._parameters.values()]
            for part, average in self.averages.items():
                torch._foreach_lerp_(list(average.values()), parameters, 1 - self.decay(part))
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model holds the first average; pointers are swapped, nothing but sharded parameters is copied."""
        average = next(iter(self.averages.values()))
        self._swap(average)
        try:
            yield
        finally:
            self._swap(average)

    def _swap(self, average: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            if sharded([parameter]):  # FSDP2 gathers from memory of its own, whatever the parameter points at
                now = parameter.detach().clone()
                parameter.detach().copy_(average[name])
                average[name].copy_(now)
            else:
                parameter.data, average[name] = average[name], parameter.data

    @torch.no_grad()
    def load(self, updates: int, averages: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over saved averages (CPU tensors) and their number of updates."""
        self.updates = updates
        for part, saved in averages.items():
            for name, tensor in self.averages[part].items():
                tensor.copy_(saved[name])

    def snapshot(self, root: Path) -> None:
        """Keep the power-function averages of this moment under `root`, as a checkpoint that is never rotated.

        Its step is that at which they were moved last, which their profile ends at; before the first there is nothing
        to keep. A disk that takes no more costs this snapshot, not the run: a later reconstruction says what it lacks.
        """
        parts = {part: self.averages[part] for part in self._gammas}
        moved = self.updates - self.updates % self._cfg.update_every
        state = {"step": moved, "relative_widths": self._cfg.relative_widths}
        with surviving(f"snapshot of the averages at step {moved}", required=False):
            if moved:
                checkpoint.save(root, parts=parts, state=state)


def refuse_unmoved(cfg: EmaConfig, steps: int) -> None:
    """Raise ConfigError if a run of so many steps would end before the averages moved: it would export what it began
    with."""
    if cfg.use_ema and cfg.update_every > steps:
        raise ConfigError(
            f"ema.update_every {cfg.update_every}: the run has {steps} steps, so the averages would never move: use at "
            f"most {steps}"
        )


def drop_snapshots_after(root: Path, step: int) -> None:
    """Delete the snapshots under `root` of steps that will be done again, as metrics.jsonl loses their lines.

    What an interrupted snapshot left goes with them; only for the run that holds the lock of its output_dir.
    """
    for path in checkpoint.folders(root):
        if checkpoint.step_of(path) > step:
            log.info("%s is of a step that is done again: it is written anew", path)
            path.rename(path.with_name(f"{path.name}.trash"))
    retention.sweep(root)


def by_module(average: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of an average by the part of a checkpoint that holds their module: model, and text encoders."""
    found: dict[str, dict[str, Tensor]] = {"model": {}}
    for name, tensor in average.items():
        module, _, rest = name.partition(".")
        known = module.startswith("text_encoder")  # which the names of a UNet never do
        found.setdefault(module if known else "model", {})[rest if known else name] = tensor
    return found


def parts_of(cfg: EmaConfig) -> list[str]:
    """The names of all averages in a checkpoint; the first is sampled and exported."""
    return [*(f"ema_{decay}" for decay in cfg.ema_max_decay), *map(part_of, cfg.relative_widths)]


def averaged_part(cfg: TrainConfig, average: str | None) -> str:
    """The part of a checkpoint that `average` means; "optimizer" if that is what averages.

    average: a part, "ema" for the first average, "weights" for none; unset: the first, if there is one. Raises
    ConfigError for one that the run did not keep.
    """
    parts = parts_of(cfg.ema) if cfg.ema.use_ema else []
    if cfg.optimizer.kind == "schedule_free_adamw":
        parts = ["optimizer"]
    if average == "weights" or (average is None and not parts):
        return "model"
    if average in (None, "ema") and parts:
        return parts[0]
    if average not in parts:
        raise ConfigError(f"--average {average}: the run kept {', '.join(parts) or 'no averages'}, beside weights")
    return average


def part_of(relative_width: float) -> str:
    """The name of a power-function average in checkpoints and snapshots."""
    return f"ema_width_{relative_width}"


def gamma_of(relative_width: float) -> float:
    """The exponent of the power function tau^gamma whose relative width this is.

    Relative width: the standard deviation of the profile on [0, 1], so of the steps that an average is made of, over
    the number of steps; 0 < relative_width <= 12**-0.5, at which gamma is 0 and all steps count alike. Solves
    (gamma + 1) = relative_width^2 (gamma + 2)^2 (gamma + 3) (Karras et al. 2024, section 3.1, appendix C).
    """
    assert 0 < relative_width <= math.sqrt(1 / 12), relative_width
    inverse = relative_width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

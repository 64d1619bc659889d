"""The loss of images that are not trained on, with the same noise and levels each time, and whether it turns up.

Each image is measured by itself, at `levels` noise levels at a time, by the weights that are sampled and exported: in
evaluation mode, cropped to a square at the centre, not mirrored, its condition never dropped, weighted as in training.
What is drawn for it (noise, level, posterior sample) follows from the seed and its bytes: so its loss depends neither
on the other images nor on the number of processes, and between two measurements nothing but the weights differs.

Two measurements are compared image by image: the standard error of the mean difference is far below that of either
mean, because images differ much more from each other than one does from itself. A level that objective.levels
loss_second_moment would draw by past losses is drawn uniformly, or measurements would differ by that.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from finetune.batching import collate
from finetune.config import Validation
from finetune.models import bind
from finetune.objective import Objective
from finetune.objective.levels import LossSecondMoment, UniformIntegers
from finetune.processes import largest
from finetune.samples import report_replaced
from finetune.seeding import PositionRandom, key
from finetune.signals import SIGNALS, Interrupted

if TYPE_CHECKING:
    from finetune.checkpoint import Checkpoint
    from finetune.data import TrainData
    from finetune.trainer import Trainer

log = logging.getLogger(__name__)
ERRORS = 2
"""Standard errors by which the loss must lie above the lowest to count as risen."""


class StratifiedLevels(PositionRandom):
    """What is drawn to measure one image at n levels, row by row: row j takes its level from the share
    [j / n, (j + 1) / n) of the distribution that the objective draws levels from."""

    def __init__(self, seed: int, image: int, n: int, device: torch.device | str) -> None:
        """image: what identifies its bytes."""
        super().__init__(seed, torch.tensor([_position(seed, image, row) for row in range(n)]), device)
        self._shares = torch.arange(n, dtype=torch.float64)

    def uniform(self, purpose: str) -> Tensor:
        """As PositionRandom's but for the level: there row j of [n] lies in [j / n, (j + 1) / n)."""
        drawn = super().uniform(purpose)
        return (self._shares + drawn) / len(drawn) if purpose == "level" else drawn

    def stratified(self, purpose: str, strata: int) -> Tensor:
        """As `uniform`: the strata are those of the rows."""
        return self.uniform(purpose)

    def integers(self, purpose: str, high: int) -> Tensor:
        """As PositionRandom's but for the level, which is taken evenly from [0, high)."""
        drawn = (high * self.uniform(purpose)).long().clamp(max=high - 1)  # the product may round up
        return drawn if purpose == "level" else super().integers(purpose, high)


class HeldOut:
    """Measures the loss of held-out images and of as many training images, and judges whether it turns up.

    After validation.patience measurements in a row that lie above the lowest by more than ERRORS standard errors of the
    paired difference, it warns. A checkpoint keeps what that hangs on.
    """

    def __init__(self, data: TrainData, cfg: Validation) -> None:
        """data: with rows held out."""
        self.cfg = cfg
        trained = replace(data, rules=data.held_out.rules, buckets=None, latents=None)  # other crops are trained
        if data.class_images_from is not None:
            trained = replace(trained, rows=trained.rows[trained.rows < data.class_images_from])
        self._sides = {"validation": data.held_out, "train_validation": trained}
        held_out = _first_of_each_image(data.held_out, cfg.max_images)
        self.rows = [held_out, _first_of_each_image(trained, len(held_out))]
        """The rows that are measured: held out, and trained on."""
        self._images = data.image_numbers.view(np.int64)
        self.step: int | None = None
        """Of the last measurement."""
        self._best: Tensor | None = None  # [n] float64, the losses of the held-out images where their mean was lowest
        self._best_step: int | None = None
        self._risen = 0

    @property
    def ends(self) -> bool:
        """Whether the training is to end, as it overfits (validation.stop_on_overfit)."""
        return self.cfg.stop_on_overfit and self._risen >= self.cfg.patience

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, trainer: Trainer) -> dict[str, float | None]:
        """What metrics.jsonl takes of this step, the same on all processes, each of which measures its share.

        Empty if this step was measured before. A signal interrupts it: it is then empty too, `trainer.stop` holds the
        signal, and the run that goes on measures.
        """
        accelerator, mine = trainer.accelerator, []
        if self.step == trainer.step:
            return {}
        with (
            trainer.averaged_weights(),
            torch.no_grad(),
            accelerator.autocast(),
            contextlib.suppress(Interrupted),
            accelerator.interrupting(),
        ):
            sides = zip(self._sides.values(), self.rows, strict=True)
            mine = [self._share(trainer, data, rows) for data, rows in sides]
        for frozen in trainer.modules.frozen:
            frozen.put_aside()
        accelerator.wait_for_everyone()  # before the collectives, which do not wait for ever
        trainer.stop = int(largest(accelerator, SIGNALS.received))
        if trainer.stop:
            return {}
        processes = accelerator.num_processes
        gathered = [accelerator.gather(losses).reshape(processes, -1).T.flatten().cpu().double() for losses in mine]
        losses = [all_of[: len(rows)] for all_of, rows in zip(gathered, self.rows, strict=True)]
        return self._judged(dict(zip(self._sides, losses, strict=True)), trainer.step)

    def _share(self, trainer: Trainer, data: TrainData, rows: np.ndarray) -> Tensor:
        """The losses of every so many of the rows; as many on each process, for the last ones may be measured twice."""
        rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
        share = [int(rows[i % len(rows)]) for i in range(rank, -(-len(rows) // processes) * processes, processes)]
        return torch.stack([self.loss(trainer, data, row) for row in share])

    def loss(self, trainer: Trainer, data: TrainData, row: int) -> Tensor:
        """The mean loss of one image over its levels, a scalar on the device, by the weights that the UNet holds."""
        modules, device, levels = trainer.modules, trainer.accelerator.device, self.cfg.levels
        batch = collate([((row, 0, row), sample) for sample in data.samples([row], [0])])
        report_replaced(batch.replaced, trainer.replaced)
        seed, image = trainer.cfg.seed, int(self._images[row])
        once = PositionRandom(seed, torch.tensor([_position(seed, image)]), device)
        x0 = modules.space.encode(batch.pixel_values.to(device), once)
        condition = {name: rows.repeat_interleave(levels, 0) for name, rows in modules.conditioner.of(batch).items()}
        network, random = bind(modules.unet, condition), StratifiedLevels(seed, image, levels, device)
        masked = {} if batch.mask is None else {"mask": batch.mask.to(device).repeat_interleave(levels, 0)}
        objective = _with_levels_of_its_own(modules.objective)
        terms = objective.loss(network, x0.repeat_interleave(levels, 0), random, **masked)
        return (terms.per_sample * terms.weight).mean()

    # -- judging -------------------------------------------------------------------------------------------------------

    def _judged(self, losses: Mapping[str, Tensor], step: int) -> dict[str, float | None]:
        """Take in the losses of both sides, [images] float64 each."""
        line, now, self.step = {}, losses["validation"], step
        for name, side in losses.items():
            line |= _mean_and_error(f"{name}_loss", f"{name}_stderr", side)
        if not now.isfinite().all():
            log.warning("the validation loss of step %d is not finite: it is not compared", step)
            return line
        if self._best is not None:
            difference = now - self._best
            line |= _mean_and_error("validation_rise", "validation_rise_stderr", difference)
            lowest = float(difference.mean()) < 0
            clearly = float(difference.mean()) > ERRORS * standard_error(difference)
            self._risen = self._risen + 1 if clearly else 0
        if self._best is None or lowest:
            self._best, self._best_step = now, step
        if self._risen == self.cfg.patience:
            log.warning("%s", self._warning(float(now.mean()), step))
        return line

    def _warning(self, loss: float, step: int) -> str:
        what = "the training ends here (validation.stop_on_overfit)" if self.ends else "more steps make it worse"
        return (
            f"overfitting: at step {step} the validation loss, {loss:.5g}, lies above that of step {self._best_step}, "
            f"{float(self._best.mean()):.5g}, by more than {ERRORS} standard errors of the difference, "
            f"{self._risen} times in a row: {what}"
        )

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors; none before the first measurement."""
        if self._best is None:
            return {}
        return {"validation": {"best": self._best, "images": torch.from_numpy(self._images[self.rows[0]])}}

    def facts(self) -> dict[str, Any]:
        """The rest, of JSON's types."""
        known = {"step": self.step, "best_step": self._best_step, "risen": self._risen, "levels": self.cfg.levels}
        return {"validation": known}

    def load(self, found: Checkpoint) -> None:
        """Take over a checkpoint. Losses of other images or levels, which were allowed to change, are not compared."""
        known = found.state.get("validation", {})
        if known.get("best_step") is None:
            return
        saved = found.tensors("validation")
        if known["levels"] != self.cfg.levels or not np.array_equal(saved["images"], self._images[self.rows[0]]):
            log.warning("the validation loss is of other images or levels than before: compared from here on alone")
            return
        self._best, self._best_step = saved["best"], known["best_step"]
        self.step, self._risen = known["step"], known["risen"]


def standard_error(values: Tensor) -> float:
    """Of the mean of [n] independent values, n at least 2: their standard deviation over sqrt(n)."""
    return float(values.std(correction=1)) / math.sqrt(len(values))


def _mean_and_error(mean: str, error: str, values: Tensor) -> dict[str, float | None]:
    """Both by these names; None for what is not finite, which JSON does not have."""
    found = {mean: float(values.mean()), error: standard_error(values)}
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def _first_of_each_image(data: TrainData, most: int) -> np.ndarray:
    """The first row of each image, for at most so many images: those with the lowest numbers for their bytes."""
    images = data.image_numbers[data.rows]
    known, first = np.unique(images, return_index=True)
    return data.rows[first[known != 0][:most]]  # 0: a row that turned unusable


def _position(seed: int, image: int, *row: int) -> int:
    """What the draws of an image are keyed by in place of a position in the run; 63 bits, as a tensor holds them."""
    return key(seed, "validation", image, *row) >> 1


def _with_levels_of_its_own(objective: Objective) -> Objective:
    """The objective without memory of past losses."""
    if isinstance(objective, Objective) and isinstance(objective.levels, LossSecondMoment):
        return replace(objective, levels=UniformIntegers(len(objective.levels.losses)))
    return objective

"""How an optimizer step is taken or not, after the backward pass or in it, and when the host is told.

A step is taken if the norm of its gradients is finite. Where the optimizer can heed that by itself, the device decides,
and the host goes on to queue the next step; it asks just before it queues the next optimizer step, whose learning rate
hangs on the answer, or as soon as anything else does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune import checkpoint, tracking
from finetune.errors import ConfigError, NonFiniteError
from finetune.failures import MicroBatch, command_to_resume, count_skipped
from finetune.meter import Meter
from finetune.processes import Processes, average_gradients, largest
from finetune.signals import SIGNALS
from finetune.transfer import FromDevice

if TYPE_CHECKING:
    from finetune.trainer import Trainer


@dataclass(frozen=True)
class Pending:
    """A step that was queued, and of which it is not known yet whether it was taken."""

    micro_batches: Sequence[MicroBatch]
    news: FromDevice
    """Its gradient norm, and the signal that one of the processes had received."""
    meter: Meter


class Stepper:
    """Takes the steps of a trainer, whose counters are those of the last `settle`."""

    def __init__(self, trainer: Trainer) -> None:
        """Raises ConfigError if the launch does not go with train.fused_backward."""
        self._trainer = trainer
        self._fused: FusedBackward | None = None
        self.pending: Pending | None = None
        if trainer.cfg.train.fused_backward:
            check_fused_backward(trainer.accelerator)
            self._fused = FusedBackward(trainer.optimizer.optimizer, trainer.parameters)

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch."""
        if self._fused:
            self._set_learning_rate()
            self._fused.backward(self._trainer, loss)
        else:
            self._trainer.accelerator.backward(loss)

    def step(self, micro_batches: Sequence[MicroBatch], meter: Meter) -> bool:
        """Take the step of the micro-batches that the gradients are of. Returns whether it was taken if something that
        is due hangs on it; else False, and `settle` learns of it before the next step is taken."""
        trainer, optimizer = self._trainer, self._trainer.optimizer
        grad_norm, signal = self._fused.grad_norm if self._fused else clipped(trainer), SIGNALS.received
        news = FromDevice(torch.stack([grad_norm, largest(trainer.accelerator, signal)]))
        self.settle()
        self._set_learning_rate()
        trainer.whole = False  # from here on, state changes: what fails before leaves the last step as it was
        trainer.state.batches += 1
        if blind := self._can_skip:
            step_if_finite(optimizer, grad_norm)
        elif not self._fused and math.isfinite(news.tolist()[0]):
            optimizer.step()
        optimizer.zero_grad()
        self.pending, trainer.whole = Pending(micro_batches, news, meter), True
        if blind and not (trainer.stop or is_due(trainer) or (signal and trainer.accelerator.num_processes == 1)):
            meter.hold()
            return False
        return self.settle()

    def settle(self, *, alone: bool = False) -> bool:
        """Learn whether the step that was queued last was taken, if there is one, and count it. Returns whether it was.

        alone: without the other processes, which may be gone. Raises NonFiniteError after max_nonfinite_steps.
        """
        if self.pending is None:
            return False
        trainer, pending, self.pending = self._trainer, self.pending, None
        trainer.whole = False
        grad_norm, stop = pending.news.tolist()
        trainer.stop = int(stop)
        if taken := math.isfinite(grad_norm):
            trainer.state.step += 1
            trainer.state.nonfinite_in_a_row = 0
            for each in pending.micro_batches:
                trainer.modules.objective.update(each.terms, trainer.accelerator.gather)
            if trainer.ema:
                trainer.ema.step()  # the weights are still those after that step
            pending.meter.commit(grad_norm)
        else:
            if trainer.accelerator.scaler:
                trainer.accelerator.scaler.update()  # fp16: lowers the scale of the loss
            pending.meter.discard()
            count_skipped(trainer, pending.micro_batches, grad_norm, alone=alone)
        trainer.whole = True
        return taken

    def _set_learning_rate(self) -> None:
        for group in self._trainer.optimizer.param_groups:
            group["lr"] = self._trainer.learning_rate(self._trainer.step) * group["lr_scale"]

    @property
    def _can_skip(self) -> bool:
        """Whether the device may decide if a step is taken: only torch's fused kernels can, and nothing on the host may
        hang on the losses of a step before the next begins. The first step makes the optimizer's state, which one that
        is not taken must not: on it the host decides."""
        trainer, optimizer = self._trainer, self._trainer.optimizer.optimizer
        able = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"] and len(optimizer.state) > 0
        host = trainer.accelerator.scaler or trainer.accelerator.shards or trainer.modules.objective.learns
        return able and not host and not self._fused


def clipped(trainer: Trainer) -> Tensor:
    """The norm of all gradients, which are then scaled down to train.max_grad_norm; a scalar on the device. DDP has
    averaged the gradients, so that it is the same on every process, and with it what is decided by it."""
    if trainer.accelerator.num_processes > 1:  # DDP averages those of the network only
        average_gradients(trainer.accelerator, trainer.modules.beside.values())
    max_norm = trainer.cfg.train.max_grad_norm or math.inf
    norm = trainer.accelerator.clip_grad_norm_(list(trainer.parameters.values()), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
    """Take a step of torch's fused optimizer if grad_norm, a scalar on its device, is finite; else change nothing."""
    fused = optimizer.optimizer
    fused.found_inf = (~grad_norm.isfinite()).float()  # what torch's GradScaler tells the kernels
    try:
        optimizer.step()
    finally:
        del fused.found_inf


def is_due(trainer: Trainer) -> bool:
    """Whether something is to be done after the step under way that needs to know whether it was taken."""
    cfg = trainer.cfg
    every = [cfg.tracking.log_every, cfg.checkpoint.checkpointing_steps, cfg.sample.sample_every]
    every += [cfg.ema.snapshot_every, cfg.validation.every if trainer.validation else None]
    return any(tracking.due(trainer.step + 1, each, trainer.steps) for each in every)


class FusedBackward:
    """Takes the step of each parameter in the backward pass, as soon as its gradient is there, and frees the gradient:
    there is never more than one (Lv et al. 2023).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        """optimizer: of these parameters, one whose step of a parameter needs no other; its state stays where it is."""
        self._optimizer = optimizer
        self._norms: dict[nn.Parameter, Tensor | None] = dict.fromkeys(parameters.values())
        self._group = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.grad_norm: Tensor
        """Of the last step, the norm of all gradients; the loss, if that was not finite. A scalar on the device."""
        for parameter in parameters.values():
            parameter.register_post_accumulate_grad_hook(self._step)

    @torch.no_grad()
    def _step(self, parameter: nn.Parameter) -> None:
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [groups[self._group[parameter]] | {"params": [parameter]}]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

    def backward(self, trainer: Trainer, loss: Tensor) -> None:
        """The backward pass of a step, and the step; nothing, if the loss is not finite.

        Raises NonFiniteError if gradients were not although the loss was: a part of the step is taken by then.
        """
        if not loss.isfinite():  # waits for the device, as afterwards no step can be skipped
            self.grad_norm = loss.detach()
            return
        trainer.whole = False
        self._norms = dict.fromkeys(self._norms)
        trainer.accelerator.backward(loss)
        norms = [norm for norm in self._norms.values() if norm is not None]  # a layer that is not read has none
        self.grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        if not self.grad_norm.isfinite():
            raise _half_taken(trainer, float(self.grad_norm))


def _half_taken(trainer: Trainer, grad_norm: float) -> NonFiniteError:
    """The end of a run after gradients that are not finite changed some of the weights."""
    trainer.saver.wait()
    saved = checkpoint.folders(trainer.output_dir / "checkpoints")
    onward = f"{command_to_resume(trainer.cfg)} goes on from {saved[-1]}" if saved else "there is no checkpoint yet"
    return NonFiniteError(
        f"the gradient norm of step {trainer.step + 1} was {grad_norm} although its loss was finite. With "
        "train.fused_backward some weights have taken that step already, so the run ends and nothing of it is saved: "
        f"{onward}. If it comes back, lower optimizer.learning_rate, or set train.fused_backward false, which skips "
        "such a step."
    )


def check_fused_backward(accelerator: Processes) -> None:
    """Raise ConfigError if the launch does not go with train.fused_backward."""
    rule = "train.fused_backward frees each gradient as soon as it is used"
    if accelerator.num_processes > 1 or accelerator.shards:
        raise ConfigError(
            f"{rule}, before it could be averaged over {accelerator.num_processes} processes: launch one process "
            "(configs/accelerate/one_gpu.yaml), or set it false"
        )
    if accelerator.mixed_precision == "fp16":
        raise ConfigError(f"{rule}, before an overflow of fp16 could be seen: use mixed_precision bf16 or no")

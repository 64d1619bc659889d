"""What is told, counted and still saved when a step or a run fails."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import DistError

from finetune.errors import CheckpointError, NonFiniteError, Preempted, ProcessError
from finetune.objective import LossTerms
from finetune.signals import SIGNALS, preempted

if TYPE_CHECKING:
    from finetune.config import TrainConfig
    from finetune.trainer import Trainer

log = logging.getLogger(__name__)
MOST_ROWS = 16  # named in one message


@contextlib.contextmanager
def losing_nothing(trainer: Trainer) -> Iterator[None]:
    """What fails inside is told with the process and its samples; the last whole step is saved before the run ends.

    An error in one process leaves the others in a collective, which then fails too; each of them ends with an error
    that names the first. After a signal, it is the signal that ended the run, as schedulers and launchers stop
    processes one after the other.
    """
    try:
        yield
    except (Preempted, NonFiniteError, CheckpointError):
        raise  # agreed by all processes, and saved or final
    except Exception as error:
        signal = SIGNALS.received
        _settle(trainer)
        theirs = _from_a_collective(error)
        if not theirs:
            trainer.accelerator.leave(error)
            log.error("%s: %s", whereabouts(trainer), type(error).__name__)
        saved = trainer.rescue()
        told = _of_others(trainer) if theirs else _of_memory(error, trainer)
        if signal and trainer.whole and isinstance(told, ProcessError):
            raise preempted(signal, trainer.step, how=command_to_resume(trainer.cfg)) from error
        if told is not error or isinstance(error, ProcessError):
            log.error("saved at step %d" if saved else "not saved at step %d", trainer.step)
        if told is error:
            raise
        raise told from error


def _settle(trainer: Trainer) -> None:
    """Count the step that was queued before the failure; if the device has failed, it stays unknown, and unsaved.

    Raises NonFiniteError if that step was one too many that were not finite.
    """
    try:
        trainer.stepper.settle(alone=True)
    except NonFiniteError:
        raise
    except Exception as error:
        log.error("the last step cannot be told: %s", error)


def _from_a_collective(error: Exception) -> bool:
    """Whether it only says that another process is not there; DDP passes gloo's words on as a RuntimeError."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _of_others(trainer: Trainer) -> ProcessError:
    """The error of a process that lost another one."""
    gone = trainer.accelerator.find_gone()
    words = [f"process {rank} {what} ({_words(_rows(trainer, rank))})" for rank, what in gone.items()]
    return ProcessError(
        f"process {trainer.accelerator.process_index} stops in step {trainer.step + 1}: "
        f"{'; '.join(words) or 'another process hangs, see where the threads of each stand'}"
    )


def _of_memory(error: Exception, trainer: Trainer) -> Exception:
    """An error of the device's memory as one with advice; any other as it is."""
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    return ProcessError(
        f"out of memory on {trainer.accelerator.device} in step {trainer.step + 1}, with {trainer.micro_batch} images "
        "at a time: set train.gradient_checkpointing true, train.mixed_precision bf16, or a smaller "
        "train.train_batch_size with as many more train.gradient_accumulation_steps, which keeps the global batch and "
        f"may change at a resume. {str(error).strip().splitlines()[0]}"
    )


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch of a step came to, on its device."""

    rows: Tensor
    """[B] int64, on the CPU: numbers of the rows of the data."""
    terms: LossTerms
    """Without their graph."""
    finite: Tensor
    """[B] bool: whether x0 was."""


def count_skipped(
    trainer: Trainer, micro_batches: Sequence[MicroBatch], grad_norm: float, *, alone: bool = False
) -> None:
    """Count a step that was not taken. With fp16, an overflow is routine until the loss scale is down to 1.

    alone: tell of this process's samples only, as the others may be gone. Raises NonFiniteError after
    train.max_nonfinite_steps in a row.
    """
    scaler, state = trainer.accelerator.scaler, trainer.state
    flags = [
        torch.stack([each.rows.to(each.finite.device), (each.terms.per_sample * each.terms.weight).isfinite(),
                     each.finite], 1)
        for each in micro_batches
    ]  # fmt: skip
    own = torch.cat(flags)
    why = _nonfinite(own if alone else trainer.accelerator.gather(own), trainer.cfg)
    if not why and scaler and scaler.get_scale() >= 1:
        return
    why = why or f"gradient norm {grad_norm}"
    state.nonfinite_steps += 1
    state.nonfinite_in_a_row += 1
    log.warning("step %d skipped on all processes: %s; %d in a row", state.step, why, state.nonfinite_in_a_row)
    if state.nonfinite_in_a_row >= trainer.cfg.train.max_nonfinite_steps:
        raise NonFiniteError(
            f"loss or gradient was NaN or infinite {state.nonfinite_in_a_row} times in a row at step {state.step} "
            f"(train.max_nonfinite_steps), last time: {why}. If these samples are not to blame, lower "
            "optimizer.learning_rate, or use mixed_precision bf16 or no. "
            f"The last finite checkpoint is kept in {trainer.output_dir / 'checkpoints'}."
        )


def _nonfinite(flags: Tensor, cfg: TrainConfig) -> str:
    """Why a step was not finite, from [n, 3]: row, whether its loss was finite, whether its x0 was. Empty if all were:
    then the gradient overflowed."""
    rows, loss, x0 = flags.cpu().unbind(1)
    if not x0.all() and cfg.space.kind == "latent":
        return (
            f"non-finite latents from the VAE {cfg.space.vae} ({_words(rows[x0 == 0].tolist())}): run the VAE in "
            "float32, use another one, or leave these rows out"
        )
    if not x0.all():
        return f"non-finite pixels ({_words(rows[x0 == 0].tolist())})"
    return "" if loss.all() else f"non-finite loss ({_words(rows[loss == 0].tolist())})"


def command_to_resume(cfg: TrainConfig) -> str:
    """What goes on with a run, in words."""
    return "the same command" + " without resume_from_checkpoint" * (cfg.resume_from_checkpoint != "latest")


def whereabouts(trainer: Trainer) -> str:
    """Which process this is and what it works on, for messages."""
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    step = trainer.step + 1 + (trainer.stepper.pending is not None)  # which was taken, most likely
    return f"process {rank} of {processes}, step {step}, {_words(_rows(trainer, rank))}"


def _rows(trainer: Trainer, rank: int) -> list[int]:
    """The rows of the data in the present step of a process; they follow from the step, so no process must tell."""
    micro_batches = itertools.islice(trainer.loader(rank).batch_sampler, trainer.accumulation)
    return [row for places in micro_batches for _, _, row in places]


def _words(rows: Sequence[int]) -> str:
    """Numbers of rows of the data, at most MOST_ROWS."""
    more = f" and {len(rows) - MOST_ROWS} more" if len(rows) > MOST_ROWS else ""
    return f"rows {', '.join(map(str, rows[:MOST_ROWS]))}{more}"

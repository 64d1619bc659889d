"""When checkpoints are written: now, or in the background from a copy; and how many may fail before the run ends."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from finetune import checkpoint
from finetune.config import Checkpoint as CheckpointConfig
from finetune.config_validation import METRICS
from finetune.errors import CheckpointError, ConfigError, NonFiniteError
from finetune.processes import largest
from finetune.retention import tidy
from finetune.sharding import Parts, gathered, held

if TYPE_CHECKING:
    from finetune.trainer import Trainer

log = logging.getLogger(__name__)

MOST_MISSED = 3  # checkpoints in a row that a run may do without


class Saver:
    """Writes the checkpoints of one run, at most one at a time; for the process that holds the lock of output_dir."""

    def __init__(self, output_dir: Path, cfg: CheckpointConfig) -> None:
        """Touches nothing yet: several processes may have one."""
        self._root, self._cfg = output_dir / "checkpoints", cfg
        self._folder: int | None = None
        self._best_metric: dict[str, float] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: tuple[int, Future[None]] | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._missed = 0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()  # an error elsewhere must not cut short the checkpoint that is being written

    def tidy(self) -> None:
        """Delete what an interrupted run left, and the checkpoints that need not be kept. Before the first save."""
        self._folder = self._root.parent.stat().st_ino
        if self._root.is_dir():
            tidy(self._root, self._cfg)

    def note(self, numbers: Mapping[str, Any]) -> None:
        """What was logged last, of which each checkpoint keeps checkpoint.best_metric.

        Raises ConfigError if that is no number of it.
        """
        name = self._cfg.best_metric
        if name is None or (name in METRICS) != any(metric in numbers for metric in METRICS):  # lines of their own
            return
        if not isinstance(numbers.get(name), int | float):
            known = ", ".join(key for key, value in numbers.items() if isinstance(value, int | float))
            raise ConfigError(f"checkpoint.best_metric: {name!r} is no number of metrics.jsonl; choose from {known}")
        self._best_metric = {name: numbers[name]}

    def save(self, parts: Parts, state: Mapping[str, Any], *, required: bool) -> None:
        """Write a checkpoint of this moment, of which state["step"] is the step; then delete the older ones.

        One that fails (OSError, such as a full disk) costs this checkpoint; the third in a row, or one that is
        required, raises CheckpointError. With checkpoint.asynchronous it is written in the background unless it is
        required, and fails at the next call. Waits for the one before in any case.
        """
        self.wait()
        self._require_same_folder()
        state = {**state, "best_metric": self._best_metric}
        if self._cfg.asynchronous and not required and self._fits_memory(parts):
            self._in_flight = state["step"], self._background.submit(self._write, self._copy(parts), state)
        else:
            self._attempt(state["step"], lambda: self._write(parts, state), required=required)
        if self._missed >= MOST_MISSED:
            raise CheckpointError(
                f"{self._missed} checkpoints in a row could not be written, the last failure is above. What "
                f"{self._root} holds is whole: free some space, then the same command goes on from the newest."
            )

    def wait(self) -> None:
        """Until the save in flight, if there is one, has ended; if it failed, that is said and counted."""
        if self._in_flight is None:
            return
        (step, future), self._in_flight = self._in_flight, None
        start = time.perf_counter()
        if not future.done():
            future.exception()
            log.info("waited %.1f s for the checkpoint of step %d", time.perf_counter() - start, step)
        self._attempt(step, future.result, required=False)

    def _require_same_folder(self) -> None:
        """Raise CheckpointError if output_dir was renamed: a new one of its name has neither lock nor checkpoints."""
        folder = self._root.parent
        if self._folder is not None and (not folder.exists() or folder.stat().st_ino != self._folder):
            raise CheckpointError(
                f"output_dir {folder} was moved or replaced while the run used it; its checkpoints are whole. Start "
                "again with output_dir where it is now"
            )

    def _attempt(self, step: int, write: Callable[[], None], *, required: bool) -> None:
        try:
            write()
            self._missed = 0
        except OSError as error:
            if required:
                raise CheckpointError(
                    f"the checkpoint of step {step} could not be written ({error}). What {self._root} holds is "
                    "whole: free some space, then the same command goes on from the newest."
                ) from error
            self._missed += 1
            log.warning("no checkpoint at step %d (%s); what was written before is whole, going on", step, error)

    def _write(self, parts: Parts, state: Mapping[str, Any]) -> None:
        checkpoint.save(self._root, parts=parts, state=state)
        tidy(self._root, self._cfg)

    def _fits_memory(self, parts: Parts) -> bool:
        """Whether the copy of `parts` has room in host memory; once it had, its memory is used again."""
        size = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
        free = psutil.virtual_memory().available + sum(t.nbytes for ts in self._copies.values() for t in ts.values())
        if size > free:
            log.warning(
                "checkpoint.asynchronous needs %.1f GB of host memory for a copy, %.1f GB are free: written at once",
                size / 1e9,
                free / 1e9,
            )
        return size <= free

    @torch.no_grad()
    def _copy(self, parts: Parts) -> Parts:
        """`parts` in host memory, which is pinned if they come from a GPU; the memory is that of the last copy."""
        on_gpu, copies = False, {}
        for part, tensors in parts.items():
            last, copies[part] = self._copies.get(part, {}), {}
            for name, tensor in tensors.items():
                on_gpu |= tensor.is_cuda
                copy = last.get(name)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[part][name] = copy.copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        self._copies = copies
        return copies


def parts_of(trainer: Trainer) -> Parts:
    """The tensors of a checkpoint of this moment; with FSDP2, all processes gather them for the main one."""
    parts, accelerator = trainer.state.parts(), trainer.accelerator
    return gathered(parts, keep=accelerator.is_main_process) if accelerator.shards else parts


def write_checkpoint(trainer: Trainer, parts: Parts, *, required: bool) -> None:
    """Write, or begin to, a checkpoint of `parts`, which are those of this moment, and of all else that it keeps."""
    facts = trainer.state.facts() | {"samples_seen": trainer.state.batches * trainer.global_batch}
    parts = {**parts, "data": {name: torch.from_numpy(values) for name, values in trainer.data.kept.items()}}
    if trainer.validation:
        parts, facts = parts | trainer.validation.parts(), facts | trainer.validation.facts()
    trainer.saver.save(parts, facts | dataclasses.asdict(trainer.facts), required=required)


def nonfinite(parts: Parts) -> list[str]:
    """The parts among the weights and averages that hold a NaN or an infinity.

    An optimizer's second moment may overflow in a training that is otherwise well, so the optimizer does not count.
    """
    found = []
    for part in parts.keys() - {"optimizer", "objective"}:
        own = map(held, parts[part].values())
        floats = [tensor for tensor in own if tensor.is_floating_point() and tensor.numel()]
        extremes = [torch.stack(tensor.detach().aminmax()).float() for tensor in floats]  # NaN if any element is
        if extremes and not torch.stack(extremes).isfinite().all():
            found.append(part)
    return sorted(found)


def refuse_nonfinite(trainer: Trainer) -> None:
    """Raise NonFiniteError on all processes alike if one of them holds weights or averages that are not finite: of a
    finite loss and gradient the step may still be too large for float32."""
    parts = nonfinite(trainer.state.parts())
    if largest(trainer.accelerator, len(parts)):
        where = ", ".join(parts) or "the weights of another process"
        raise NonFiniteError(
            f"{where} held NaN or infinite values at step {trainer.step}: lower optimizer.learning_rate, or use "
            "mixed_precision bf16 or no. The last finite checkpoint is kept in "
            f"{trainer.output_dir / 'checkpoints'}."
        )

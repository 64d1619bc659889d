"""Numbers of a run: metrics.jsonl, which is always written, and the trackers that Accelerate knows."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from finetune.config import Tracking, TrainConfig
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from tqdm import tqdm

    from finetune.meter import Meter
    from finetune.trainer import Trainer

log = logging.getLogger(__name__)


def trackers(cfg: Tracking) -> list[str]:
    """The names in tracking.report_to. Raises ConfigError for one that Accelerate does not know or does not find."""
    names = [cfg.report_to] if isinstance(cfg.report_to, str) else list(cfg.report_to)
    if names == ["none"]:
        return []
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"tracking.report_to: Accelerate knows no tracker {name!r}; choose from {known}, none")
        if name not in installed:
            raise ConfigError(f"tracking.report_to: {name} is not installed; pip install {name}, or choose another")
    return names


class Tracker:
    """Writes each logged step to metrics.jsonl and to the trackers of `accelerator`; on the main process only."""

    def __init__(self, accelerator: Accelerator, cfg: TrainConfig, *, resumed_step: int) -> None:
        """Opens the files; lines of metrics.jsonl after `resumed_step` are of steps that will be done again, and go."""
        self._accelerator = accelerator
        self._path = Path(cfg.output_dir) / "metrics.jsonl"
        self._broken = self._missing = False
        if not accelerator.is_main_process:
            return
        if self._path.exists():
            self._path.with_suffix(".tmp").write_text(
                "".join(f"{line}\n" for line in self._path.read_text().splitlines() if _step(line) <= resumed_step)
            )
            self._path.with_suffix(".tmp").replace(self._path)  # a kill in between loses no line
        # TensorBoard would show the steps that are done again twice.
        once = {"tensorboard": {"purge_step": resumed_step + 1}}
        name = cfg.tracking.tracker_project_name
        self._guarded(accelerator.init_trackers, name, config=flat(cfg), init_kwargs=once)

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """One line for this optimizer step. Values are numbers, strings or None."""
        if not self._accelerator.is_main_process:
            return
        try:
            _append(self._path, json.dumps({"step": step, **values}) + "\n")
            if self._missing:
                log.warning("metrics.jsonl is written again from step %d", step)
            self._missing = False
        except OSError as error:  # such as a full disk
            if not self._missing:
                log.warning("no line of metrics.jsonl at step %d (%s), nor of the next until it works", step, error)
            self._missing = True
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._guarded(self._accelerator.log, numbers, step=step)

    def close(self) -> None:
        """Flush and end the trackers."""
        for tracker in self._accelerator.trackers if self._accelerator.is_main_process else ():
            self._guarded(tracker.finish)

    def _guarded(self, call: Any, *args: Any, **kwargs: Any) -> None:
        """A tracker that fails (network, disk) must not end a training that is otherwise well."""
        if self._broken:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:
            self._broken = True
            log.warning("tracking.report_to: the tracker failed (%s); metrics.jsonl goes on alone", error)


def flat(cfg: TrainConfig) -> dict[str, str | int | float | bool]:
    """The configuration as one level, {"optimizer.learning_rate": 1e-4, ...}; holds no secret, for none is in it."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for name, item in value.items() for k, v in walk(f"{prefix}{name}.", item).items()}
        return {prefix[:-1]: value if isinstance(value, int | float | str) else str(value)}

    return walk("", dataclasses.asdict(cfg))


def peak_memory_mb(accelerator: Accelerator) -> float:
    """Highest memory use so far in MiB: of the CUDA allocator on a GPU, else of the process."""
    if accelerator.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(accelerator.device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux


def _append(path: Path, line: str) -> None:
    """All of the line or nothing of it. Raises OSError."""
    content = line.encode()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(content) < len(content):  # a disk that is nearly full takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that a crash cut short
        return sys.maxsize


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something that is done every so many steps (None: never), and after the last, is to be done now."""
    return step == last or (every is not None and step % every == 0)


def line_of(trainer: Trainer, meter: Meter, bar: tqdm) -> dict[str, Any]:
    """What metrics.jsonl takes of this step; the most telling numbers go to the progress bar, too."""
    line = {
        "epoch": trainer.state.batches * trainer.global_batch / len(trainer.data),
        "samples_seen": trainer.state.batches * trainer.global_batch,
        **meter.read(),
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "nonfinite_steps": trainer.state.nonfinite_steps,
        "peak_memory_mb": peak_memory_mb(trainer.accelerator),
    }
    bar.set_postfix(loss=f"{line['loss']:.4f}", lr=f"{line['lr']:.1e}", img_s=f"{line['images_per_second']:.1f}")
    return line

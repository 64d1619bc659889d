"""Which checkpoints stay: the newest, milestones, and the best; the newest whole one whatever happens."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from pathlib import Path

from finetune.checkpoint import folders, problem, step_of
from finetune.config import Checkpoint as Kept
from finetune.errors import CheckpointError

log = logging.getLogger(__name__)


def tidy(root: Path, kept: Kept) -> None:
    """Delete the checkpoints under `root` that need not be kept, and what an interrupted save or deletion left.

    Only for the run that holds the lock of its output_dir, and while nothing is being written. Those newer than the
    newest whole one stay for `checkpoint.latest` to judge. A deletion that fails is a warning, and is tried again.
    """
    judged = _judged(root)
    whole = [path for path, is_whole in judged.items() if is_whole]
    stay = {*whole[-kept.checkpoints_total_limit :], *_milestones(whole, kept.milestone_steps)}
    stay |= {path for path in [_best(whole, kept.best_metric)] if path}
    for path in judged:
        if whole and path not in stay and step_of(path) < step_of(whole[-1]):
            try:
                # Renamed first: a deletion that is cut short must not look like a checkpoint.
                path.rename(path.with_name(f"{path.name}.trash"))
            except OSError as error:
                log.warning("%s could not be renamed to be deleted (%s): tried again later", path, error)
    sweep(root)


def best(root: Path, metric: str | None) -> Path | None:
    """The checkpoint whose state.json has the lowest value of `metric` (checkpoint.best_metric); the oldest of equals.

    None if none has a finite one.
    """
    return _best([path for path, is_whole in _judged(root).items() if is_whole], metric)


def sweep(root: Path) -> None:
    """Delete what an interrupted save or deletion left under `root`: nothing of it is a checkpoint."""
    for junk in {*root.glob(".tmp-step-*"), *root.glob("*.trash")}:
        try:
            shutil.rmtree(junk)
        except OSError as error:
            log.warning("%s could not be deleted (%s): tried again later", junk, error)


def _milestones(whole: list[Path], every: int | None) -> list[Path]:
    return [path for path in whole if every is not None and step_of(path) % every == 0]


def _value(path: Path, metric: str) -> float | None:
    try:
        return json.loads((path / "state.json").read_text()).get("best_metric", {}).get(metric)
    except ValueError:  # damaged within its size
        return None


def _best(whole: list[Path], metric: str | None) -> Path | None:
    if metric is None:
        return None
    values = {path: _value(path, metric) for path in whole}
    finite = [path for path, value in values.items() if value is not None and math.isfinite(value)]
    return min(finite, key=lambda path: values[path], default=None)


def _judged(root: Path) -> dict[Path, bool]:
    """Whether each checkpoint is whole, from the oldest; one of another version, or that cannot be read now, is left
    out, and so left alone.

    By manifest and sizes: the newest was read back when it was written, and is again when it is resumed from.
    """
    judged = {}
    for path in folders(root):
        with contextlib.suppress(OSError, CheckpointError):
            judged[path] = problem(path, contents=False) is None
    return judged

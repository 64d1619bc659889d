"""What makes two starts the same run, and which checkpoint a start goes on from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from finetune import checkpoint
from finetune.checkpoint import Checkpoint
from finetune.config import TrainConfig
from finetune.config_tree import SETTINGS
from finetune.errors import CheckpointError
from finetune.provenance import published_config


def identity(cfg: TrainConfig, *, global_batch: int, fingerprint: str) -> dict[str, Any]:
    """What a run must keep from its first to its last step, by the name of the setting; fingerprint: of the data.

    Local paths count by their last part: the same VAE or text encoder may have been moved.
    """
    sections = json.loads(json.dumps(dataclasses.asdict(published_config(cfg))))
    kept = {name: sections[name] for name in ("seed", "space", "conditioning", "model", "objective", "ema")}
    views = ("resolution", "channels", "preparation", "center_crop", "random_flip", "image_interpolation_mode")
    order = ("streaming", "shuffle_buffer_size")
    kept |= {"data": {name: sections["data"][name] for name in (*views, "background", *order)}}
    return _flat("", kept | {"global_batch_size": global_batch, "content of the data": fingerprint})


def checkpoint_to_resume(cfg: TrainConfig, *, now: dict[str, Any], steps: int) -> Checkpoint | None:
    """The checkpoint that cfg.resume_from_checkpoint means; None for a fresh start.

    now: the identity of this start. steps: the length of the run. Raises CheckpointError if the checkpoint is of
    another run, past the end of this one, or older than one that stands in output_dir.
    """
    root = Path(cfg.output_dir) / "checkpoints"
    if cfg.resume_from_checkpoint == "latest":
        found = checkpoint.latest(root)
    else:
        found = checkpoint.load(Path(cfg.resume_from_checkpoint))
    if found is None:
        return None
    saved = _defaults_of(now) | found.state["identity"]
    if changed := [name for name in sorted(now.keys() | saved.keys()) if saved.get(name) != now.get(name)]:
        lines = [f"  {name}: {saved.get(name)} -> {now.get(name)}" for name in changed]
        raise CheckpointError(
            f"{found.path} belongs to another run; it was saved with other settings:\n" + "\n".join(lines) +
            "\nSet them back, or choose another output_dir for the new run."
        )  # fmt: skip
    if found.step < (newest := checkpoint.newest_step(root) or 0):
        raise CheckpointError(
            f"resume_from_checkpoint {found.path}: {root} holds a newer step {newest}. To go on from that one leave "
            "the setting out; to go back, move the newer ones away."
        )
    if found.step > steps:
        raise CheckpointError(
            f"{found.path} is past the end of the run, which has {steps} steps: raise train.max_train_steps (or "
            "num_train_epochs), or choose another output_dir"
        )
    return found


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """{"model": {"dropout": 0}} -> {"model.dropout": 0}: a message can then name what differs, and only that."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _defaults_of(now: dict[str, Any]) -> dict[str, Any]:
    """The settings of `now` that are at a default: a checkpoint from before a setting existed was trained with that."""

    def known(name: str) -> list[Any]:
        return [json.loads(json.dumps(one.default, default=str)) for one in SETTINGS.get(name, ())]

    return {name: value for name, value in now.items() if value in known(name)}

"""What makes two starts the same run: each setting may never change, may if it is asked for, or may at any time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic_core import PydanticUndefined

from finetune.config import TrainConfig
from finetune.config_tree import SETTINGS
from finetune.provenance import published_config

Rule = Literal["fixed", "asked", "free"]

RULES: tuple[tuple[str, Rule], ...] = (
    # What changes which pictures, losses and steps come; the weights still fit, so that it can be meant.
    ("*.condition_dropout", "asked"),
    ("conditioning.dropout_draws", "asked"),
    ("model.dropout", "asked"),
    ("lora.dropout", "asked"),
    ("lora.base_dtype", "free"),  # the same numbers: see lora.hold_base
    ("objective.kind", "fixed"),
    ("objective.prediction_type", "fixed"),
    ("objective.*", "asked"),
    ("optimizer.kind", "fixed"),
    ("optimizer.*", "asked"),
    ("ema.ema_max_decay", "fixed"),
    ("ema.ema_*", "asked"),
    ("ema.update_every", "asked"),
    ("train.max_train_steps", "asked"),
    ("train.max_grad_norm", "asked"),
    ("train.mixed_precision", "asked"),
    ("data.content", "asked"),
    ("data.resolution", "asked"),
    ("data.bucket*", "asked"),
    ("data.center_crop", "asked"),
    ("data.random_flip", "asked"),
    ("data.variants", "asked"),
    ("cache.dtype", "asked"),
    ("data.image_interpolation_mode", "asked"),
    ("data.preparation", "asked"),
    ("data.background", "asked"),
    ("data.alpha_mask", "asked"),
    ("data.unmasked_weight", "asked"),
    ("data.streaming", "asked"),
    ("data.shuffle_buffer_size", "asked"),
    ("captions.*", "asked"),
    # What the saved weights, averages and random draws belong to.
    ("seed", "fixed"),
    ("space.*", "fixed"),
    ("model.change_objective", "free"),
    ("model.*", "fixed"),
    ("lora*", "fixed"),
    ("conditioning.*", "fixed"),
    ("data.channels", "fixed"),
    ("ema.use_ema", "fixed"),
    ("ema.relative_widths", "fixed"),
    ("train.global_batch_size", "fixed"),
    ("train.train_text_encoder", "fixed"),
    # Where the data lie and which rows of them count is seen by their content.
    ("data.data*", "free"),
    ("data.train_data_dir", "free"),
    ("data.revision", "free"),
    ("data.split", "free"),
    ("data.*_column", "free"),
    ("data.instance_prompt", "free"),
    ("prior.weight", "asked"),
    ("prior.*", "free"),
    ("data.label_from_filename", "free"),
    ("data.max_*", "free"),
    ("data.min_side", "free"),
    ("data.on_error", "free"),
    ("ema.snapshot_every", "free"),
    ("cache.*", "free"),
    # Another split of the same global batch, or other kernels for the same numbers.
    ("train.num_train_epochs", "free"),
    ("train.train_batch_size", "free"),
    ("train.gradient_compression", "asked"),
    ("train.gradient_*", "free"),
    ("train.max_nonfinite_steps", "free"),
    ("train.timeout_minutes", "free"),
    ("train.fused_backward", "free"),
    ("train.channels_last", "free"),
    ("train.compile", "free"),
    ("train.cuda_graphs", "free"),
    ("train.cudnn_benchmark", "free"),
    ("train.sdpa_backend", "free"),
    ("train.allow_tf32", "free"),
    ("train.deterministic", "free"),
    ("checkpoint.*", "free"),
    ("tracking.*", "free"),
    ("validation.held_out", "fixed"),
    ("validation.max_images", "asked"),
    ("validation.levels", "asked"),
    ("validation.*", "free"),
    ("sample.*", "free"),
    ("export.*", "free"),
    ("hub.*", "free"),
    ("output_dir", "free"),
    ("resume_from_checkpoint", "free"),
    ("allow_change", "free"),
)
"""The first pattern that fits the name of a setting holds."""

UNTOLD = ("output_dir", "resume_from_checkpoint", "allow_change", "hub.*")
"""Free settings of which a resume does not say that they changed: they are of this start, not of the run."""


def rule_of(name: str) -> Rule:
    """Whether the setting `name` may change at a resume: never (fixed), if asked for by allow_change, or freely."""
    return next(rule for pattern, rule in RULES if fnmatchcase(name, pattern))


def run_settings(
    cfg: TrainConfig, *, global_batch: int, steps: int, mixed_precision: str, fingerprint: str
) -> dict[str, Any]:
    """All settings of a run by name, as its checkpoints keep them: local paths by their last part, for what is there
    may have been moved; numbers that the launcher decides, worked out; the content of the data by its fingerprint.

    steps: the length of the run, which counts only where the learning rate follows it.
    """
    values = _flat("", json.loads(json.dumps(dataclasses.asdict(published_config(cfg)))))
    by_length = not cfg.optimizer.lr_scheduler.startswith("constant")
    return values | {
        "train.global_batch_size": global_batch,
        "train.max_train_steps": steps if by_length else None,
        "train.mixed_precision": mixed_precision,
        "data.content": fingerprint,
    }


@dataclass(frozen=True)
class Changes:
    """The names of the settings that differ between a checkpoint and this start, by what is to be done about it."""

    fixed: list[str]
    asked: list[str]
    """Those that allow_change does not name."""
    allowed: list[str]
    """Those that it does."""
    free: list[str]


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], *, allow: Collection[str]) -> Changes:
    """Compare two `run_settings`. allow: names of settings, or of whole sections of them."""
    found = Changes([], [], [], [])
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) == now.get(name) or (name not in saved and now[name] in _defaults(name)):
            continue
        rule = rule_of(name)
        if rule == "asked" and any(name == one or name.startswith(f"{one}.") for one in allow):
            found.allowed.append(name)
        elif rule != "free" or not any(fnmatchcase(name, pattern) for pattern in UNTOLD):
            getattr(found, rule).append(name)
    return found


def _defaults(name: str) -> list[Any]:
    """What a setting is if nothing is said: so was a run that was saved before there was the setting."""
    found = [setting.default for setting in SETTINGS.get(name, ()) if setting.default is not PydanticUndefined]
    return json.loads(json.dumps(found))


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """{"model": {"dropout": 0}} -> {"model.dropout": 0}: a message can then name what differs, and only that."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat

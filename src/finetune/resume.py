"""Which checkpoint a start goes on from, and how exactly: bit for bit, up to rounding, or as a changed run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import checkpoint
from finetune.checkpoint import Checkpoint
from finetune.config import TrainConfig
from finetune.config_tree import SETTINGS
from finetune.errors import CheckpointError, ConfigError
from finetune.identity import Changes, changes, rule_of


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a checkpoint keeps of the run that wrote it, to be compared with the one that goes on; of JSON's types."""

    settings: Mapping[str, Any]
    """See `identity.run_settings`."""
    machine: Mapping[str, Any]
    """What rounding depends on: device, threads, versions, kernels, how the global batch is split."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that the run goes on from."""

    found: Checkpoint
    changed: list[str]
    """What differs from the run that saved it, one line each, all of it allowed."""
    promise: str
    """How exactly the run goes on, in words, and why not better."""


def check_allowed(allow: Collection[str]) -> None:
    """Raise ConfigError unless each name of the setting allow_change is of something that may be allowed."""
    known = [*SETTINGS, "data.content"]
    for one in allow:
        rules = {rule_of(name) for name in known if name == one or name.startswith(f"{one}.")}
        if not rules:
            raise ConfigError(
                f"allow_change: there is no setting {one!r}; name one such as optimizer.learning_rate, a whole section "
                "such as optimizer, or data.content for the images, captions and labels themselves"
            )
        if rules == {"fixed"}:
            raise ConfigError(f"allow_change: {one} cannot change within a run; choose another output_dir")


def find_checkpoint(cfg: TrainConfig, now: RunFacts, *, steps: int) -> Resumed | None:
    """The checkpoint that cfg.resume_from_checkpoint means; None for a fresh start. steps: the length of the run.

    Raises CheckpointError if it is of another run, changed in what cfg.allow_change does not name, past the end of this
    run, or older than one that stands in output_dir.
    """
    check_allowed(cfg.allow_change)
    root = Path(cfg.output_dir) / "checkpoints"
    if cfg.resume_from_checkpoint == "latest":
        found = checkpoint.latest(root)
    else:
        found = checkpoint.load(Path(cfg.resume_from_checkpoint))
    if found is None:
        return None
    then = RunFacts(settings=found.state["settings"], machine=found.state["machine"])
    differ = changes(then.settings, now.settings, allow=cfg.allow_change)
    if differ.fixed or differ.asked:
        raise CheckpointError(_refusal(found.path, differ, then, now))
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
    changed = _lines([*differ.allowed, *differ.free], then, now)
    return Resumed(found, changed, _promise(differ, then, now))


def _refusal(path: Path, differ: Changes, then: RunFacts, now: RunFacts) -> str:
    if differ.fixed:
        return "\n".join([
            f"{path} belongs to another run; it was saved with other settings, which cannot change within a run:",
            *_lines(differ.fixed, then, now),
            "Set them back, or choose another output_dir for the new run.",
        ])  # fmt: skip
    return "\n".join([
        f"{path} was saved with other settings:",
        *_lines(differ.asked, then, now),
        f"Set them back; or go on with the new ones by --allow_change {' '.join(differ.asked)}; or choose another "
        "output_dir for a new run.",
    ])  # fmt: skip


def _lines(names: list[str], then: RunFacts, now: RunFacts) -> list[str]:
    return [f"  {name}: {then.settings.get(name)} -> {now.settings.get(name)}" for name in names]


def _promise(differ: Changes, then: RunFacts, now: RunFacts) -> str:
    if differ.allowed:
        return f"as a changed run ({', '.join(differ.allowed)})"
    reasons = list(_other_rounding(then.machine, now.machine))
    if not reasons:
        return "bit for bit"
    return f"with the same samples, noise and learning rates, rounded differently ({'; '.join(reasons)})"


def _other_rounding(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name} {then.get(name)} -> {now.get(name)}"
    if now["device"] != "cpu" and not now["deterministic_algorithms"]:
        yield "kernels of the GPU may add in any order without train.deterministic"

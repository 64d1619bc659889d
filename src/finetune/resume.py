"""Which checkpoint a start goes on from, and how exactly: bit for bit, up to rounding, or as a changed run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object

from finetune import checkpoint
from finetune.checkpoint import Checkpoint
from finetune.config import TrainConfig
from finetune.config_train import FORMER_COMPILE
from finetune.config_tree import SETTINGS, nearest
from finetune.data_changes import changes as changes_of_rows
from finetune.errors import CheckpointError, ConfigError, DataError
from finetune.identity import Changes, changes, rule_of, run_settings
from finetune.provenance import run_facts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.data import TrainData
    from finetune.trainer import Trainer


SPLIT = ("num_processes", "accumulation", "micro_batch")
"""How the global batch is split, by the names of `RunFacts.machine`."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a checkpoint keeps of the run that wrote it, to be compared with the one that goes on; of JSON's types."""

    settings: Mapping[str, Any]
    """See `identity.run_settings`."""
    machine: Mapping[str, Any]
    """What rounding depends on: device, threads, versions, kernels, how the global batch is split; and whether the UNet
    has dropout, of which torch draws one mask per micro-batch."""


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
            meant = f"did you mean {found}? Otherwise " if (found := nearest(one)) else ""
            raise ConfigError(
                f"allow_change: there is no setting {one!r}; {meant}name one such as optimizer.learning_rate, a whole "
                "section such as optimizer, or data.content for the images, captions and labels themselves"
            )
        if rules == {"fixed"}:
            raise ConfigError(f"allow_change: {one} cannot change within a run; choose another output_dir")


def find_checkpoint(cfg: TrainConfig) -> Checkpoint | None:
    """The whole checkpoint that cfg.resume_from_checkpoint means; None for a fresh start. Raises CheckpointError."""
    check_allowed(cfg.allow_change)
    if cfg.resume_from_checkpoint == "latest":
        return checkpoint.latest(Path(cfg.output_dir) / "checkpoints")
    return checkpoint.load(Path(cfg.resume_from_checkpoint))


def as_the_run_began(data: TrainData, found: Checkpoint | None, accelerator: Accelerator) -> TrainData:
    """`data` in the order in which the run began, also where rows turned unusable since (data.on_error skip).

    Without a checkpoint the run begins with what the main process found: a file may have turned bad between the checks
    of two processes. Raises DataError if the processes see different data.
    """
    if found is not None:
        began = _kept(found)
    else:
        [began] = broadcast_object_list([data.kept])
    if len(data.digests) and data.rules.on_error == "skip" and _only_unusable(began, data.kept):
        data = data.with_order_of(began)
    if len(set(gather_object([data.content]))) > 1:
        raise DataError(
            "the processes see different data: give them the same files, or name a commit as data.revision; see that "
            "nothing changes the data while the run starts"
        )
    return data


def _kept(found: Checkpoint) -> dict[str, np.ndarray]:
    """`TrainData.kept` of the run that wrote a checkpoint."""
    return {name: values.numpy() for name, values in found.tensors("data").items()}


def _all(kept: Mapping[str, np.ndarray]) -> np.ndarray:
    """The digests of all rows, whichever side they are on."""
    return kept["digests"] + kept.get("held_out", 0)


def _only_unusable(began: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray]) -> bool:
    return began.keys() == now.keys() and changes_of_rows(_all(began), _all(now)).only_unusable


def run_facts_of(trainer: Trainer) -> RunFacts:
    """What a checkpoint of `trainer` keeps of its run."""
    cfg, facts = trainer.cfg, run_facts(trainer.cfg)
    split = {"accumulation": trainer.accumulation, "micro_batch": trainer.micro_batch}
    kernels = {name: getattr(cfg.train, name) for name in ("channels_last", "compile")}
    chosen = cfg.train.gradient_checkpointing
    kernels |= {"gradient_checkpointing": chosen if isinstance(chosen, bool) else list(chosen)}
    # Those that came later only where they are chosen: checkpoints of before do not hold them.
    later = {name: getattr(cfg.train, name) for name in ("cuda_graphs", "cudnn_benchmark", "sdpa_backend")}
    kernels |= {name: value for name, value in later.items() if value not in (False, "auto")}
    return RunFacts(
        settings=run_settings(
            cfg,
            global_batch=trainer.global_batch,
            steps=trainer.steps,
            mixed_precision=trainer.accelerator.mixed_precision,
            fingerprint=trainer.data.content,
        ),
        machine=facts["versions"] | facts["environment"] | split | kernels | {"dropout": trainer.modules.has_dropout},
    )


def resume(trainer: Trainer, found: Checkpoint) -> Resumed:
    """Take over a checkpoint, if it is of this run.

    Raises ConfigError if it is of another run, changed in what cfg.allow_change does not name, or past the end of this
    run; CheckpointError if it is older than one that stands in output_dir, or of another network.
    """
    cfg, now = trainer.cfg, trainer.facts
    then = RunFacts(
        settings=_as_called_today(found.state["settings"], "train.compile"),
        machine=_as_called_today(found.state["machine"], "compile"),
    )
    differ = changes(then.settings, now.settings, allow=cfg.allow_change)
    if differ.fixed or differ.asked:
        raise ConfigError(_refusal(found.path, differ, then, now) + _rows_in_words(found, trainer.data, differ))
    root = Path(cfg.output_dir) / "checkpoints"
    if found.step < (newest := checkpoint.newest_step(root) or 0):
        raise CheckpointError(
            f"resume_from_checkpoint {found.path}: {root} holds a newer step {newest}. To go on from that one leave "
            "the setting out; to go back, move the newer ones away."
        )
    if found.step > trainer.steps:
        raise ConfigError(
            f"{found.path} is past the end of the run, which has {trainer.steps} steps: raise train.max_train_steps "
            "(or num_train_epochs), or choose another output_dir"
        )
    trainer.state.load(found)
    if trainer.validation:
        trainer.validation.load(found)
    if cfg.checkpoint.best_metric in found.state.get("best_metric", ()):
        trainer.saver.note(found.state["best_metric"])
    return Resumed(found, _lines([*differ.allowed, *differ.free], then, now), _promise(differ, then, now))


def _as_called_today(values: Mapping[str, Any], compile_name: str) -> Mapping[str, Any]:
    """Facts that a checkpoint kept, where train.compile was once true or false."""
    was = values.get(compile_name)
    return {**values, compile_name: FORMER_COMPILE[str(was).lower()]} if isinstance(was, bool) else values


def _refusal(path: Path, differ: Changes, then: RunFacts, now: RunFacts) -> str:
    if differ.fixed:
        also = ["besides, what is allowed only by allow_change:"] if differ.asked else []
        return "\n".join([
            f"{path} belongs to another run; it was saved with other settings, which cannot change within a run:",
            *_lines(differ.fixed, then, now),
            *also,
            *_lines(differ.asked, then, now),
            "Set them back, or choose another output_dir for the new run.",
        ])  # fmt: skip
    return "\n".join([
        f"{path} was saved with other settings:",
        *_lines(differ.asked, then, now),
        f"Set them back; or go on with the new ones by --allow_change {' '.join(differ.asked)}; or choose another "
        "output_dir for a new run.",
    ])  # fmt: skip


def _rows_in_words(found: Checkpoint, data: TrainData, differ: Changes) -> str:
    """Which rows are other ones, where that is not because other data or other rows of them were asked for."""
    names = [*differ.fixed, *differ.asked, *differ.allowed, *differ.free]
    rows = changes_of_rows(_all(_kept(found)), _all(data.kept))
    if not rows or [name for name in names if name.startswith("data.")] != ["data.content"]:
        return ""
    return f"\nThe data: {rows.text(data.name)}."


def _lines(names: list[str], then: RunFacts, now: RunFacts) -> list[str]:
    return [f"  {name}: {then.settings.get(name)} -> {now.settings.get(name)}" for name in names]


def _promise(differ: Changes, then: RunFacts, now: RunFacts) -> str:
    if differ.allowed:
        return f"as a changed run ({', '.join(differ.allowed)})"
    reasons = list(_other_rounding(then.machine, now.machine))
    if not reasons:
        return "bit for bit"
    if now.machine["dropout"] and any(then.machine.get(name) != now.machine.get(name) for name in SPLIT):
        return f"with the same samples, noise and learning rates, but other masks of dropout ({'; '.join(reasons)})"
    return f"with the same samples, noise and learning rates, rounded differently ({'; '.join(reasons)})"


def _other_rounding(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name} {then.get(name)} -> {now.get(name)}"
    if now["device"] != "cpu" and not now["deterministic_algorithms"]:
        yield "kernels of the GPU may add in any order without train.deterministic"

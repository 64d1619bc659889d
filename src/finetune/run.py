"""A whole run, from the configuration to the published model; what train_unet.py and notebooks call.

Imports no torch until it trains.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import hub, lock
from finetune.config import TrainConfig
from finetune.config_io import is_main_process
from finetune.config_launch import launch_settings
from finetune.foundation import resolve
from finetune.plan import plan_text
from finetune.pretrained import pin
from finetune.provenance import recorded_commits, refuse_secrets
from finetune.signals import SIGNALS, Interrupted, stopped
from finetune.single_file import is_single_file

if TYPE_CHECKING:
    from datasets import Dataset

    from finetune.objective import Objective
    from finetune.trainer import Trainer

log = logging.getLogger(__name__)


def train(
    cfg: TrainConfig,
    *,
    dataset: Dataset | None = None,
    objective: Objective | None = None,
    trust: Collection[str] = (),
) -> Path:
    """Train what `cfg` describes, or go on where its output_dir stopped; export it; push it if asked to.

    dataset: an in-memory data set used instead of the one cfg.data names. objective: used instead of cfg.objective's.
    trust: the packages whose code a `kind: custom` of cfg may name. Returns the folder of the exported pipeline.
    Runs in every process of `accelerate launch` and of `notebook_launcher(train, (cfg,))`.
    Raises the errors of finetune.errors; the weights are on the disk before the Hub is asked to take them.
    """
    cfg = launch_settings(cfg, os.environ)
    refuse_secrets(cfg)
    if cfg.hub.push and is_main_process():
        with _conversation("nothing was lost; the same command starts again."):
            hub.probe(repository(cfg), private=cfg.hub.private)

    folder = Path(cfg.output_dir) / "pipeline"
    with contextlib.ExitStack() as until_done:
        # Held here and not by the trainer, which a notebook's traceback keeps alive: the same cell must be able to
        # resume. Before torch is imported: a second run is refused at once.
        if is_main_process():
            until_done.enter_context(lock.hold(Path(cfg.output_dir)))
        pin(recorded_commits(Path(cfg.output_dir)))
        if cfg.model.kind == "pretrained" and not is_single_file(cfg.model):  # which one process is to unpack
            cfg = resolve(cfg)

        until_done.enter_context(heavy_imports())  # only now, so that what cannot work is said at once
        from finetune.export import without_loading_bars
        from finetune.trainer import Trainer

        until_done.enter_context(without_loading_bars())
        trainer = Trainer(cfg, dataset=dataset, objective=objective, trust=trust)
        trainer.accelerator.print(plan_text(trainer))
        trainer.fit()
        trainer.unshard()
        trainer.accelerator.end_training()  # what follows is the main process's alone: nobody must wait for it
        if trainer.accelerator.is_main_process:
            with trainer.averaged_weights():
                export_run(trainer)
            log.info("samples: %s", trainer.sample_path)
            log.info("pipeline: %s", folder)
    if trainer.accelerator.is_main_process and cfg.hub.push:
        push(cfg)
    return folder


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import what trains. Until the end, the garbage collector passes over the million objects that come with it.

    They stay as long as the process; going through them again and again while they come takes a quarter of the time
    that torch and diffusers need to be imported.
    """
    if "finetune.trainer" in sys.modules or not gc.isenabled():
        yield
        return
    gc.collect()  # what is garbage already would stay, too
    gc.disable()
    try:
        import finetune.trainer  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def export_run(trainer: Trainer) -> Path:
    """Write output_dir/pipeline from the trainer's present weights: the pipeline, or the LoRA if there is one."""
    from finetune.export import export
    from finetune.lora_export import export_lora, tags_of
    from finetune.lora_formats import adapter_of

    output_dir, kohya = trainer.output_dir, trainer.cfg.export.kohya
    record = {
        "output_dir": output_dir,
        "cfg": trainer.cfg,
        "run": json.loads((output_dir / "run.json").read_text()),
        "samples": trainer.sample_path,
        "metrics": output_dir / "metrics.jsonl",
    }
    if adapter_of(trainer.modules.unet) is None:
        return export(trainer.pipeline(), **record)
    return export_lora(trainer.pipeline(), kohya=kohya, tags=tags_of(trainer.data) if kohya else None, **record)


def push(cfg: TrainConfig) -> str:
    """Push output_dir/pipeline to the Hub; returns the address of the commit. Raises PushPending."""
    with _conversation(f"the model is trained and exported; `finetune push {cfg.output_dir}` goes on."):
        url = hub.push(
            Path(cfg.output_dir) / "pipeline",
            repository(cfg),
            private=cfg.hub.private,
            budget=60 * cfg.hub.push_budget_minutes,
        )
    log.info("pushed: %s", url)
    return url


@contextlib.contextmanager
def _conversation(words: str) -> Iterator[None]:
    """A signal inside ends the run by unwinding, as the uploading process must not be left behind."""
    try:
        with SIGNALS.interrupting():
            yield
    except Interrupted:
        raise stopped(SIGNALS.received, words) from None


def repository(cfg: TrainConfig) -> str:
    """The Hub repository of the run: hub.hub_model_id, else the name of output_dir."""
    return cfg.hub.hub_model_id or Path(cfg.output_dir).resolve().name

"""A whole run, from the configuration to the published model; what train_unet.py and notebooks call."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import hub
from finetune.config import TrainConfig
from finetune.config_io import is_main_process
from finetune.config_launch import launch_settings
from finetune.export import export
from finetune.plan import plan_text
from finetune.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


def train(cfg: TrainConfig, *, dataset: Dataset | None = None) -> Path:
    """Train what `cfg` describes, or go on where its output_dir stopped; export it; push it if asked to.

    dataset: an in-memory data set used instead of the one cfg.data names. Returns the folder of the exported pipeline.
    Runs in every process of `accelerate launch` and of `notebook_launcher(train, (cfg,))`.
    Raises the errors of finetune.errors; the weights are on the disk before the Hub is asked to take them.
    """
    cfg = launch_settings(cfg, os.environ)
    if cfg.hub.push and is_main_process():
        hub.probe(repository(cfg), private=cfg.hub.private)
    trainer = Trainer(cfg, dataset=dataset)
    trainer.accelerator.print(plan_text(trainer))
    trainer.fit()
    trainer.accelerator.end_training()  # what follows is the main process's alone: nobody must wait for it
    folder = Path(cfg.output_dir) / "pipeline"
    if trainer.accelerator.is_main_process:
        with trainer.averaged_weights():
            export_run(trainer)
        log.info("samples: %s", trainer.sample_path)
        log.info("pipeline: %s", folder)
        if cfg.hub.push:
            push(cfg)
    return folder


def export_run(trainer: Trainer) -> Path:
    """Write output_dir/pipeline from the trainer's present weights."""
    output_dir = trainer.output_dir
    return export(
        trainer.pipeline(),
        output_dir=output_dir,
        cfg=trainer.cfg,
        run=json.loads((output_dir / "run.json").read_text()),
        samples=trainer.sample_path,
        metrics=output_dir / "metrics.jsonl",
    )


def push(cfg: TrainConfig) -> str:
    """Push output_dir/pipeline to the Hub; returns the address of the commit. Raises PushPending."""
    url = hub.push(
        Path(cfg.output_dir) / "pipeline",
        repository(cfg),
        private=cfg.hub.private,
        budget=60 * cfg.hub.push_budget_minutes,
    )
    log.info("pushed: %s", url)
    return url


def repository(cfg: TrainConfig) -> str:
    """The Hub repository of the run: hub.hub_model_id, else the name of output_dir."""
    return cfg.hub.hub_model_id or Path(cfg.output_dir).resolve().name

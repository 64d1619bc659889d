"""A run's base model and its LoRA, put together again: what `finetune sample` draws from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from finetune.conditioning import build_conditioner
from finetune.config import TrainConfig
from finetune.config_cache import Cache
from finetune.config_export import LORA_FILE
from finetune.config_io import load_text
from finetune.errors import ConfigError
from finetune.lora_formats import PARTS, read_adapters
from finetune.lora_loading import inject
from finetune.models import build_unet
from finetune.objective import build_objective, without_own_code
from finetune.pipelines import build_pipeline
from finetune.pretrained import commits, pin
from finetune.provenance import recorded_commits
from finetune.space import build_space


def base_pipeline(cfg: TrainConfig, run: Mapping[str, Any]) -> DiffusionPipeline:
    """The pipeline of `cfg` before any training, on the CPU in float32: no LoRA is in it.

    run: the content of run.json, for the names of the classes. Raises ConfigError if a part cannot be loaded.
    """
    cfg = replace(cfg, cache=Cache())  # with one, the frozen parts would have no weights until they were needed
    space = build_space(cfg)
    conditioner = build_conditioner(cfg, list(run.get("data", {}).get("classes", ())) or None, space=space)
    unet = build_unet(cfg, space, conditioner, seed=cfg.seed).eval().requires_grad_(False)
    objective = build_objective(without_own_code(cfg.objective), clip_sample=cfg.space.kind == "pixel")
    return build_pipeline(unet, space, conditioner, objective.scheduler, cfg)


def adaptable(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The modules of a pipeline that a LoRA may be for, by the names that files give them."""
    parts = {part: pipeline.components.get(part) for part in PARTS}
    return {part: module for part, module in parts.items() if module is not None}


def lora_pipeline(folder: Path) -> DiffusionPipeline:
    """The pipeline of an exported LoRA (a folder with pytorch_lora_weights.safetensors): its base with the LoRA in it.

    The base is the one that the run's own config.yaml names, if `folder` still lies in the run, else the one of the
    config.yaml in it, in which local paths are shortened. Raises ConfigError if the base is not found.
    """
    texts = [place / "config.yaml" for place in (folder.resolve().parent, folder)]
    config = next((path for path in texts if path.is_file()), None)
    if config is None:
        raise ConfigError(
            f"{folder} does not say what its LoRA is for: it has no config.yaml. Use `finetune merge`, which is told "
            "the base model"
        )
    cfg = load_text(config.read_text("utf-8"), name=str(config))
    run = json.loads((config.parent / "run.json").read_text("utf-8"))
    pin(commits() | recorded_commits(config.parent))
    pipeline = base_pipeline(cfg, run)
    modules = adaptable(pipeline)
    for part, adapter in read_adapters(folder / LORA_FILE, modules).items():
        inject(modules[part], adapter)
    return pipeline

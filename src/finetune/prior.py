"""Drawing the class images of prior preservation (DreamBooth) before the training."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from finetune.config import TrainConfig
from finetune.config_cache import Cache
from finetune.errors import ConfigError
from finetune.folder import scan
from finetune.modules import build_modules
from finetune.pipelines import build_pipeline
from finetune.sample import generate

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)
NAME = re.compile(r"class-(\d{5,})\.png")


def make_class_images(cfg: TrainConfig, accelerator: Accelerator, *, trust: Collection[str] = ()) -> None:
    """Draw the class images that prior.class_data_dir lacks, over all processes; nothing without prior.

    Image i is drawn with seed i by the model as it is before the training, and appears as class-<i>.png when all of it
    is on the disk: a start that was stopped goes on with what is there. Raises ConfigError for images that were drawn
    here from another prompt.
    """
    if cfg.prior is None:
        return
    folder = Path(cfg.prior.class_data_dir)
    missing = missing_images(folder, cfg.prior.num_class_images, cfg.prior.class_prompt)
    accelerator.wait_for_everyone()  # all have counted before one draws
    if missing:
        mine = np.array_split(missing, accelerator.num_processes)[accelerator.process_index].tolist()
        if accelerator.is_main_process:
            log.info("prior.class_data_dir %s lacks %d class images: they are drawn", folder, len(missing))
        if mine:
            _draw(cfg, accelerator, folder, mine, trust)
            clear_device_cache(garbage_collection=True)
        accelerator.wait_for_everyone()


def missing_images(folder: Path, wanted: int, prompt: str) -> list[int]:
    """The numbers of the images to draw, so that the folder holds `wanted`; those of another origin count as they are.

    Raises ConfigError if one of ours was drawn from another prompt.
    """
    found = scan(folder).images if folder.is_dir() else []
    ours = {int(match[1]): name for name in found if (match := NAME.fullmatch(name))}
    for name in ours.values():
        with Image.open(folder / name) as image:
            of = image.info.get("prompt")
        if of != prompt:
            raise ConfigError(
                f"prior.class_data_dir {folder} holds {name}, drawn from the prompt {of!r}, but prior.class_prompt is "
                f"{prompt!r}: set it back, or choose another folder"
            )
    return [number for number in range(wanted - (len(found) - len(ours))) if number not in ours]


@torch.no_grad()
def _draw(
    cfg: TrainConfig, accelerator: Accelerator, folder: Path, numbers: Sequence[int], trust: Collection[str]
) -> None:
    train = replace(cfg.train, compile="off", cuda_graphs=False)
    cfg = replace(cfg, train=train, sample=replace(cfg.sample, autoguidance=None), cache=Cache())
    modules = build_modules(cfg, SimpleNamespace(class_names=None), accelerator.device, global_batch=1, trust=trust)
    parts = (modules.unet.eval(), modules.space, modules.conditioner, modules.objective.scheduler)
    pipeline = build_pipeline(*parts, cfg)
    pipeline.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    about = PngInfo()
    about.add_itxt("prompt", cfg.prior.class_prompt)
    hidden = not accelerator.is_local_main_process
    with accelerator.autocast(), tqdm(total=len(numbers), desc="class images", unit="image", disable=hidden) as bar:
        for run in _runs(numbers, cfg.prior.sample_batch_size):
            drawn = generate(
                pipeline,
                num_images=len(run),
                seed=run[0],
                prompts=[cfg.prior.class_prompt],
                num_inference_steps=cfg.prior.num_inference_steps,
                guidance_scale=cfg.prior.guidance_scale,
                batch_size=len(run),
            )
            for number, image in zip(run, drawn, strict=True):
                aside = folder / f".class-{number:05d}.{os.getpid()}.tmp"
                image.save(aside, format="PNG", pnginfo=about)
                aside.replace(folder / f"class-{number:05d}.png")
            bar.update(len(run))


def _runs(numbers: Sequence[int], most: int) -> list[list[int]]:
    """The numbers in their order, cut where one does not follow the one before, and into pieces of at most `most`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1 and len(runs[-1]) < most:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs

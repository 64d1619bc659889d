"""The weaker network that autoguidance extrapolates from (Karras et al. 2024): found, loaded and compared."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, SchedulerMixin, UNet2DConditionModel, UNet2DModel

from finetune import checkpoint
from finetune.config_io import load_text
from finetune.ema import by_module
from finetune.errors import CheckpointError, ConfigError
from finetune.lora import load_trained_state
from finetune.models import UNet
from finetune.objective import build_objective, without_own_code
from finetune.pretrained import commit_of, load_model_config, load_pretrained, resolve_source

log = logging.getLogger(__name__)

SHARED = ("in_channels", "sample_size", "class_embed_type", "num_class_embeds", "cross_attention_dim",
          "projection_class_embeddings_input_dim", "addition_embed_type")  # fmt: skip
"""What both UNets must have in common to be asked the same."""

NOISE = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr",
         "sigma_data")  # fmt: skip
"""What their schedulers must have in common to mean the same by a timestep and by the output."""


def load_guide(name: str, unet: UNet, scheduler: SchedulerMixin) -> UNet:
    """The UNet that `name` stands for, frozen, in evaluation mode, on the device of `unet`.

    name: a run (its output_dir), a pipeline or UNet folder, the Hub id of a pipeline, or a checkpoint folder step-...
    of a run with the same UNet: its slowest average if it keeps any. scheduler: of `unet`, in training or sampling.
    Raises ConfigError if there is none, or if it does not take the input and condition of `unet`, or was trained with
    another noise process or prediction. Of a lone UNet folder that is not known, and said.
    """
    path = Path(name).expanduser()
    if (path / "manifest.json").is_file():
        guide = _of_checkpoint(path, unet)
    else:
        source = resolve_source(name, setting="autoguidance")
        folders = [path / "pipeline" / "unet", path / "unet", path]
        found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
        if path.is_dir() and found is None:
            raise ConfigError(
                f"autoguidance: {name} holds no UNet: give the output_dir of a finished run, the folder of a pipeline "
                "or UNet, or a checkpoint .../checkpoints/step-00001000"
            )
        place = {"setting": "autoguidance", "revision": None, "subfolder": None if found else "unet"}
        source = str(found or source)
        kinds = {cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel)}
        kind = load_model_config(UNet2DModel, source, **place).get("_class_name")
        if kind not in kinds:
            raise ConfigError(f"autoguidance: {name} holds a {kind}: it must be one of {', '.join(kinds)}")
        guide = load_pretrained(kinds[kind], source, **place)
    _check_same_question(guide, unet, name)
    _check_same_noise(_scheduler_config(name), scheduler, name)
    return guide.requires_grad_(False).eval().to(unet.device)


def _of_checkpoint(path: Path, unet: UNet) -> UNet:
    try:
        found = checkpoint.load(path)
    except CheckpointError as error:
        raise ConfigError(f"autoguidance: {str(error).removeprefix('resume_from_checkpoint: ')}") from error
    weights = found.tensors("model")
    averages = [part.stem for part in path.glob("ema_*.safetensors")]
    if averages:
        weights |= by_module(found.tensors(max(averages, key=lambda part: float(part.rpartition("_")[2]))))["model"]
    guide = copy.deepcopy(unet)
    try:
        load_trained_state(guide, weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"autoguidance: {path} is a checkpoint of another UNet: {reason}") from error
    return guide


def _check_same_question(guide: UNet, unet: UNet, name: str) -> None:
    if type(guide) is not type(unet):
        raise ConfigError(f"autoguidance: {name} is a {type(guide).__name__}, the model a {type(unet).__name__}")
    for key in SHARED:
        if guide.config.get(key) != unet.config.get(key):
            raise ConfigError(
                f"autoguidance: {name} has {key} {guide.config.get(key)}, the model {unet.config.get(key)}: both must "
                "take the same input and condition"
            )


def _scheduler_config(name: str) -> dict[str, Any] | None:
    """The configuration of the scheduler that the guide was trained or is sampled with; None for a lone UNet."""
    path = Path(name).expanduser()
    if (path / "manifest.json").is_file():
        config = path.resolve().parents[1] / "config.yaml"
        if not config.is_file():
            return None
        objective = load_text(config.read_text("utf-8"), name=str(config)).objective
        if objective.kind == "custom":
            return None
        trained = build_objective(without_own_code(objective), clip_sample=False).scheduler
        return {"_class_name": type(trained).__name__, **trained.config}
    if path.is_dir():
        folders = [path / "pipeline" / "scheduler", path / "scheduler"]
        found = next((folder for folder in folders if (folder / "scheduler_config.json").is_file()), None)
        return None if found is None else DDPMScheduler.load_config(found)
    return DDPMScheduler.load_config(name, subfolder="scheduler", revision=commit_of(name, setting="autoguidance"))


def _check_same_noise(theirs: dict[str, Any] | None, scheduler: SchedulerMixin, name: str) -> None:
    if theirs is None:
        log.warning("autoguidance: what %s was trained with is not known; it must be the objective of the model", name)
        return
    families = [_family(str(each)) for each in (theirs["_class_name"], type(scheduler).__name__)]
    if families[0] != families[1]:
        raise ConfigError(
            f"autoguidance: {name} removes the noise of {families[0]}, the model that of {families[1]}: both must be "
            "trained with the same objective"
        )
    ours = scheduler.config
    for key in NOISE:
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise ConfigError(
                f"autoguidance: {name} has {key} {theirs[key]}, the model {ours[key]}: both must be trained with the "
                "same noise process and prediction"
            )


def _family(scheduler: str) -> str:
    """The noise process of a scheduler class."""
    return next((family for family in ("EDM", "FlowMatch") if scheduler.startswith(family)), "DDPM")

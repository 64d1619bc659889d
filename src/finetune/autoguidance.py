"""The weaker network that autoguidance extrapolates from (Karras et al. 2024): found, loaded and compared."""

from __future__ import annotations

import copy
from pathlib import Path

from diffusers import UNet2DConditionModel, UNet2DModel

from finetune import checkpoint
from finetune.errors import CheckpointError, ConfigError
from finetune.models import UNet
from finetune.pretrained import load_model_config, load_pretrained, resolve_source

SHARED = ("in_channels", "sample_size", "class_embed_type", "num_class_embeds", "cross_attention_dim",
          "projection_class_embeddings_input_dim", "addition_embed_type")  # fmt: skip
"""What both UNets must have in common to be asked the same."""


def load_guide(name: str, unet: UNet) -> UNet:
    """The UNet that `name` stands for, frozen, in evaluation mode, on the device of `unet`.

    name: a run (its output_dir), a pipeline or UNet folder, the Hub id of a pipeline, or a checkpoint folder step-...
    of a run with the same UNet: its slowest average if it keeps any. Raises ConfigError if there is none, or if it does
    not take the input and condition of `unet`.
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
    return guide.requires_grad_(False).eval().to(unet.device)


def _of_checkpoint(path: Path, unet: UNet) -> UNet:
    try:
        found = checkpoint.load(path)
    except CheckpointError as error:
        raise ConfigError(f"autoguidance: {str(error).removeprefix('resume_from_checkpoint: ')}") from error
    weights = found.tensors("model")
    averages = [part.stem for part in path.glob("ema_*.safetensors")]
    if averages:
        weights |= found.tensors(max(averages, key=lambda part: float(part.rpartition("_")[2])))
    guide = copy.deepcopy(unet)
    try:
        guide.load_state_dict(weights)
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

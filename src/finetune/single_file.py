"""A pipeline that came as one .safetensors file: unpacked once into a folder, from which everything is then loaded."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError
from finetune.pretrained import commit_of, resolve_source

if TYPE_CHECKING:
    from finetune.config import TrainConfig
    from finetune.config_choices import Pretrained

SETTING = "model.pretrained_model_name_or_path"
CONFIG = "model.single_file_config"


def is_single_file(model: Pretrained) -> bool:
    """Whether the model is a file. Raises ConfigError for one of another kind, and for settings that do not go with it,
    or only go with one.
    """
    path = Path(model.pretrained_model_name_or_path).expanduser()
    if not path.is_file():
        if model.single_file_config is not None:
            raise ConfigError(f"{CONFIG} goes with a single file only, which {path} is not: remove it")
        return False
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{SETTING}: {path.name} is no .safetensors file, and a .ckpt can run code when it is read: "
            "have it converted first"
        )
    if model.single_file_config is None:
        raise ConfigError(
            f"{SETTING}: {path.name} holds weights only: name the pipeline that it is a version of in {CONFIG} (folder "
            "or Hub id, such as stable-diffusion-v1-5/stable-diffusion-v1-5), for its shapes, tokenizers and scheduler"
        )
    if model.variant is not None or model.subfolder != "unet":
        raise ConfigError(f"{SETTING}: {path.name} has neither model.variant nor model.subfolder: remove them")
    return True


def unpacked(cfg: TrainConfig) -> TrainConfig:
    """`cfg` with the folder output_dir/base-..., by the file's content, in the place of the file.

    It is written in float32, which is exact, if it is not there. To be called by one process of a machine first.
    Raises ConfigError for a file that is not of the pipeline that model.single_file_config names.
    """
    model = cfg.model
    path = Path(model.pretrained_model_name_or_path).expanduser()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    folder = Path(cfg.output_dir) / f"base-{digest}"
    if not folder.is_dir():
        temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
        try:
            _pipeline(path, model).save_pretrained(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    name = {"pretrained_model_name_or_path": str(folder), "single_file_config": None, "revision": None}
    return replace(cfg, model=replace(model, **name))


def _pipeline(path: Path, model: Pretrained) -> Any:
    import torch
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors import SafetensorError

    source = resolve_source(model.single_file_config, setting=CONFIG, revision=model.revision)
    at = {} if Path(source).is_dir() else {"revision": commit_of(source, setting=CONFIG, revision=model.revision)}
    plain = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    classes = {StableDiffusionPipeline: plain, StableDiffusionXLPipeline: {"add_watermarker": False}}
    try:
        name = DiffusionPipeline.load_config(source, **at).get("_class_name")
        cls = next((each for each in classes if each.__name__ == name), None)
        if cls is None:
            raise ConfigError(f"{CONFIG}: {source} is a {name}: only {', '.join(c.__name__ for c in classes)} come as "
                              "single files")  # fmt: skip
        options = {"torch_dtype": torch.float32, "use_safetensors": True} | at
        pipeline = cls.from_single_file(str(path), config=source, **options, **classes[cls])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"{SETTING}: {path.name} is no {CONFIG} {source}: {reason}") from error
    for part, module in pipeline.components.items():
        missing = [] if not isinstance(module, torch.nn.Module) else _missing(module)
        if missing:
            raise ConfigError(f"{SETTING}: {path.name} lacks {len(missing)} weights of {part} of {source}, such as "
                              f"{missing[0]}: name the pipeline that it is a version of in {CONFIG}")  # fmt: skip
    return pipeline


def _missing(module: Any) -> list[str]:
    """The parameters that no weight came for: they have no memory."""
    return [name for name, parameter in module.named_parameters() if parameter.is_meta]

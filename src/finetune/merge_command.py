"""The command `finetune merge`: a LoRA added to the weights of its model. No torch until the arguments are right."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.durable import to_disk
from finetune.errors import ConfigError, FinetuneError
from finetune.pretrained import load_model_config, load_pretrained, lora_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

TOLERANCE = 1e-3
"""Of an output's largest value: W + s B A in one float32 matrix rounds otherwise than W x + s B (A x)."""


def merge_main(argv: list[str] | None = None) -> None:
    """Write the model with the LoRA in its weights. Raises ConfigError; FinetuneError if what is written is not it."""
    args = _arguments(argv)
    path = lora_file(args.lora, setting="finetune merge")

    from finetune.export import without_loading_bars

    with without_loading_bars():
        model, modules = _load(args.base)
        count, expected = _merge(modules, path, args.scale)
        temporary = args.out.with_name(f".{args.out.name}-tmp-{os.getpid()}")
        try:
            model.save_pretrained(temporary, safe_serialization=True)
            _compare(expected, _load(str(temporary))[1])
            to_disk(temporary)
            temporary.rename(args.out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    print(f"{path.name}: {count} of {count} tensors matched, scale {args.scale:g}\nmerged and loaded again, "
          f"same outputs: {args.out}")  # fmt: skip


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "finetune merge", description="Add a LoRA, in diffusers' or sd-scripts' format, to the weights of a model."
    )
    parser.add_argument("lora", metavar="LORA", help="file, folder or run with a LoRA, or Hub id")
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model: pipeline, UNet folder or Hub id")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder, of the kind of the base")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA; default: 1")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise ConfigError(f"--out {args.out} exists: name a new folder")
    if not math.isfinite(args.scale) or args.scale == 0:
        raise ConfigError(f"--scale must be a number other than 0, got {args.scale}")
    return args


def _load(base: str) -> tuple[Any, dict[str, nn.Module]]:
    """The pipeline or UNet, and those of its modules that a LoRA may be for."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    from finetune.lora_pipeline import adaptable
    from finetune.sample import load_pipeline

    if not (Path(base).is_dir() and (Path(base) / "config.json").is_file()):
        pipeline = load_pipeline(base, to_draw=False)
        return pipeline, adaptable(pipeline)
    place = {"setting": "--base", "revision": None, "subfolder": None}
    name = load_model_config(UNet2DModel, base, **place).get("_class_name")
    classes = {cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel)}
    if name not in classes:
        raise ConfigError(f"--base: {base} holds a {name}: give a pipeline, or one of {', '.join(classes)}")
    unet = load_pretrained(classes[name], base, **place)
    return unet, {"unet": unet}


def _merge(modules: Mapping[str, nn.Module], path: Path, scale: float) -> tuple[int, dict[str, Tensor]]:
    """Merge in place; the number of the LoRA's tensors, and what the modules compute with the LoRA beside them."""
    from peft.tuners.lora import LoraLayer

    from finetune.lora import merge
    from finetune.lora_formats import read_adapters
    from finetune.lora_loading import inject
    from finetune.lora_proof import probe

    adapters = read_adapters(path, modules)
    for part, adapter in adapters.items():
        inject(modules[part], adapter)
    for module in modules.values():
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(scale)
    expected = probe(modules)
    try:
        for part in adapters:
            merge(modules[part])
    except ValueError as error:
        raise FinetuneError(f"{path}: weights would not be finite with it: {error}") from error
    return sum(len(adapter.tensors) for adapter in adapters.values()), expected


def _compare(expected: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
    from finetune.lora_proof import probe

    for part, output in probe(modules).items():
        error, largest = (output - expected[part]).abs().max(), expected[part].abs().max()
        if not error <= TOLERANCE * largest:  # a NaN is not
            raise FinetuneError(
                f"the merged {part} computes something else than base and LoRA: {error:.3g} off at values up to "
                f"{largest:.3g}. Nothing is kept: check the disk, and the versions of peft and diffusers"
            )

"""LoRA files into models: put in beside the weights, or taken over by a LoRA that is there and goes on training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from finetune.errors import ConfigError, FinetuneError
from finetune.lora_formats import NAME, Adapter, adapter_of, adapters_of, read_adapters


def inject(module: nn.Module, adapter: Adapter) -> None:
    """Put `adapter` into `module`, which has none yet, and switch it on. Raises FinetuneError if peft took it for
    something else."""
    inject_adapter_in_model(LoraConfig(**adapter.settings()), module, NAME, state_dict=adapter.tensors)
    _set(module, adapter)


def load_into(modules: Mapping[str, nn.Module], path: Path) -> int:
    """Go on from the LoRA file `path`: its matrices into the adapters that `modules` have. Returns how many.

    The file's rank, scale, layers and kind must be those of the adapters; ConfigError names the setting that makes
    them so.
    """
    mine, found = adapters_of(modules), read_adapters(path, modules)
    if missing := sorted(mine.keys() - found.keys()):
        raise ConfigError(
            f"lora.pretrained: {path} holds no LoRA of the {missing[0]}: give a file that does"
            + ", or set train.train_text_encoder to false" * (missing[0] != "unet")
        )
    if more := sorted(found.keys() - mine.keys()):
        raise ConfigError(
            f"lora.pretrained: {path} holds a LoRA of the {more[0]}, too, which would be lost: set "
            "train.train_text_encoder to true"
        )
    for part, adapter in found.items():
        _same_kind(mine[part], adapter, part, path)
    for part, adapter in found.items():
        _set(modules[part], adapter)
    return sum(len(adapter.tensors) for adapter in found.values())


def _same_kind(own: Adapter, other: Adapter, part: str, path: Path) -> None:
    """Raises ConfigError with the setting that makes the run's adapter one like the file's."""
    if layers := own.alphas.keys() ^ other.alphas.keys():
        raise ConfigError(
            f"lora.pretrained: {path} adapts {len(other.alphas)} layers of the {part}, this run {len(own.alphas)}; "
            f"{min(layers)} is in one of them only: set lora.target to what the file has"
        )
    if own.use_dora != other.use_dora:
        raise ConfigError(f"lora.pretrained: set lora.use_dora to {str(other.use_dora).lower()}, as in {path}")
    for layer in other.alphas:
        rank, scale = other.rank(layer), other.scale(layer)
        if own.rank(layer) != rank:
            raise ConfigError(f"lora.pretrained: {layer} has rank {rank} in {path}: set lora.rank to {rank}")
        if abs(own.scale(layer) - scale) > 1e-6 * scale:
            alpha = scale * rank ** (0.5 if own.use_rslora else 1)
            raise ConfigError(
                f"lora.pretrained: the scale of {layer} is {scale:g} in {path}, here {own.scale(layer):g}: set "
                f"lora.alpha to {alpha:g}"
            )


def _set(module: nn.Module, adapter: Adapter) -> None:
    set_peft_model_state_dict(module, adapter.tensors, NAME)
    now = adapter_of(module)
    same = now.tensors.keys() == adapter.tensors.keys() and all(
        torch.equal(now.tensors[key].cpu(), tensor.to(now.tensors[key].dtype).cpu())
        for key, tensor in adapter.tensors.items()
    )
    if not same or any(abs(now.scale(layer) - adapter.scale(layer)) > 1e-6 for layer in adapter.alphas):
        raise FinetuneError("peft did not take the adapter over as it is: check its version (peft>=0.17)")

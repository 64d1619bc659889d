"""Proof that a LoRA file is the LoRA that was trained: a process of its own loads base and file, and both are compared.

`python -m finetune.lora_proof` is that process: it reads a request from stdin and leaves a safetensors file for each
file: what diffusers (or, where diffusers has no loader, this package) made of it, and what the model then computes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.config import TrainConfig
from finetune.config_io import dump, load_text
from finetune.errors import ConfigError, FinetuneError
from finetune.lora import base_dtype, hold_base
from finetune.lora_formats import NAME, adapter_of, adapters_of, read_adapters
from finetune.lora_loading import inject
from finetune.lora_names import check_kohya, has_cross_attention, is_sdxl
from finetune.lora_pipeline import adaptable, base_pipeline
from finetune.model_fit import TIME_IDS
from finetune.models import UNet, bind
from finetune.pretrained import pin

TOLERANCE = 1e-3
"""Of an output's largest value: devices and numbers of threads round differently. Matrices are compared bit for bit,
scales to 1e-6, so that a LoRA too weak to show in an output is compared as well."""


def diffusers_loads(unet: nn.Module) -> bool:
    """Whether a pipeline of diffusers has a LoRA loader for this UNet: Stable Diffusion's and SDXL's have."""
    with contextlib.suppress(ConfigError):
        check_kohya(unet)
        return True
    return False


def prove(
    pipeline: DiffusionPipeline,
    folder: Path,
    by_diffusers: Mapping[str, bool],
    cfg: TrainConfig,
    run: Mapping[str, Any],
) -> int:
    """Load each file of `folder` in a fresh process and compare it with the LoRA in the memory of this one.

    by_diffusers: file -> whether diffusers' load_lora_weights is to load it, else our own reader. Returns the number of
    tensors, all of which came back the same from each. Raises FinetuneError that names what differs.
    """
    # Of the rest nothing is trained, and with cached embeddings no text encoder is loaded.
    modules = {part: module for part, module in adaptable(pipeline).items() if adapter_of(module) is not None}
    expected = _tensors(modules)
    with tempfile.TemporaryDirectory() as out:
        request = {
            "config": dump(cfg),
            "run": {"data": run.get("data", {}), "commits": run.get("commits", {})},
            "dtypes": {part: str(base_dtype(module)).removeprefix("torch.") for part, module in modules.items()},
            "files": {str(folder / name): by for name, by in by_diffusers.items()},
            "out": out,
        }
        _ask(request)
        for name in by_diffusers:
            with safe_open(Path(out, name), framework="pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                scales = json.loads(file.metadata()["scales"])
            _compare(name, expected, found)
            for key, scale in _scales(modules).items():
                if abs(scales[key] - scale) > 1e-6 * scale:
                    raise _differs(name, f"the scale of {key} is {scales[key]:g}, not {scale:g}")
    return sum(not key.startswith("output.") for key in expected)


@torch.no_grad()
def probe(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What each module computes from fixed inputs, float32 on the CPU: the UNet [1, C, side, side], text encoders
    [1, L, D]. In evaluation mode; a module with weights in half precision is copied to float32 for it, on the CPU.
    """
    found = {}
    for part, module in modules.items():
        was_training, exact = module.training, module
        if any(p.dtype != torch.float32 for p in module.parameters()):
            exact = _in_float32(module)
        exact.eval()
        with _own_forward(exact), torch.compiler.set_stance("force_eager"):
            found[part] = (_unet_output(exact) if part == "unet" else _text_output(exact)).float().cpu()
        module.train(was_training)
    return found


def _in_float32(module: nn.Module) -> nn.Module:
    """A copy on the CPU: whoever holds half precision may have no room for float32 on the device."""
    memo: dict[int, Tensor] = {id(buffer): buffer.detach().clone().cpu() for buffer in module.buffers()}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach().cpu().float(), p.requires_grad)
    return copy.deepcopy(module, memo)


@contextlib.contextmanager
def _own_forward(module: nn.Module) -> Iterator[None]:
    """Inside, the module computes without autocast, which Accelerate puts into the `forward` of what it prepares."""
    prepared = vars(module).pop("forward", None)
    try:
        with torch.autocast(next(module.parameters()).device.type, enabled=False):
            yield
    finally:
        if prepared is not None:
            module.forward = prepared


def _unet_output(unet: UNet) -> Tensor:
    config, random = unet.config, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=random).to(unet.device)

    side = 2 ** len(config.block_out_channels)
    x, condition = normal(config.in_channels, side, side), {}
    embedded = unet.time_embedding.linear_2.out_features
    if has_cross_attention(unet):
        condition["encoder_hidden_states"] = normal(4, config.encoder_hid_dim or config.cross_attention_dim)
    if config.class_embed_type is None and config.num_class_embeds:
        condition["class_labels"] = torch.zeros(1, dtype=torch.long, device=unet.device)
    elif config.class_embed_type is not None:
        width = config.get("projection_class_embeddings_input_dim") if "projection" in config.class_embed_type else None
        condition["class_labels"] = normal() if config.class_embed_type == "timestep" else normal(width or embedded)
    if config.get("addition_embed_type") == "text_time":
        sizes = TIME_IDS * config.addition_time_embed_dim
        condition["text_embeds"] = normal(config.projection_class_embeddings_input_dim - sizes)
        condition["time_ids"] = 100 * normal(TIME_IDS).abs()
    return bind(unet, condition)(x, torch.tensor(7, device=unet.device))


def _text_output(encoder: nn.Module) -> Tensor:
    ids = torch.arange(encoder.config.max_position_embeddings, device=encoder.device) % encoder.config.vocab_size
    return encoder(ids[None], output_hidden_states=True).hidden_states[-1]


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The matrices of the LoRA, and the outputs with it."""
    tensors = {f"output.{part}": output for part, output in probe(modules).items()}
    for part, adapter in adapters_of(modules).items():
        tensors |= {f"{part}.{key}": tensor.detach().float().cpu() for key, tensor in adapter.tensors.items()}
    return tensors


def _scales(modules: Mapping[str, nn.Module]) -> dict[str, float]:
    found = adapters_of(modules).items()
    return {f"{part}.{layer}": adapter.scale(layer) for part, adapter in found for layer in adapter.alphas}


def _compare(name: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if other := sorted(expected.keys() ^ found.keys()):
        raise _differs(name, f"{len(other)} tensors are in one of them only, such as {other[0]}")
    for key, tensor in expected.items():
        if key.startswith("output."):
            error, largest = (found[key] - tensor).abs().max(), tensor.abs().max()
            if not error <= TOLERANCE * largest:  # a NaN is not
                part = key.removeprefix("output.")
                off = f"{error:.3g} off at values up to {largest:.3g}"
                raise _differs(name, f"the {part} computes something else, {off}")
        elif not torch.equal(found[key], tensor):
            raise _differs(name, f"{key} is another one")


def _differs(name: str, difference: str) -> FinetuneError:
    return FinetuneError(
        f"{name} does not load as the LoRA that was trained: {difference}. It is not kept; the checkpoint is. Check "
        "the disk, the versions of diffusers, transformers and peft, and that the base model is what it was."
    )


def _ask(request: Mapping[str, Any]) -> None:
    """Run the process and wait for it. It sees no accelerator: what is free there is not known."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "finetune.lora_proof"]
    text = json.dumps(request)
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split())[-400:]
        raise FinetuneError(
            f"the exported LoRA could not be loaded in a fresh process and is not kept; the checkpoint is. The process "
            f"ended with code {done.returncode}: {reason}"
        )


def _answer(request: Mapping[str, Any]) -> None:
    """What the process does: base and file -> tensors, outputs and scales, for each file."""
    cfg = load_text(request["config"], name="config.yaml")
    pin(request["run"]["commits"])
    for path, by_diffusers in request["files"].items():
        pipeline = base_pipeline(cfg, request["run"])
        modules = {part: getattr(pipeline, part) for part in request["dtypes"]}
        for part, dtype in request["dtypes"].items():  # rounded as the frozen weights were while training
            hold_base(modules[part], getattr(torch, dtype))
            modules[part].float()
        if by_diffusers:
            _load_by_diffusers(modules, Path(path))
        else:
            for part, adapter in read_adapters(Path(path), modules).items():
                inject(modules[part], adapter)
        metadata = {"scales": json.dumps(_scales(modules))}
        save_file(_tensors(modules), Path(request["out"], Path(path).name), metadata=metadata)


def _load_by_diffusers(modules: Mapping[str, nn.Module], path: Path) -> None:
    """Load by the pipeline of diffusers that these modules belong to; what else is in it, a LoRA does not touch."""
    names = ["vae", "tokenizer", "scheduler", "text_encoder"]
    if is_sdxl(modules["unet"]):
        parts = dict.fromkeys([*names, "text_encoder_2", "tokenizer_2"]) | dict(modules)
        pipeline = StableDiffusionXLPipeline(**parts)
    else:
        parts = dict.fromkeys([*names, "safety_checker", "feature_extractor"]) | dict(modules)
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=NAME, local_files_only=True)


if __name__ == "__main__":
    _answer(json.load(sys.stdin))

"""LoRA files: the adapters of a pipeline's modules, in diffusers' naming and in that of sd-scripts, nothing left over.

Matrices are written in float32, as they are trained: a file is a few megabytes, goes on training without loss, and can
be compared bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.lora_names import kohya_names, layers_of, text_name

PARTS = ("unet", "text_encoder", "text_encoder_2")
NAME = "default"
"""peft's name of the adapter that is trained."""
SETTINGS = "lora_adapter_metadata"
"""Entry of a diffusers file that holds LoraConfig's arguments; without it diffusers takes alpha for the rank."""

_A, _B, _LENGTH = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_KOHYA = {"lora_down.weight": _A, "lora_up.weight": _B, "dora_scale": _LENGTH}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The LoRA of one module: layer(x) + scale B A x (Hu et al. 2021); of DoRA, with a learned length of each output
    (Liu et al. 2024)."""

    tensors: dict[str, Tensor]
    """In peft's names: "<layer>.lora_A.weight" [rank, in, ...], "<layer>.lora_B.weight" [out, rank, ...], and of DoRA
    "<layer>.lora_magnitude_vector" [out], of a convolution [1, out, 1, 1]."""
    alphas: dict[str, float]
    """Of each layer; the scale is alpha / rank, with use_rslora alpha / sqrt(rank) (Kalajdzievski 2023)."""
    use_rslora: bool = False

    @property
    def use_dora(self) -> bool:
        """Whether the layers have a learned length."""
        return any(key.endswith(_LENGTH) for key in self.tensors)

    def rank(self, layer: str) -> int:
        """The number of rows of A."""
        return len(self.tensors[layer + _A])

    def scale(self, layer: str) -> float:
        """What B A x is multiplied by."""
        return self.alphas[layer] / self.rank(layer) ** (0.5 if self.use_rslora else 1)

    def settings(self) -> dict[str, Any]:
        """LoraConfig's arguments that make it again, as JSON types."""
        ranks = {layer: self.rank(layer) for layer in self.alphas}
        r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, self.alphas))
        return {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != r},
            "alpha_pattern": {layer: own for layer, own in self.alphas.items() if own != alpha},
            "target_modules": sorted(self.alphas),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that peft put into `module`; its tensors are the live ones. None if there is none."""
    config = getattr(module, "peft_config", {}).get(NAME)
    if config is None:
        return None
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    return Adapter(
        tensors=get_peft_model_state_dict(module, adapter_name=NAME, save_embedding_layers=False),
        alphas={name: float(layer.lora_alpha[NAME]) for name, layer in layers.items()},
        use_rslora=config.use_rslora,
    )


def adapters_of(modules: Mapping[str, Any]) -> dict[str, Adapter]:
    """The adapters of those of a pipeline's modules that have one."""
    found = {part: adapter_of(modules[part]) for part in PARTS if part in modules}
    return {part: adapter for part, adapter in found.items() if adapter is not None}


# -- reading -------------------------------------------------------------------------------------------------------


def read_adapters(path: Path, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
    """The adapters in the file `path`, of either naming, for `modules` (unet, text_encoder, text_encoder_2).

    Raises ConfigError if one key fits no layer, a matrix has not the layer's shape, or one of a pair is missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the LoRA {path} cannot be read as safetensors: {' '.join(str(error).split())}") from error
    modules = {part: modules[part] for part in PARTS if part in modules}
    try:
        kohya = all(key.startswith("lora_") for key in stored)
        found = from_kohya(stored, modules) if kohya else from_diffusers(stored, modules, metadata)
        for part, adapter in found.items():
            _check(adapter, modules[part])
    except ConfigError as error:
        raise ConfigError(f"{path} is no LoRA for this model: {error}") from error
    if not found:
        raise ConfigError(f"{path} holds no LoRA")
    return found


def from_diffusers(
    stored: Mapping[str, Tensor], modules: Mapping[str, nn.Module], metadata: Mapping[str, str]
) -> dict[str, Adapter]:
    """The adapters of a diffusers file, also of the older namings. Raises ConfigError for a key that fits none."""
    settings = json.loads(metadata.get(SETTINGS, "{}"))
    found, left = {}, dict(stored)
    for part, module in modules.items():
        tensors = {key.removeprefix(f"{part}."): left.pop(key) for key in stored if key.startswith(f"{part}.")}
        if not tensors:
            continue
        if part == "unet":
            tensors = convert_unet_state_dict_to_peft(tensors)
        elif any("lora_linear_layer" in key or "to_out_lora" in key for key in tensors):
            tensors = convert_state_dict_to_peft(tensors)
        own = {layer if part == "unet" else text_name(layer): layer for layer in layers_of(module)}
        known, unknown = {}, []
        for key, tensor in tensors.items():
            layer, dot, kind = key.removesuffix(".weight" if _LENGTH in key else "").partition(".lora_")
            layer = own.get(layer if part == "unet" else text_name(layer))
            if layer is None or dot + kind not in (_A, _B, _LENGTH):
                unknown.append(f"{part}.{key}")
            else:
                known[layer + dot + kind] = tensor
        _refuse_unknown(unknown, len(stored))
        layers = [key.removesuffix(_A) for key in known if key.endswith(_A)]
        given = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
        alphas = {layer: float(len(known[layer + _A])) for layer in layers}
        if given:
            own_alphas = given.get("alpha_pattern") or {}
            patterns = {layer: get_pattern_key(list(own_alphas), _public(part, layer)) for layer in layers}
            alphas = {layer: float(own_alphas.get(key, given["lora_alpha"])) for layer, key in patterns.items()}
        found[part] = Adapter(tensors=known, alphas=alphas, use_rslora=bool(given.get("use_rslora", False)))
    _refuse_unknown(list(left), len(stored))
    return found


def from_kohya(stored: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
    """The adapters of an sd-scripts file; of SDXL, also by the layers' names in diffusers. Raises ConfigError."""
    places: dict[str, tuple[str, str]] = {}
    for part, names in kohya_names(modules).items():
        places |= {name: (part, layer) for layer, name in names.items()}
    places |= {f"lora_unet_{layer.replace('.', '_')}": ("unet", layer) for layer in layers_of(modules["unet"])}
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in modules}
    alphas: dict[str, dict[str, float]] = {part: {} for part in modules}
    unknown = []
    for key, tensor in stored.items():
        name, _, kind = key.partition(".")
        part, layer = places.get(name, (None, None))
        if part is None or kind not in (*_KOHYA, "alpha"):
            unknown.append(key)
        elif kind == "alpha":
            alphas[part][layer] = float(tensor)
        else:
            tensors[part][layer + _KOHYA[kind]] = _length(key, tensor) if kind == "dora_scale" else tensor
    _refuse_unknown(unknown, len(stored))
    found = {}
    for part, own in tensors.items():
        ranks = {key.removesuffix(_A): float(len(tensor)) for key, tensor in own.items() if key.endswith(_A)}
        if own:
            found[part] = Adapter(tensors=own, alphas={k: alphas[part].get(k, rank) for k, rank in ranks.items()})
    return found


def _length(key: str, scale: Tensor) -> Tensor:
    """kohya's dora_scale [out, 1] or [out, 1, 1, 1] as peft's magnitude vector."""
    if scale.numel() != len(scale):
        raise ConfigError(f"{key} [{', '.join(map(str, scale.shape))}] holds a length of each input: peft's DoRA has "
                          "one of each output")  # fmt: skip
    return scale.reshape(1, -1, 1, 1) if scale.dim() == 4 else scale.flatten()


def _refuse_unknown(keys: list[str], of: int) -> None:
    if keys:
        raise ConfigError(
            f"{len(keys)} of {of} keys fit no layer of the model, such as {sorted(keys)[0]}: give the LoRA of a model "
            "of this architecture, of the kind LoRA or DoRA (no LoHa, LoKr or merged file)"
        )


def _check(adapter: Adapter, module: nn.Module) -> None:
    """Raises ConfigError if a matrix of a pair is missing or has not the shape that its layer asks for."""
    shapes = {}
    for layer in {key.partition(".lora_")[0] for key in adapter.tensors}:
        around = module.get_submodule(layer)
        weight = (around.base_layer if isinstance(around, LoraLayer) else around).weight
        rank = len(adapter.tensors.get(layer + _A, ()))
        ones = (1,) * (weight.dim() - 2)
        shapes[layer + _A] = (rank, *weight.shape[1:])
        shapes[layer + _B] = (weight.shape[0], rank, *ones)
        if adapter.use_dora:
            shapes[layer + _LENGTH] = (1, weight.shape[0], *ones) if ones else weight.shape[:1]
    if missing := sorted(shapes.keys() - adapter.tensors.keys()):
        raise ConfigError(f"{missing[0]} is missing")
    for key, shape in shapes.items():
        if adapter.tensors[key].shape != shape:
            has, wants = list(adapter.tensors[key].shape), list(shape)
            raise ConfigError(f"{key} has the shape {has}, the layer of the model asks for {wants}")


# -- writing -------------------------------------------------------------------------------------------------------


def write_diffusers(adapters: Mapping[str, Adapter], path: Path) -> int:
    """Write what `load_lora_weights` reads (diffusers>=0.34 with alpha and rsLoRA); returns the number of tensors."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, adapter in adapters.items():
        tensors |= {f"{part}.{_public(part, key)}": tensor for key, tensor in _plain(adapter).items()}
        settings |= {f"{part}.{name}": value for name, value in adapter.settings().items()}
    save_file(tensors, path, metadata={"format": "pt", SETTINGS: json.dumps(settings, sort_keys=True)})
    return len(tensors)


def write_kohya(
    adapters: Mapping[str, Adapter], modules: Mapping[str, nn.Module], path: Path, metadata: Mapping[str, str]
) -> int:
    """Write a file as sd-scripts' networks.lora does; returns the number of tensors, of which each layer has an alpha.

    Its scale is alpha / rank always: of rsLoRA the alpha is written that gives the same scale. metadata: further
    entries; the hashes of the tensors are added. Raises ConfigError for a layer that sd-scripts has no name for.
    """
    tensors = to_kohya(adapters, modules)
    data = save(tensors)
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    save_file(tensors, path, metadata={"format": "pt", **metadata, **hashes})
    return len(tensors)


def kohya_names_of(adapters: Mapping[str, Adapter], modules: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """`kohya_names` of the modules, with one for each layer that is adapted. Raises ConfigError if one has none."""
    names = kohya_names({part: modules[part] for part in PARTS if part in modules})
    for part, adapter in adapters.items():
        if missing := sorted(adapter.alphas.keys() - names[part].keys()):
            raise ConfigError(f"export.kohya: sd-scripts has no name for {missing[0]}: set export.kohya to false")
    return names


def to_kohya(adapters: Mapping[str, Adapter], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of sd-scripts' naming. Raises ConfigError for a layer that has none there."""
    names = kohya_names_of(adapters, modules)
    tensors: dict[str, Tensor] = {}
    for part, adapter in adapters.items():
        for key, tensor in _plain(adapter).items():
            layer, dot, kind = key.partition(".lora_")
            kind = next(theirs for theirs, ours in _KOHYA.items() if ours == dot + kind)
            if kind == "dora_scale":
                tensor = tensor.reshape(-1, *(1,) * (adapter.tensors[layer + _A].dim() - 1))
            tensors[f"{names[part][layer]}.{kind}"] = tensor
        for layer in adapter.alphas:
            tensors[f"{names[part][layer]}.alpha"] = torch.tensor(adapter.scale(layer) * adapter.rank(layer))
    return tensors


def _public(part: str, key: str) -> str:
    """A layer or a tensor by its name in a diffusers file."""
    if part == "unet":
        return key
    # For text encoders transformers looks for peft's own name; by the short one it drops DoRA's lengths with a warning.
    return text_name(key) + ".weight" * key.endswith(_LENGTH)


def _plain(adapter: Adapter) -> dict[str, Tensor]:
    """Its tensors as they are written."""
    return {key: tensor.detach().float().cpu().contiguous() for key, tensor in adapter.tensors.items()}

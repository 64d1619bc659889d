"""LoRA through peft: matrices that are trained beside the frozen weights of a UNet or of a text encoder.

peft is used on the bare modules, because diffusers' add_adapter exists for UNet2DConditionModel only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune.config_lora import Lora
from finetune.errors import ConfigError
from finetune.seeding import key

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {"attention": ATTENTION, "attention_ff": (*ATTENTION, "ff.net.0.proj", "ff.net.2")}
"""How the names of the adapted layers of a UNet end, by lora.target; of `all`, every layer of ADAPTABLE is."""
ADAPTABLE = (nn.Linear, nn.Conv2d)
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""How the names of the adapted layers of a text encoder end, as in diffusers' scripts."""


def add_lora(unet: nn.Module, cfg: Lora, *, seed: int) -> None:
    """Freeze the UNet (on the CPU or a device, float32) and put a LoRA into it, float32 and trainable, in place.

    It then computes what it did. The first weights are a function of `seed` alone; the global random state is left as
    it was. Raises ConfigError if the UNet has none of the layers that cfg.target names, or if a part of its input is
    read by weights of zero that stay frozen.
    """
    names = [name for name, module in unet.named_modules() if isinstance(module, ADAPTABLE)]
    if cfg.target == "all":
        chosen = names
    else:
        endings = TARGETS[cfg.target]
        chosen = _ending_so(names, endings)
        if absent := [ending for ending in endings if not _ending_so(chosen, (ending,))]:
            raise ConfigError(
                f"lora.target {cfg.target}: the {type(unet).__name__} has no layer {absent[0]}: use "
                f"{'attention, or all' if _ending_so(names, ATTENTION) else 'all'}"
            )
    if not unet.conv_in.weight.any(dim=(0, 2, 3)).all():
        raise ConfigError(
            "lora: the conv_in of the pretrained UNet was widened for a condition that it does not know (its weights "
            "are zero for some channels), so that the LoRA would fit no model but this. Train the whole UNet for it "
            "first (without lora), or start from a model that has the condition, such as one for inpainting"
        )
    _inject(unet, cfg, chosen, dropout=cfg.dropout, seed=key(seed, "lora"))


def add_text_lora(text_encoder: nn.Module, cfg: Lora, name: str, *, seed: int) -> None:
    """As add_lora, for the attention of a text encoder, without dropout; `name` distinguishes several of a run."""
    linear = [at for at, module in text_encoder.named_modules() if isinstance(module, nn.Linear)]
    _inject(text_encoder, cfg, _ending_so(linear, TEXT_TARGETS), dropout=0.0, seed=key(seed, f"lora {name}"))


def _ending_so(names: Sequence[str], endings: Sequence[str]) -> list[str]:
    return [name for name in names if f".{name}".endswith(tuple(f".{ending}" for ending in endings))]


def _inject(module: nn.Module, cfg: Lora, names: Sequence[str], *, dropout: float, seed: int) -> None:
    config = LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.rank if cfg.alpha is None else cfg.alpha,
        lora_dropout=dropout,
        target_modules=list(names),
        use_rslora=cfg.use_rslora,
        use_dora=cfg.use_dora,
        init_lora_weights="gaussian",  # as in diffusers' scripts: their learning rates are those for it
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        # bfloat16 keeps 8 bits: a step of 1e-4 would leave a weight of 0.25 as it is.
        assert parameter.dtype == torch.float32 or not parameter.requires_grad, name


def hold_base(module: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights of the linear and convolutional layers in `dtype`, in place; a LoRA stays as it is.

    Autocast rounds them to it in every step anyway, so that nothing computed under it changes. Norms and embeddings,
    which it leaves in float32, stay, and so does conv_in: diffusers takes the dtype of a model for that of its first
    weight, and rounds inputs to it. Raises ConfigError for a weight that `dtype` has no room for.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, ADAPTABLE) and ".lora_" not in name and name.split(".")[0] != "conv_in":
            layer.to(dtype)
            if not all(bool(p.isfinite().all()) for p in layer.parameters(recurse=False)):
                held = str(dtype).removeprefix("torch.")
                raise ConfigError(f"lora.base_dtype: {held} has no room for the weights of {name}: use float32")


def base_dtype(module: nn.Module) -> torch.dtype:
    """The `dtype` of `hold_base`, or float32."""
    return next((p.dtype for p in module.parameters() if p.dtype != torch.float32), torch.float32)


def has_adapter(module: nn.Module) -> bool:
    """Whether a LoRA was put into the module."""
    return any(isinstance(layer, BaseTunerLayer) for layer in module.modules())


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The live tensors that change while training: of a module with an adapter those of the adapter, else all."""
    state = module.state_dict()
    if not has_adapter(module):
        return state
    return {name: state[name] for name, parameter in module.named_parameters() if parameter.requires_grad}


def load_trained_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take over what `trained_state` gave of the same module. Raises RuntimeError, as torch does, for another's."""
    if misfits := trained_state(module).keys() ^ tensors.keys():
        raise RuntimeError(f"{len(misfits)} names differ, such as {min(misfits)}")
    module.load_state_dict(tensors, strict=False)


def merge(module: nn.Module) -> None:
    """Take the adapter out of a module, in place, into its own weights W + s B A: it computes the same as before.

    Raises ValueError if a weight would not be finite.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            module.set_submodule(name, layer.get_base_layer())
    del module.peft_config

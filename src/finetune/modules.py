"""The modules of a run: which of them are frozen, which parameters are trained, and by which names."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from finetune.autoguidance import load_guide
from finetune.compilation import compile_network
from finetune.conditioning import Conditioner, build_conditioner, text_encoders, texts_of
from finetune.errors import ConfigError
from finetune.lora import add_lora, add_text_lora, hold_base, load_trained_state, trained_state
from finetune.lora_formats import adapters_of, kohya_names_of
from finetune.lora_loading import load_into
from finetune.models import UNet, build_unet
from finetune.objective import Objective, build_objective
from finetune.pretrained import lora_file
from finetune.processes import SDPA
from finetune.space import LatentSpace, Space, build_space
from finetune.text_conditions import Text

if TYPE_CHECKING:
    from finetune.config import Optimizer, Train, TrainConfig
    from finetune.data import TrainData


@dataclass(frozen=True, kw_only=True, eq=False)
class Modules:
    """Everything that computes in a run, on its device, none of it wrapped for several processes."""

    space: Space
    conditioner: Conditioner
    objective: Objective
    unet: UNet
    guide: UNet | None = None
    """The weaker network of sample.autoguidance."""

    @property
    def network(self) -> dict[str, nn.Parameter]:
        """What is trained of the UNet, by the UNet's own names: all of it, or a LoRA."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    @property
    def text(self) -> dict[str, nn.Parameter]:
        """What is trained of the text encoders, by names that begin with text_encoder or text_encoder_2."""
        return {
            f"{encoder}.{name}": p
            for encoder, module in text_encoders(self.conditioner).items()
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    @property
    def averaged(self) -> dict[str, nn.Parameter]:
        """What moving averages are kept of: the weights that samples are drawn with."""
        return self.network | self.text

    @property
    def beside(self) -> dict[str, nn.Parameter]:
        """What is trained beside the UNet: DDP does not know of it, its gradients are averaged by the loop."""
        return {f"objective.{name}": p for name, p in self.objective.parameters().items()} | self.text

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name, in the order in which an optimizer is to take it."""
        return self.network | self.beside

    @cached_property
    def has_dropout(self) -> bool:
        """Whether the network draws masks by torch's own random state; a walk over all its layers, once."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.unet.modules())

    @property
    def side_multiple(self) -> int:
        """What the sides of a training image must be multiples of, in pixels: VAE and UNet reduce them by it."""
        return self.space.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def frozen(self) -> list[LatentSpace | Text]:
        """What holds a frozen model."""
        return [self.space] * isinstance(self.space, LatentSpace) + texts_of(self.conditioner)

    @property
    def resident(self) -> list[nn.Module]:
        """The modules that stay on the device while training: not the frozen ones whose output is cached."""
        here = [part for part in self.frozen if part.weights is None]
        frozen = [part.vae if isinstance(part, LatentSpace) else part.text_encoder for part in here]
        return list(dict.fromkeys([self.unet, *[self.guide] * (self.guide is not None), *frozen]))

    @property
    def parameters_frozen(self) -> int:
        """Parameters of the VAE, and those of the text encoders that are not trained."""
        return self.space.parameters_frozen + self.conditioner.parameters_frozen

    def param_groups(self, cfg: Optimizer) -> list[dict[str, Any]]:
        """All that is trained, in the groups of an optimizer, each with the factor of its learning rate, `lr_scale`."""
        text = self.text
        groups = [{"params": [p for name, p in self.trained.items() if name not in text], "lr_scale": 1.0}]
        if text:
            rate = cfg.text_encoder_lr or cfg.learning_rate
            groups.append({"params": list(text.values()), "lr_scale": rate / cfg.learning_rate})
        return groups

    def states(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors that a checkpoint keeps of them, by the part of it that holds them; the live ones, not copies.

        Of a UNet or text encoder with a LoRA that is the LoRA alone: the rest never changes.
        """
        learned = self.objective.state_dict()
        kept = {part: trained_state(module) for part, module in kept_modules(self.unet, self.conditioner).items()}
        return kept | ({"objective": learned} if learned else {})

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `states` gave, of the same modules."""
        for part, module in kept_modules(self.unet, self.conditioner).items():
            load_trained_state(module, states[part])
        if "objective" in states:
            self.objective.load_state_dict(states["objective"])


def kept_modules(unet: UNet, conditioner: Conditioner) -> dict[str, nn.Module]:
    """The modules with weights that are trained, by their part of a checkpoint."""
    encoders = text_encoders(conditioner).items()
    trained = {name: module for name, module in encoders if any(p.requires_grad for p in module.parameters())}
    return {"model": unet} | trained


def build_modules(
    cfg: TrainConfig,
    data: TrainData,
    device: torch.device,
    *,
    global_batch: int,
    objective: Objective | None = None,
    trust: Collection[str] = (),
) -> Modules:
    """The modules that `cfg` names, loaded to `device`.

    objective: used instead of cfg.objective's. trust: the packages whose code cfg.objective may name. Raises
    ConfigError if one cannot be loaded or does not fit the others.
    """
    space = build_space(cfg, device)
    conditioner = build_conditioner(cfg, data.class_names, device, space=space)
    clip = cfg.space.kind == "pixel"
    objective = objective or build_objective(cfg.objective, clip_sample=clip, global_batch=global_batch, trust=trust)
    objective.to(device)
    unet = build_unet(cfg, space, conditioner, seed=cfg.seed)
    choose_trained(cfg, unet, conditioner)
    if cfg.lora is not None and cfg.lora.base_dtype != "float32":
        hold_base(unet, getattr(torch, cfg.lora.base_dtype))  # before it is on the device, which may have no more room
    unet.to(device)
    weaker = cfg.sample.autoguidance
    guide = None if weaker is None else load_guide(weaker, unet, objective.scheduler)
    if cfg.lora is not None and cfg.lora.pretrained is not None:
        file = lora_file(cfg.lora.pretrained, setting="lora.pretrained")
        load_into({"unet": unet} | text_encoders(conditioner), file)
    if cfg.export.kohya:  # now, and not when the training is over
        kohya_names_of(adapters_of({"unet": unet}), {"unet": unet})
    check_attention(unet, cfg.train)
    checkpoint_blocks(unet, cfg.train.gradient_checkpointing)
    if cfg.train.channels_last:
        unet.to(memory_format=torch.channels_last)
    compile_network(unet, cfg.train)
    return Modules(space=space, conditioner=conditioner, objective=objective, unet=unet, guide=guide)


def choose_trained(cfg: TrainConfig, unet: UNet, conditioner: Conditioner) -> None:
    """Put the LoRA of cfg.lora, if there is one, into the modules and make trainable what `cfg` trains of them.

    Raises ConfigError if cfg.lora fits nothing, or if a text encoder is to be trained and there is none.
    """
    if cfg.lora is not None:
        add_lora(unet, cfg.lora, seed=cfg.seed)
    encoders = text_encoders(conditioner)
    if cfg.train.train_text_encoder and not encoders:
        raise ConfigError(f"train.train_text_encoder: conditioning {conditioner.kind} has no text encoder: use false")
    for text in texts_of(conditioner):
        text.trained = cfg.train.train_text_encoder
    for name, encoder in encoders.items():
        encoder.requires_grad_(cfg.train.train_text_encoder)
        if cfg.train.train_text_encoder and cfg.lora is not None:
            add_text_lora(encoder, cfg.lora, name, seed=cfg.seed)


def checkpoint_blocks(unet: UNet, which: bool | Sequence[str]) -> None:
    """Recompute the activations of all blocks of the UNet (true), or of those that are named, in the backward pass.

    Raises ConfigError for a name that is none of down_blocks.0, ..., mid_block, up_blocks.0, ...
    """
    if not which:
        return
    unet.enable_gradient_checkpointing()
    if which is True:
        return
    lists = {"down_blocks": unet.down_blocks, "up_blocks": unet.up_blocks}
    names = [f"{name}.{index}" for name, blocks in lists.items() for index in range(len(blocks))]
    names += ["mid_block"] * (unet.mid_block is not None)
    if unknown := [name for name in which if name not in names]:
        raise ConfigError(
            f"train.gradient_checkpointing: {', '.join(unknown)}: no such block; this UNet has {', '.join(names)}, and "
            "true means all of them"
        )
    for name, module in unet.named_modules():
        if hasattr(module, "gradient_checkpointing"):  # as diffusers itself finds them
            module.gradient_checkpointing = any(f"{name}.".startswith(f"{one}.") for one in which)


def check_attention(unet: UNet, cfg: Train) -> None:
    """Raise ConfigError if the kernel that cfg.sdpa_backend names cannot compute the UNet's attention here.

    Tried, forward and backward, on 8 tokens of each width of heads: torch offers no other way to ask.
    """
    if cfg.sdpa_backend == "auto":
        return
    widths = {m.inner_dim // m.heads for m in unet.modules() if isinstance(m, Attention)}
    if not widths:
        raise ConfigError(f"train.sdpa_backend {cfg.sdpa_backend}: the UNet has no attention: use auto")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(cfg.mixed_precision, torch.float32)
    for width in sorted(widths):
        query = torch.zeros(1, 1, 8, width, device=unet.device, dtype=dtype, requires_grad=True)
        try:
            with sdpa_kernel(SDPA[cfg.sdpa_backend]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says of each kernel why it is not the one
                functional.scaled_dot_product_attention(query, query, query).sum().backward()
        except RuntimeError as error:
            raise ConfigError(
                f"train.sdpa_backend {cfg.sdpa_backend}: cannot compute the UNet's attention on {unet.device.type} in "
                f"{str(dtype).removeprefix('torch.')} with heads of {width} channels "
                f"({str(error).strip().splitlines()[0]}): use auto"
            ) from error

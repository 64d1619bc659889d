"""The modules of a run: which of them are frozen, which parameters are trained, and by which names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from finetune.autoguidance import load_guide
from finetune.conditioning import Conditioner, build_conditioner
from finetune.lora_formats import adapters_of, kohya_names_of
from finetune.models import UNet, build_unet
from finetune.objective import Objective, build_objective
from finetune.space import Space, build_space

if TYPE_CHECKING:
    from finetune.config import TrainConfig
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
        """What is trained of the UNet, by the UNet's own names."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    @property
    def beside(self) -> dict[str, nn.Parameter]:
        """What is trained beside the UNet: DDP does not know of it, its gradients are averaged by the loop."""
        return {f"objective.{name}": p for name, p in self.objective.parameters().items()}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name, in the order in which an optimizer is to take it."""
        return self.network | self.beside

    @property
    def has_dropout(self) -> bool:
        """Whether the network draws masks by torch's own random state."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.unet.modules())

    @property
    def parameters_frozen(self) -> int:
        """Parameters of the VAE and the text encoders."""
        return self.space.parameters_frozen + self.conditioner.parameters_frozen

    def states(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors that a checkpoint keeps of them, by the part of it that holds them; the live ones, not copies."""
        learned = self.objective.state_dict()
        return {"model": self.unet.state_dict()} | ({"objective": learned} if learned else {})

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `states` gave, of the same modules."""
        self.unet.load_state_dict(states["model"])
        if "objective" in states:
            self.objective.load_state_dict(states["objective"])


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
    conditioner = build_conditioner(cfg, data.class_names, device)
    clip = cfg.space.kind == "pixel"
    objective = objective or build_objective(cfg.objective, clip_sample=clip, global_batch=global_batch, trust=trust)
    objective.to(device)
    unet = build_unet(cfg, space, conditioner, seed=cfg.seed).to(device)
    weaker = cfg.sample.autoguidance
    guide = None if weaker is None else load_guide(weaker, unet, objective.scheduler)
    if cfg.export.kohya:  # now, and not when the training is over
        kohya_names_of(adapters_of({"unet": unet}), {"unet": unet})
    if cfg.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if cfg.train.channels_last:
        unet.to(memory_format=torch.channels_last)
    if cfg.train.compile:
        unet.compile()  # in place: the names of the weights stay
    return Modules(space=space, conditioner=conditioner, objective=objective, unet=unet, guide=guide)

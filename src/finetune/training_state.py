"""Everything that a resume brings back: weights, averages, optimizer, what the objective learned, and the counters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.checkpoint import Checkpoint
from finetune.errors import CheckpointError
from finetune.sharding import as_held, sharded

if TYPE_CHECKING:
    from finetune.ema import Ema
    from finetune.modules import Modules


class TrainingState:
    """What changes while training, and nothing else: all other things are functions of it and the configuration."""

    def __init__(
        self,
        modules: Modules,
        optimizer: torch.optim.Optimizer,
        *,
        ema: Ema | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """optimizer: torch's own, of all that `modules` train."""
        self._modules, self._optimizer, self._ema, self._scaler = modules, optimizer, ema, scaler
        self._names = {parameter: name for name, parameter in modules.trained.items()}
        self.step = 0
        """Optimizer steps done."""
        self.batches = 0
        """Global batches drawn; ahead of `step` by the steps that were skipped as non-finite."""
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors by the part of a checkpoint that holds them; the live ones, not copies."""
        parts = self._modules.states() | {"optimizer": optimizer_tensors(self._optimizer, self._names)}
        return parts | (self._ema.averages if self._ema else {})

    def facts(self) -> dict[str, Any]:
        """The rest, of JSON's types."""
        return {
            "step": self.step,
            "batches": self.batches,
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "ema_updates": self._ema.updates if self._ema else 0,
            "grad_scaler": self._scaler.state_dict() if self._scaler else None,
        }

    def load(self, found: Checkpoint) -> None:
        """Take over a checkpoint of the same run. Raises CheckpointError, before anything live is touched, if it is
        not of these very modules."""
        parts = self.parts()
        self._refuse_misfits(found, parts)
        saved = {part: found.tensors(part) for part in parts}  # all of them read before the first is copied
        for part in parts.keys() - {"optimizer"}:
            saved[part] = {name: as_held(tensor, parts[part][name]) for name, tensor in saved[part].items()}
        self._modules.load(saved)
        load_optimizer(self._optimizer, saved["optimizer"], self._names)
        if self._ema:
            self._ema.load(found.state["ema_updates"], {part: saved[part] for part in self._ema.averages})
        if self._scaler and found.state["grad_scaler"]:
            self._scaler.load_state_dict(found.state["grad_scaler"])
        self.step, self.batches = found.state["step"], found.state["batches"]
        self.nonfinite_steps = found.state["nonfinite_steps"]
        self.nonfinite_in_a_row = found.state["nonfinite_in_a_row"]

    def _refuse_misfits(self, found: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Compare names and shapes. A fresh optimizer has no state: its shapes follow from those of the parameters."""
        trained = {name: tuple(parameter.shape) for parameter, name in self._names.items()}
        misfits = []
        for part, tensors in parts.items():
            saved, live = found.shapes(part), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            if part == "optimizer":
                live = {name: self._shape_of(name, trained) for name in saved}
                saved = {name: shape or live[name] for name, shape in saved.items()}  # a counter of steps is a scalar
            for name in sorted(saved.keys() | live.keys()):
                if saved.get(name) != live.get(name) or live[name] is None:
                    misfits.append(f"  {part}: {name}: {saved.get(name, 'absent')} -> {live.get(name) or 'absent'}")
        if misfits:
            more = [f"  and {len(misfits) - 10} more"] if len(misfits) > 10 else []
            raise CheckpointError(
                f"{found.path} is of another network; it was saved with other names or shapes:\n"
                + "\n".join(misfits[:10] + more)
                + "\nChoose another output_dir for the new network, or set back what was changed."
            )

    def _shape_of(self, name: str, trained: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """The shape that a tensor of the optimizer must have, if it is no scalar; None if it is of nothing here."""
        owner, _, state = name.rpartition("/")
        if owner in trained:
            return state_shape(state, trained[owner])
        return () if owner in {f"group {index}" for index in range(len(self._optimizer.param_groups))} else None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state as tensors keyed "<parameter name>/<state name>"; names do not depend on their order.

    Some keep counters and estimates beside the hyperparameters of a group of parameters: "group <n>/<name>" are the
    numbers that are no longer those that the optimizer was made with.
    """
    tensors = {
        f"{names[parameter]}/{key}": _as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            made_with = key in ("lr", "lr_scale", "weight_decay") or value == optimizer.defaults.get(key)
            if isinstance(value, int | float) and not made_with:
                tensors[f"group {index}/{key}"] = _as_tensor(value)
    return tensors


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[nn.Parameter, str]
) -> None:
    """Inverse of `optimizer_tensors`; hyperparameters stay those of `optimizer`."""
    parameters = {name: parameter for parameter, name in names.items()}
    by_name: dict[str, dict[str, Any]] = {}
    of_groups: list[tuple[int, str, Any]] = []
    for key, tensor in tensors.items():
        name, _, state = key.rpartition("/")
        if name not in parameters:
            of_groups.append((int(name.removeprefix("group ")), state, _as_number(tensor)))
            continue
        like = parameters[name]
        if tensor.shape == like.shape:  # the fused kernels walk raw memory: moments need the parameter's memory format
            if sharded([like]):
                tensor = as_held(tensor, like)
            else:
                tensor = torch.empty_like(like, dtype=tensor.dtype, device="cpu").copy_(tensor)
        by_name.setdefault(name, {})[state] = _as_number(tensor)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: by_name[names[p]] for index, p in enumerate(order) if names[p] in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for index, key, value in of_groups:
        optimizer.param_groups[index][key] = value


NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
"""How Python's numbers are stored, exactly. An optimizer's own scalars are float32, so that they are told apart."""


def _as_tensor(value: Tensor | bool | int | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=NUMBERS[type(value)])


def _as_number(tensor: Tensor) -> Tensor | bool | int | float:
    return tensor.item() if not tensor.shape and tensor.dtype in NUMBERS.values() else tensor


def state_shape(name: str, parameter: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that an optimizer's state `name` of a parameter of this shape has."""
    blocks = -(-math.prod(parameter) // 256)
    shapes = {
        "exp_avg_sq_row": parameter[:-1],  # Adafactor
        "exp_avg_sq_col": parameter[:-2] + parameter[-1:],
        "s": (math.prod(parameter),),  # Prodigy, flat
        "p0": (math.prod(parameter),),
        "absmax1": (blocks,),  # bitsandbytes: the scale of each block, and what each of 256 codes means
        "absmax2": (blocks,),
        "qmap1": (256,),
        "qmap2": (256,),
    }
    return shapes.get(name, parameter)

"""Tensors that are sharded over the processes (FSDP2): gathered to be saved, cut to be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

Parts = Mapping[str, Mapping[str, Tensor]]


def sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is sharded, so that all processes must take part in reading it."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


@torch.no_grad()
def gathered(parts: Parts, *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """`parts` with every tensor whole and in host memory; for all processes alike, each of which calls it.

    One tensor after the other, so that no device holds more than one of them whole; keep: whether this process wants
    the result, which else is empty.
    """
    result: dict[str, dict[str, Tensor]] = {}
    for part, tensors in parts.items():
        result[part] = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                result[part][name] = torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)
    return result


def as_held(whole: Tensor, live: Tensor) -> Tensor:
    """The share of `whole`, the same on all processes, that this process holds of `live`; nothing is sent."""
    if not isinstance(live, DTensor):
        return whole
    device = live.to_local().device
    return distribute_tensor(whole.to(device), live.device_mesh, live.placements, src_data_rank=None)


def held(tensor: Tensor) -> Tensor:
    """What this process itself holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unsharded(module: torch.nn.Module, *, keep: bool) -> torch.nn.Module | None:
    """A copy of a diffusers model whose parameters are whole, in host memory; for all processes alike.

    None where it is not wanted (keep).
    """
    weights = gathered({"module": module.state_dict()}, keep=keep)["module"]
    if not keep:
        return None
    plain = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
    copy = plain.from_config(module.config)
    copy.load_state_dict(weights, assign=True)
    return copy

"""How many bytes of tensors are alive: of tensors without memory, as if they had it, or on a GPU."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, of tensors that appear inside or were shown to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # the checks of a LoRA ask whether weights are sound
            return True
        made = func(*args, **(kwargs or {}))
        self.show(made)
        return made

    def show(self, tensors: Any) -> None:
        """Count the storages of these, unless they are counted already."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            name, size = id(storage), storage.nbytes()
            if name not in self._seen:
                self._seen[name] = weakref.ref(storage, lambda _, name=name, size=size: self._forget(name, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _forget(self, name: int, size: int) -> None:
        del self._seen[name]
        self.now -= size

    def reset(self) -> None:
        """From here on, `peak` is that of what follows."""
        self.peak = self.now


class Gpu(contextlib.nullcontext):
    """The same of torch's allocator on the GPU."""

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def norms_as_on_cuda(module: nn.Module) -> None:
    """CUDA's autocast computes norms in float32, the CPU's does not."""
    for each in module.modules():
        if isinstance(each, nn.GroupNorm | nn.LayerNorm):
            each.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))


def without_memory(module: nn.Module) -> None:
    """Give a module of torch's meta device tensors of the FakeTensorMode that is on, which say they are the CPU's."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = torch.empty_like(tensor, device="cpu")
                    held[name] = nn.Parameter(fake, tensor.requires_grad) if held is part._parameters else fake

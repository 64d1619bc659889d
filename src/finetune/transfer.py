"""Copies between host and device that neither of them waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor.to(device, dtype)`; from the host to a GPU through page-locked memory, of any other the host would wait
    until all that the GPU has to do is done."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device, dtype)
    return tensor.to(dtype or tensor.dtype).pin_memory().to(device, non_blocking=True)


class FromDevice:
    """A copy of a tensor that is on its way to the host, which goes on meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)  # non_blocking: to page-locked memory
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def tolist(self) -> list[float]:
        """Its numbers; the device is waited for until it has done what came before the copy, no longer."""
        if self._arrived:
            self._arrived.synchronize()
        return self._copy.tolist()

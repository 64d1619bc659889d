"""Randomness as a function of (seed, purpose, what it belongs to). Nothing random is ever saved: a draw is recomputed.

Imports torch only when tensors are drawn, so that the order of samples can be computed without it.
"""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key(seed: int, purpose: str, *what: int) -> int:
    """A 64-bit number that depends on every argument and on nothing else: key(seed, "noise", position).

    `what` are integers that name the owner of the draw (a position in the run; an epoch and a row). The same arguments
    give the same key on every machine, process and Python version; any difference gives an unrelated key (blake2b).
    """
    words = (operator.index(seed), str(purpose), *map(operator.index, what))
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little")


def permutation(seed: int, purpose: str, epoch: int, n: int) -> np.ndarray:
    """The numbers 0..n-1, each exactly once, in an order that is a function of the arguments -> [n] int64.

    A Fisher-Yates shuffle: O(n) time and memory. RandomState rather than numpy's newer Generator, because its stream is
    frozen (NEP 19): a run that is resumed after an upgrade of numpy continues in the same order of samples.
    """
    bits = key(seed, purpose, epoch)
    return np.random.RandomState([bits & 0xFFFFFFFF, bits >> 32]).permutation(n).astype(np.int64, copy=False)


class PositionRandom:
    """Random draws for the samples of a batch, each a function of (seed, purpose, position of the sample in the run).

    So the draws of a sample do not depend on how the run is split into batches, processes or accumulation steps, on
    what was drawn before, or on where the run was resumed. Each purpose is its own stream and gives one draw per
    position: asked again, it repeats itself, so two draws need two purposes.

    Drawn on the CPU, because CUDA's streams differ between GPU models; 4x64x64 normals took 42 us per sample on one
    server core. torch's CPU generator uses only the low 32 bits of the key, so among a million positions about 116
    pairs share their noise: too few to matter for a loss, but these draws are not for cryptography or exact counting.
    """

    def __init__(self, seed: int, positions: torch.Tensor, device: torch.device | str = "cpu") -> None:
        """positions: [B] integers, position of each sample in the run. device: where `normal` delivers."""
        import torch

        assert positions.ndim == 1, f"one position per sample, got shape {tuple(positions.shape)}"
        self._seed, self._device = seed, device
        self._positions: list[int] = positions.tolist()
        self._generator = torch.Generator()

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers, `shape` of them per sample -> [B, *shape] float32 on the device."""
        import torch

        on_gpu = torch.device(self._device).type == "cuda"  # of page-locked memory nobody waits for the copy
        out = torch.empty(len(self._positions), *shape, pin_memory=on_gpu)
        for row, position in zip(out, self._positions, strict=True):
            row.normal_(generator=self._at(purpose, position))
        return out.to(self._device, non_blocking=on_gpu)

    def uniform(self, purpose: str) -> torch.Tensor:
        """One number in [0, 1) per sample -> [B] float64 on the CPU."""
        import torch

        draws = [torch.rand((), dtype=torch.float64, generator=self._at(purpose, p)) for p in self._positions]
        return torch.stack(draws)

    def stratified(self, purpose: str, strata: int) -> torch.Tensor:
        """As `uniform`, but of the positions n*strata to (n+1)*strata - 1 each lies in a share of its own.

        The shares [i / strata, (i + 1) / strata) go round by a number drawn for n, so that a global batch of that size
        covers each once, and no place in the batch (as the rows of one shard may have) always has the same levels.
        """
        import torch

        turns = [key(self._seed, f"{purpose} turn", p // strata) for p in self._positions]
        shares = torch.tensor([(p + turn) % strata for p, turn in zip(self._positions, turns, strict=True)])
        return (shares + self.uniform(purpose)) / strata

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """One integer in [0, high) per sample -> [B] int64 on the CPU."""
        import torch

        return torch.stack([torch.randint(high, (), generator=self._at(purpose, p)) for p in self._positions])

    def _at(self, purpose: str, position: int) -> torch.Generator:
        return self._generator.manual_seed(key(self._seed, purpose, position))

"""One training example, and what is said where another row had to stand in for its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)


class Replaced(NamedTuple):
    """A row that turned unusable after the check, and was replaced in one sample (data.on_error skip)."""

    row: int
    used: int
    """The row that stands in for it."""
    reason: str
    """Names the row, or its file, and what is wrong with it."""


@dataclass(frozen=True)
class Sample:
    """One training example."""

    row: int
    """Its number in the data set."""

    pixels: torch.Tensor | None
    """[channels, height, width] uint8 or float32, see `images.Prepared`; None with cached latents."""
    caption: str | None
    label: int | None
    time_ids: tuple[int, ...]
    """Sizes: see `images.Prepared`."""
    low_res: torch.Tensor | None
    """The small image, if the data has one: see `images.Prepared`."""
    mask: torch.Tensor | None = None
    """How much each pixel counts, in a masked loss: see `images.Prepared`."""
    loss_weight: float | None = None
    """What its loss counts, with prior preservation."""
    replaced: Replaced | None = None
    """Set if `row` stands in for another one."""
    moments: torch.Tensor | None = None
    """[2c, h, w] float16 or float32, of the VAE's posterior, if latents are cached: see `space.LatentSpace.moments`."""


def report_replaced(replaced: Sequence[Replaced], told: set[int]) -> None:
    """Log each replaced row that is not in `told` yet, and add it; for the training process, batch by batch.

    As an error: of processes other than the main one nothing less is shown, and each reads rows of its own.
    """
    for row, used, reason in replaced:
        if row not in told:
            log.error("%s. Replaced when it is drawn (data.on_error skip), this time by row %d.", reason, used)
            told.add(row)

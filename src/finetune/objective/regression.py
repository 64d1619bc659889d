"""The error of the output that is minimised: squared, absolute, or between both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Regression:
    """A loss of the elementwise error, and how it changes when the error is multiplied by a factor."""

    name: str
    """Its name in the log."""
    function: Callable[[Tensor], Tensor]
    """Error -> loss, elementwise."""
    scale: Callable[[Tensor], Tensor]
    """c_out -> the loss of x0 over that of the output, whose error is 1 / c_out times that of x0."""


squared = Regression("mse", torch.square, torch.square)
absolute = Regression("l1", torch.abs, torch.abs)


def pseudo_huber(c: float) -> Regression:
    """2 c (sqrt(d^2 + c^2) - c): d^2 for |d| << c, 2 c |d| for |d| >> c. Scales as the square it is for small d.

    Computed as 2 c d^2 / (sqrt(d^2 + c^2) + c), which loses no digits to the difference.
    """
    return Regression("huber", lambda d: 2 * c * d**2 / ((d**2 + c**2).sqrt() + c), torch.square)

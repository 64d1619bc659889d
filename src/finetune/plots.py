"""Curves as pictures: the loss of a run, and what an evaluation finds at each noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: its state belongs to the user's notebook
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from torch import Tensor


def draw_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the loss, and the learning rate below it, over the optimizer steps to a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [line["step"] for line in metrics]
    marker = "o" if len(steps) == 1 else None
    upper.plot(steps, [line["loss"] for line in metrics], linewidth=1, marker=marker)
    upper.set(ylabel="loss", yscale="log" if all(line["loss"] > 0 for line in metrics) else "linear")
    lower.plot(steps, [line.get("lr") for line in metrics], linewidth=1, marker=marker, color="tab:gray")
    lower.set(ylabel="learning rate", xlabel="optimizer step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3, which="both" if axes is upper else "major")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_levels(columns: dict[str, Tensor], path: Path) -> None:
    """Plot the means of columns [N, T] over the levels to a PNG, one panel each."""
    figure = Figure(figsize=(7, 2.2 * len(columns)), layout="constrained")
    FigureCanvasAgg(figure)
    labels = {"vb": "bits per dimension", "x0_mse": "squared error of x0", "noise_mse": "squared error of the noise"}
    panels = figure.subplots(len(columns), 1, sharex=True)
    for axes, (name, column) in zip(panels, columns.items(), strict=True):
        axes.plot(column.mean(0).numpy(), linewidth=1)
        axes.set(ylabel=labels[name], yscale="log")
        axes.grid(alpha=0.3, which="both")
    panels[-1].set(xlabel="noise level, least noise first")
    figure.savefig(path, dpi=120, metadata={"Software": None})

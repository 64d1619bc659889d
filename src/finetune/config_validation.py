"""How the loss of images that are not trained on is measured. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

from pydantic import Field

from finetune.config_types import Count, Decay, Int, section

METRICS = ("validation_loss", "train_validation_loss")
"""What a measurement adds to metrics.jsonl and checkpoint.best_metric may name."""


@section
class Validation:
    """The loss of images that are kept from training, each time with the same noise; and whether it turns up."""

    held_out: Decay = 0.0
    """Share of the images that are kept from training, chosen by their bytes alone: copies of an image stay together
    whatever their captions, and images that are added move none. 0: no validation."""
    every: Count = 500
    """Optimizer steps between two measurements; also before the first step and after the last."""
    max_images: Annotated[Int, Field(ge=2)] = 128
    """Images that are measured of those held out, and as many training images beside them, chosen by their bytes."""
    levels: Count = 4
    """Noise levels at which each image is measured, one from each of so many equal shares of those that are trained."""
    patience: Count = 3
    """Measurements in a row that lie above the lowest one by more than 2 standard errors of the difference, after
    which the model is said to overfit."""
    stop_on_overfit: bool = False
    """Then end as after the last step. Exported are the weights of that moment; `checkpoint.best_metric
    validation_loss` keeps the checkpoint of the lowest."""


def validation_contradictions(
    validation: Validation, *, streaming: bool, best_metric: str | None
) -> Iterator[tuple[str, str]]:
    """Rules between the section and others, as (place, problem) pairs."""
    if validation.held_out:
        if streaming:
            yield "validation.held_out", (
                "which images are held out follows from their bytes, which data.streaming does not read before "
                "training: remove data.streaming, or validation.held_out"
            )
        return
    defaults = asdict(Validation())
    for name in (name for name, value in asdict(validation).items() if value != defaults[name]):
        yield f"validation.{name}", "nothing is held out: set validation.held_out to a share such as 0.1, or remove it"
    if best_metric in METRICS:
        yield "checkpoint.best_metric", f"{best_metric} is measured on images held out: set validation.held_out"

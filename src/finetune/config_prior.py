"""The section of the configuration for prior preservation (DreamBooth), and what goes with it. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from finetune.config_types import Count, Positive, PositiveOrZero, section

if TYPE_CHECKING:
    from finetune.config import TrainConfig


@section
class Prior:
    """Train on images of the class that the subject belongs to as well, so that the model keeps what it knew of it
    (Ruiz et al. 2023, section 3.2). Every other sample is a class image, drawn by the model before its training."""

    class_prompt: str
    """The caption of the class images, such as "a photo of a dog"; those that are missing are drawn from it."""
    class_data_dir: str
    """Folder of the class images; what it holds is used, what is missing is drawn into it."""
    num_class_images: Count = 100
    """How many class images there are to be (100 as in diffusers' train_dreambooth)."""
    weight: Positive = 1.0
    """What the loss of a class image counts beside that of another."""
    sample_batch_size: Count = 4
    """Class images that each process draws at a time."""
    num_inference_steps: Count = 50
    """Steps that class images are drawn in, by sample.scheduler (50 and 7.5 as in diffusers' train_dreambooth)."""
    guidance_scale: PositiveOrZero = 7.5
    """Guidance that class images are drawn with."""


def prior_contradictions(cfg: TrainConfig, conditions: Collection[str]) -> Iterator[tuple[str, str]]:
    """Rules between this section, data.instance_prompt and others, as (place, problem) pairs."""
    takes_text = {"text", "pooled_text"} & set(conditions) or cfg.model.kind == "pretrained"
    if cfg.data.instance_prompt is not None and not takes_text:
        yield "data.instance_prompt", "there is no condition text, which would read it: remove it"
    if cfg.prior is None:
        return
    if cfg.model.kind != "pretrained":
        yield "prior", (
            f"the class images are what the model draws before its training, and model.kind {cfg.model.kind} begins "
            "with noise: remove prior, or use model.kind pretrained"
        )
    if others := sorted(set(conditions) - {"text", "pooled_text", "size"}):
        yield "prior", f"class images have a caption and nothing else, but the model takes {', '.join(others)}"
    if cfg.data.buckets != "none":
        yield "prior", "class images come in turns with the others, in batches of one shape: set data.buckets none"
    if cfg.data.streaming:
        yield "prior", "class images come in turns with the rows of the data, which are not numbered: not for streaming"

"""To take space and conditioning from a pretrained pipeline, and the conditions of Stable Diffusion XL.

Imports no torch.
"""

from __future__ import annotations

from typing import Literal

from finetune.config_types import Count, CountOrZero, Fraction, section


@section
class AutoSpace:
    """That of the pretrained pipeline, with its VAE; pixels for a new model."""

    kind: Literal["auto"] = "auto"


@section
class AutoConditioning:
    """That of the pretrained pipeline, with its text encoders; none for a new model."""

    kind: Literal["auto"] = "auto"
    condition_dropout: Fraction | None = None
    """Share of samples trained without their condition, for guidance; unset: 0.1 (Ho & Salimans 2022)."""
    clip_skip: CountOrZero | None = None
    """Layers left out at the end of a text encoder: see the kinds that have it; unset: none."""
    chunks: Count | None = None
    """Pieces of 75 tokens that a text is read in: see the kinds that have it; unset: 1."""


@section
class SDXL:
    """Stable Diffusion XL's conditions (Podell et al. 2023): the states before the last of two frozen CLIP text
    encoders side by side, the pooled text of the second, and the sizes, which are never dropped."""

    kind: Literal["sdxl"]
    pipeline: str
    """Folder or Hub id that holds text_encoder, text_encoder_2, tokenizer and tokenizer_2."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    variant: str | None = None
    """Weights' variant, such as fp16; used in float32 all the same."""
    condition_dropout: Fraction = 0.1
    """Share of samples trained without their caption, for guidance (Ho & Salimans 2022 use 0.1 to 0.2)."""
    null: Literal["zero", "empty_prompt"] = "zero"
    """What stands for "no caption": zeros, as force_zeros_for_empty_prompt of XL base, or the empty prompt."""
    clip_skip: CountOrZero | None = None
    """Layers left out beside the last one, in both encoders, as in StableDiffusionXLPipeline; unset: none."""
    chunks: Count = 1
    """Text is read in up to so many pieces of 75 tokens; above 1 the export is a UNetPipeline."""

    @property
    def dropout_draws(self) -> str:
        """Both texts go together."""
        return "joint"

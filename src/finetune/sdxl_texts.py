"""The texts of Stable Diffusion XL (Podell et al. 2023), read by two CLIP text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.conditions import Condition, Single
from finetune.text_conditions import PooledText, TextSequence

if TYPE_CHECKING:
    from finetune.batching import Batch
    from finetune.seeding import PositionRandom


class ProjectedText(PooledText):
    """The same state through the projection of a CLIPTextModelWithProjection, as SDXL's second encoder gives it."""

    def _width(self, config: Any) -> int:
        return config.projection_dim

    def _read(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids).text_embeds


class PenultimateText(TextSequence):
    """The states before the last layer, or clip_skip layers earlier, and not normalised, as SDXL reads them."""

    def _read(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids, output_hidden_states=True).hidden_states[-2 - self.clip_skip]


class TwoTexts(Single):
    """{"encoder_hidden_states": [B, L, D1 + D2] float32}: the states of SDXL's two encoders side by side."""

    kind = "text"

    def __init__(self, first: PenultimateText, second: PenultimateText) -> None:
        """Both with the same dropout and null."""
        self._both = first, second
        self.dropout, self.null = first.dropout, first.null
        self.chunks, self.clip_skip = first.chunks, first.clip_skip
        self.width = first.width + second.width

    @property
    def members(self) -> tuple[PenultimateText, PenultimateText]:
        """See `Single`."""
        return self._both

    @property
    def parameters_frozen(self) -> int:
        """Of both."""
        return sum(member.parameters_frozen for member in self.members)

    @property
    def truncated(self) -> int:
        """Captions encoded so far that were longer than the encoders read."""
        return self.members[0].truncated

    def of(self, batch: Batch, random: PositionRandom | None = None) -> Condition:
        """The embeddings of the captions."""
        return self._joined([member.of(batch) for member in self.members])

    def condition(self, wanted: Sequence[str]) -> Condition:
        """The embeddings of prompts, one row each."""
        return self._joined([member.condition(wanted) for member in self.members])

    def unconditional(self, n: int) -> Condition:
        """n times the embedding of the empty prompt, or n times zeros of its shape."""
        return self._joined([member.unconditional(n) for member in self.members])

    @staticmethod
    def _joined(found: list[Condition]) -> Condition:
        return {TextSequence.argument: torch.cat([one[TextSequence.argument] for one in found], dim=-1)}


def sdxl_texts(
    first: Mapping[str, Any], second: Mapping[str, Any], *, dropout: float, null: str, **reads: Any
) -> dict[str, Single]:
    """SDXL's text conditions by kind. first, second: text_encoder and tokenizer, as arguments of Text. reads: clip_skip
    and chunks.

    Raises ConfigError for a text encoder with another's tokenizer, or with too few layers.
    """
    options = {"dropout": dropout, "null": null}
    both = [PenultimateText(**modules, **reads, **options) for modules in (first, second)]
    return {"pooled_text": ProjectedText(**second, **options), "text": TwoTexts(*both)}

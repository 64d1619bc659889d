"""Text as a condition, read by a frozen CLIP text encoder: pooled, or as a sequence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.conditions import Condition, Single
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

    from finetune.batching import Batch
    from finetune.seeding import PositionRandom

log = logging.getLogger(__name__)

ENCODER_BATCH = 8  # captions are always encoded in batches of this shape: see Text._embed
CACHE_BYTES = 256 << 20  # of embeddings kept in memory


class Text(Single):
    """A frozen CLIP text encoder; the embedding of the empty prompt, or zeros, stand for "no caption"."""

    argument: str
    """Name of the embedding in a Condition."""

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        *,
        dropout: float = 0.0,
        null: str = "empty_prompt",
    ) -> None:
        """Freezes the text encoder. null: "empty_prompt" or "zero". Raises ConfigError for another's tokenizer."""
        _check_pair(text_encoder, tokenizer)
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer, self.dropout, self.null = tokenizer, dropout, null
        self.width = self._width(text_encoder.config)
        self.parameters_frozen = sum(p.numel() for p in text_encoder.parameters())
        self.truncated = 0
        """Captions encoded so far that were longer than the encoder reads."""
        self._cache: dict[str, Tensor] = {}

    def of(self, batch: Batch, random: PositionRandom | None = None) -> Condition:
        """The embeddings of the captions."""
        assert batch.captions is not None, "the data must give captions"
        return self.condition(batch.captions)

    def condition(self, wanted: Sequence[str]) -> Condition:
        """The embeddings of prompts, one row each."""
        return {self.argument: self._embed(wanted)}

    def unconditional(self, n: int) -> Condition:
        """n times the embedding of the empty prompt, or n times zeros of its shape."""
        condition = self.condition([""] * n)
        return condition if self.null == "empty_prompt" else {k: torch.zeros_like(v) for k, v in condition.items()}

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """texts -> [n, ...] float32 on the encoder's device. The encoder is frozen, so embeddings are remembered.

        Encoded in batches of one fixed shape, filled with empty prompts: matrix products round differently in batches
        of different sizes, and a text's embedding must not depend on what it came with or on what was remembered, or
        a resumed run would differ in the last bit.
        """
        fresh: dict[str, Tensor] = {}
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        for start in range(0, len(new), ENCODER_BATCH):
            part = new[start : start + ENCODER_BATCH]
            rows = self._encode(part + [""] * (ENCODER_BATCH - len(part))).cpu()
            fresh.update(zip(part, rows, strict=False))
            for text, row in zip(part, rows, strict=False):
                if (len(self._cache) + 1) * row.nbytes <= CACHE_BYTES:
                    self._cache[text] = row.clone()  # not a view, which would keep the whole batch
        rows = [self._cache[text] if text in self._cache else fresh[text] for text in texts]
        return torch.stack(rows).to(self.text_encoder.device)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Tensor:
        longest = self.tokenizer.model_max_length
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False).input_ids, strict=True):
            if len(ids) > longest:
                if not self.truncated:
                    log.warning("captions are cut to %d tokens of %d: %r", longest, len(ids), text)
                self.truncated += 1
        # Padded to the full length without an attention mask, as StableDiffusionPipeline does.
        tokens = self.tokenizer(texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        device = self.text_encoder.device
        with torch.autocast(device.type, enabled=False):  # the same embeddings in training and in sampling
            return self._read(tokens.input_ids.to(device)).float()

    def _width(self, config: Any) -> int:
        """The size of the embedding's last axis."""
        return config.hidden_size

    def _read(self, ids: Tensor) -> Tensor:
        """Token ids [n, L] -> embeddings [n, ...]."""
        raise NotImplementedError


class PooledText(Text):
    """{"class_labels": [B, D] float32}: the encoder's state at the end of the text, added to the time embedding."""

    kind = "pooled_text"
    argument = "class_labels"

    def _read(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids).pooler_output


class ProjectedText(PooledText):
    """The same state through the projection of a CLIPTextModelWithProjection, as SDXL's second encoder gives it."""

    def _width(self, config: Any) -> int:
        return config.projection_dim

    def _read(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids).text_embeds


class TextSequence(Text):
    """{"encoder_hidden_states": [B, L, D] float32}: the encoder's last states, read by cross-attention."""

    kind = "text"
    argument = "encoder_hidden_states"

    def __init__(self, *modules: Any, clip_skip: int | None = None, **options: Any) -> None:
        """modules, options: as of Text. clip_skip: the last layers to leave out. Raises ConfigError for too many."""
        super().__init__(*modules, **options)
        self.clip_skip = clip_skip or 0
        _check_layers(self.text_encoder, self.clip_skip)

    def _read(self, ids: Tensor) -> Tensor:
        if not self.clip_skip:
            return self.text_encoder(ids).last_hidden_state
        # As StableDiffusionPipeline, which fails with transformers 5: the normalisation has moved there.
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states[-1 - self.clip_skip]
        return self.text_encoder.final_layer_norm(states)


class PenultimateText(TextSequence):
    """The states before the last layer, or clip_skip layers earlier, and not normalised, as SDXL reads them."""

    def _read(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids, output_hidden_states=True).hidden_states[-2 - self.clip_skip]


class TwoTexts(Single):
    """{"encoder_hidden_states": [B, L, D1 + D2] float32}: the states of SDXL's two encoders side by side."""

    kind = "text"

    def __init__(self, first: PenultimateText, second: PenultimateText) -> None:
        """Both with the same dropout and null."""
        self.members = first, second
        self.dropout, self.null, self.clip_skip = first.dropout, first.null, first.clip_skip
        self.width = first.width + second.width
        self.parameters_frozen = first.parameters_frozen + second.parameters_frozen

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
    modules: tuple[Any, Any, Any, Any], *, dropout: float, null: str, clip_skip: int | None = None
) -> dict[str, Single]:
    """SDXL's text conditions by kind. modules: text_encoder, tokenizer, text_encoder_2, tokenizer_2.

    Raises ConfigError for a text encoder with another's tokenizer, or with too few layers.
    """
    first, second = modules[:2], modules[2:]
    options = {"dropout": dropout, "null": null}
    both = [PenultimateText(*pair, clip_skip=clip_skip, **options) for pair in (first, second)]
    return {"pooled_text": ProjectedText(*second, **options), "text": TwoTexts(*both)}


def _check_layers(text_encoder: CLIPTextModel, clip_skip: int) -> None:
    layers = text_encoder.config.num_hidden_layers
    if clip_skip >= layers:
        raise ConfigError(f"clip_skip must be below the {layers} layers of the text encoder, got {clip_skip}")


def _check_pair(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    config, rule = text_encoder.config, "the tokenizer must be the one of the text encoder"
    positions, highest = config.max_position_embeddings, max(tokenizer.get_vocab().values())
    if tokenizer.model_max_length > positions:
        raise ConfigError(
            f"{rule}: its model_max_length is {tokenizer.model_max_length}, the encoder reads {positions} tokens: "
            f"set model_max_length in its tokenizer_config.json to {positions}"
        )
    if highest >= config.vocab_size:
        raise ConfigError(f"{rule}: its ids reach {highest}, the encoder knows {config.vocab_size}")
    # The pooled embedding is read at the end token, which transformers finds by this rule (2 is CLIP's old config).
    end = highest if config.eos_token_id == 2 else config.eos_token_id
    if tokenizer.eos_token_id != end:
        raise ConfigError(f"{rule}: it ends a text with id {tokenizer.eos_token_id}, the encoder looks for {end}")

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
    from finetune.cached import CachedTexts
    from finetune.frozen import Frozen
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
        weights: Frozen | None = None,
    ) -> None:
        """Freezes the text encoder. null: "empty_prompt" or "zero". weights: where a hollow text encoder has its own
        from when it computes. Raises ConfigError for another's tokenizer.
        """
        _check_pair(text_encoder, tokenizer)
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer, self.dropout, self.null, self.weights = tokenizer, dropout, null, weights
        self.width: int = text_encoder.config.hidden_size
        self.parameters_frozen = sum(p.numel() for p in text_encoder.parameters())
        self.truncated = 0
        """Captions encoded so far that were longer than the encoder reads."""
        self.stored: CachedTexts | None = None
        """Embeddings that are on the disk."""
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

    @property
    def reads(self) -> str:
        """What is read of the text encoder, and how: all that an embedding depends on beside weights and tokenizer."""
        return self.kind

    @property
    def modules(self) -> dict[str, Any]:
        """What another condition needs to read the same encoder."""
        return {"text_encoder": self.text_encoder, "tokenizer": self.tokenizer, "weights": self.weights}

    @property
    def device(self) -> torch.device:
        """Where the text encoder computes."""
        return self.text_encoder.device if self.weights is None else torch.device(self.weights.device)

    def load(self, why: str) -> None:
        """See that the text encoder has its weights, on its device."""
        if self.weights is not None:
            self.weights.fill(self.text_encoder, why=why)

    def put_aside(self) -> None:
        """Let the device have the text encoder's memory until it is needed again; only if embeddings are cached."""
        if self.weights is not None:
            self.weights.put_aside(self.text_encoder)

    def embeddings(self, texts: Sequence[str]) -> Tensor:
        """texts, each different -> [n, ...] float32 on the CPU, as training sees them."""
        parts = [texts[start : start + ENCODER_BATCH] for start in range(0, len(texts), ENCODER_BATCH)]
        rows = [self._encode([*part, *[""] * (ENCODER_BATCH - len(part))]).cpu()[: len(part)] for part in parts]
        return torch.cat(rows)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """texts -> [n, ...] float32 on the encoder's device. The encoder is frozen, so embeddings are remembered:
        on the disk, if they were cached, or in memory.

        Encoded in batches of one fixed shape, filled with empty prompts: matrix products round differently in batches
        of different sizes, and a text's embedding must not depend on what it came with or on what was remembered, or
        a resumed run would differ in the last bit.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        fresh = {} if self.stored is None else self.stored.read(new)
        new = [text for text in new if text not in fresh]
        for start in range(0, len(new), ENCODER_BATCH):
            part = new[start : start + ENCODER_BATCH]
            rows = self.embeddings(part)
            fresh.update(zip(part, rows, strict=True))
            for text, row in zip(part, rows, strict=True):
                if (len(self._cache) + 1) * row.nbytes <= CACHE_BYTES:
                    self._cache[text] = row.clone()  # not a view, which would keep the whole batch
        rows = [self._cache[text] if text in self._cache else fresh[text] for text in texts]
        return torch.stack(rows).to(self.device)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Tensor:
        self.load("to read texts")
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
            return self._read(self.text_encoder(tokens.input_ids.to(device))).float()

    def _read(self, output: Any) -> Tensor:
        raise NotImplementedError


class PooledText(Text):
    """{"class_labels": [B, D] float32}: the encoder's state at the end of the text, added to the time embedding."""

    kind = "pooled_text"
    argument = "class_labels"

    def _read(self, output: Any) -> Tensor:
        return output.pooler_output


class TextSequence(Text):
    """{"encoder_hidden_states": [B, L, D] float32}: the encoder's last states, read by cross-attention."""

    kind = "text"
    argument = "encoder_hidden_states"

    def _read(self, output: Any) -> Tensor:
        return output.last_hidden_state


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

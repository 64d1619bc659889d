"""Text as a condition, read by a CLIP text encoder, frozen or trained: pooled, or as a sequence."""

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
    """A CLIP text encoder; the embedding of the empty prompt, or zeros, stand for "no caption"."""

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
        """null: "empty_prompt" or "zero". Raises ConfigError for another's tokenizer.

        The text encoder is put into evaluation mode. It is not frozen here, as a pipeline around the live modules makes
        one of these around an encoder that is being trained.
        """
        _check_pair(text_encoder, tokenizer)
        self.text_encoder = text_encoder.eval()
        self.tokenizer, self.dropout, self.null = tokenizer, dropout, null
        self.width: int = text_encoder.config.hidden_size
        self.trained = False
        """Whether this run trains the encoder, or a LoRA in it: gradients then flow, and nothing is remembered."""
        self.truncated = 0
        """Captions encoded so far that were longer than the encoder reads."""
        self._cache: dict[str, Tensor] = {}

    @property
    def parameters_frozen(self) -> int:
        """Parameters of the text encoder that are not trained."""
        return sum(p.numel() for p in self.text_encoder.parameters() if not (self.trained and p.requires_grad))

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
        """texts -> [n, ...] float32 on the encoder's device. Those of a frozen encoder are remembered.

        Encoded in batches of one fixed shape, filled with empty prompts: matrix products round differently in batches
        of different sizes, and a text's embedding must not depend on what it came with or on what was remembered, or
        a resumed run would differ in the last bit. With gradients, nothing is remembered and the batch is encoded as
        it is, since filling it up would be paid in every step: the last bit of an embedding is then a function of the
        micro-batch, as everything in the UNet is anyway, and a resumed run has the same ones.
        """
        if self.trained and torch.is_grad_enabled():
            distinct = list(dict.fromkeys(texts))
            place = {text: row for row, text in enumerate(distinct)}
            return self._encode(distinct)[[place[text] for text in texts]]
        fresh: dict[str, Tensor] = {}
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        for start in range(0, len(new), ENCODER_BATCH):
            part = new[start : start + ENCODER_BATCH]
            with torch.no_grad():
                rows = self._encode(part + [""] * (ENCODER_BATCH - len(part))).cpu()
            fresh.update(zip(part, rows, strict=False))
            for text, row in zip(part, rows, strict=False):
                if not self.trained and (len(self._cache) + 1) * row.nbytes <= CACHE_BYTES:
                    self._cache[text] = row.clone()  # not a view, which would keep the whole batch
        rows = [self._cache[text] if text in self._cache else fresh[text] for text in texts]
        return torch.stack(rows).to(self.text_encoder.device)

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

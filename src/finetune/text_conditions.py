"""Text as a condition, read by a CLIP text encoder, frozen or trained: pooled, or as a sequence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.conditions import Condition, Single
from finetune.errors import ConfigError
from finetune.transfer import to_device

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

    from finetune.batching import Batch
    from finetune.cached import CachedTexts
    from finetune.conditioning import Conditioner
    from finetune.data import TrainData
    from finetune.frozen import Frozen
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
        weights: Frozen | None = None,
    ) -> None:
        """null: "empty_prompt" or "zero". weights: where a hollow text encoder has its own from when it computes.
        Raises ConfigError for another's tokenizer.

        The text encoder is put into evaluation mode. It is not frozen here, as a pipeline around the live modules makes
        one of these around an encoder that is being trained.
        """
        _check_pair(text_encoder, tokenizer)
        self.text_encoder = text_encoder.eval()
        self.tokenizer, self.dropout, self.null, self.weights = tokenizer, dropout, null, weights
        self.width = self._width(text_encoder.config)
        self.chunks = 1
        """Pieces of the encoder's length that a text is read in."""
        self.trained = False
        """Whether this run trains the encoder, or a LoRA in it: gradients then flow, and nothing is remembered."""
        self.truncated = 0
        """Captions encoded so far that were longer than the encoder reads."""
        self.stored: CachedTexts | None = None
        """Embeddings that are on the disk."""
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

    @property
    def reads(self) -> str:
        """What is read of the text encoder, and how: all that an embedding depends on beside weights and tokenizer."""
        return type(self).__name__

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

    @torch.no_grad()
    def embeddings(self, texts: Sequence[str]) -> Tensor:
        """texts, each different -> [n, ...] float32 on the CPU, as training sees them."""
        parts = [texts[start : start + ENCODER_BATCH] for start in range(0, len(texts), ENCODER_BATCH)]
        rows = [self._encode([*part, *[""] * (ENCODER_BATCH - len(part))]).cpu()[: len(part)] for part in parts]
        return torch.cat(rows)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """texts -> [n, ...] float32 on the encoder's device. Those of a frozen encoder are remembered: on the disk, if
        they were cached, or in memory.

        Encoded in batches of one fixed shape, filled with empty prompts: matrix products round differently in batches
        of different sizes, and a text's embedding must not depend on what it came with or on what was remembered, or
        a resumed run would differ in the last bit. With gradients, nothing is remembered and the batch is encoded as
        it is, since filling it up would be paid in every step: the last bit of an embedding is then a function of the
        micro-batch, as everything in the UNet is anyway, and a resumed run has the same ones.
        """
        if self.trained and torch.is_grad_enabled():
            distinct = list(dict.fromkeys(texts))
            place = {text: row for row, text in enumerate(distinct)}
            rows = torch.tensor([place[text] for text in texts])
            return (encoded := self._encode(distinct))[to_device(rows, encoded.device)]
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        fresh = {} if self.stored is None else self.stored.read(new)
        new = [text for text in new if text not in fresh]
        for text, row in zip(new, self.embeddings(new) if new else (), strict=True):
            fresh[text] = row
            if not self.trained and (len(self._cache) + 1) * row.nbytes <= CACHE_BYTES:
                self._cache[text] = row.clone()  # not a view, which would keep the whole batch
        rows = [self._cache[text] if text in self._cache else fresh[text] for text in texts]
        return to_device(torch.stack(rows), self.device)

    def _encode(self, texts: list[str]) -> Tensor:
        self.load("to read texts")
        for text, n in zip(texts, self.lengths(texts), strict=True):
            if n > self.longest:
                if not self.truncated:
                    log.warning("captions are cut to %d tokens of %d: %r", self.longest, n, text)
                self.truncated += 1
        # Padded to the full length without an attention mask, as StableDiffusionPipeline does.
        tokens = self.tokens(texts).flatten(0, 1)
        device = self.text_encoder.device
        with torch.autocast(device.type, enabled=False):  # the same embeddings in training and in sampling
            states = self._read(to_device(tokens, device)).float()
        return states if self.chunks == 1 else _joined(states, self.chunks)

    @property
    def longest(self) -> int:
        """Tokens of a text that are read, the start and the end among them."""
        return self.chunks * (self.tokenizer.model_max_length - 2) + 2

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, the start and the end among them."""
        return [len(ids) for ids in self.tokenizer(list(texts), verbose=False).input_ids]

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """texts -> [n, chunks, L] int64: each piece of up to L - 2 tokens as the tokenizer makes it of a text of its
        own: start, tokens, end, padding; as in sd-scripts. A piece that is left over is an empty text."""
        length, tokenizer = self.tokenizer.model_max_length, self.tokenizer
        rows = []
        for ids in tokenizer(list(texts), verbose=False).input_ids:
            start, end, words = ids[0], ids[-1], ids[1:-1]
            pieces = [words[at : at + length - 2] for at in range(0, self.chunks * (length - 2), length - 2)]
            padded = [[start, *piece, end] + [tokenizer.pad_token_id] * (length - 2 - len(piece)) for piece in pieces]
            rows.append(padded)
        return torch.tensor(rows)

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


class TextSequence(Text):
    """{"encoder_hidden_states": [B, L, D] float32}: the encoder's last states, read by cross-attention.

    A longer text is read in `chunks` pieces of L - 2 tokens (75 of CLIP's 77), each by itself, and every text in as
    many: [B, chunks * (L - 2) + 2, D]. As in sd-scripts, of the states at starts and ends those of the first start and
    of the last end are kept, and those between the pieces are not.
    """

    kind = "text"
    argument = "encoder_hidden_states"

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        *,
        chunks: int = 1,
        clip_skip: int | None = None,
        **options: Any,
    ) -> None:
        """chunks: pieces that a text is read in. clip_skip: the last layers to leave out. options: as of Text.

        Raises ConfigError for too many layers.
        """
        super().__init__(text_encoder, tokenizer, **options)
        self.chunks, self.clip_skip = chunks, clip_skip or 0
        if self.clip_skip >= (layers := text_encoder.config.num_hidden_layers):
            raise ConfigError(f"clip_skip must be below the {layers} layers of the text encoder, got {clip_skip}")

    @property
    def reads(self) -> str:
        """See `Text`."""
        return f"{super().reads}, {self.chunks} chunks, clip_skip {self.clip_skip}"

    def _read(self, ids: Tensor) -> Tensor:
        if not self.clip_skip:
            return self.text_encoder(ids).last_hidden_state
        # As StableDiffusionPipeline, which fails with transformers 5: the normalisation has moved there.
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states[-1 - self.clip_skip]
        return self.text_encoder.final_layer_norm(states)


def _joined(states: Tensor, chunks: int) -> Tensor:
    """[B * chunks, L, D] -> [B, chunks * (L - 2) + 2, D], see TextSequence."""
    pieces = states.unflatten(0, (-1, chunks))
    return torch.cat([pieces[:, 0, :1], pieces[:, :, 1:-1].flatten(1, 2), pieces[:, -1, -1:]], dim=1)


def with_token_facts(data: TrainData, conditioner: Conditioner) -> tuple[TrainData, set[str] | None]:
    """`data` with facts of how its captions fit the text encoder, in facts["captions"]: how many different `texts`
    there are, how many of them are `truncated`, and of `tokens` the limit and the longest; and these texts. As it is
    without captions, and for a stream, whose captions are not known before they come; and None then.
    """
    read = conditioner.parts.get("text") or conditioner.parts.get("pooled_text")
    if read is None or "captions" not in data.facts:
        return data, None
    text, texts = read.members[0], data.table.texts(data.rows)
    lengths = text.lengths(sorted(texts))
    facts = {
        "texts": len(lengths),
        "truncated": sum(n > text.longest for n in lengths),
        "tokens": {"limit": text.longest, "longest": max(lengths)},
    }
    return replace(data, facts=data.facts | {"captions": data.facts["captions"] | facts}), texts


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

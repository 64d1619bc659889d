"""From a batch to the keyword arguments of the UNet, with dropout for classifier-free guidance (Ho & Salimans 2022).

Training and sampling share these classes, so the unconditional case that guidance extrapolates from is the one that
was trained: the extra class index, or the embedding of the empty prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from finetune.errors import ConfigError, DataError
from finetune.pretrained import load_pretrained, load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

    from finetune.batching import Batch
    from finetune.config import TrainConfig
    from finetune.seeding import PositionRandom

log = logging.getLogger(__name__)

Condition = dict[str, Tensor]
"""Keyword arguments of the UNet: class_labels or encoder_hidden_states, one row per sample; empty for none."""

ENCODER_BATCH = 8  # captions are always encoded in batches of this shape: see _Text._embed
CACHE_BYTES = 256 << 20  # of embeddings kept in memory


class Conditioner(Protocol):
    """What the trainer and the pipelines need of a conditioning."""

    kind: str
    parameters_frozen: int

    def __call__(self, batch: Batch, random: PositionRandom) -> Condition:
        """The condition of a training batch, dropped for a share of the samples chosen by position in the run."""

    def condition(self, wanted: Sequence[Any]) -> Condition:
        """The condition of prompts or class labels, one row each."""

    def unconditional(self, n: int) -> Condition:
        """n rows of the unconditional case, the same that dropout trains."""


class Unconditional:
    """No condition: the UNet gets no further argument."""

    kind = "none"
    parameters_frozen = 0

    def __call__(self, batch: Batch, random: PositionRandom) -> Condition:
        """{}."""
        return {}

    def condition(self, wanted: Sequence[Any]) -> Condition:
        """{}."""
        return {}

    def unconditional(self, n: int) -> Condition:
        """{}."""
        return {}


class ClassLabel:
    """Class labels 0 .. num_classes - 1; the index num_classes stands for "no class"."""

    kind = "class_label"
    parameters_frozen = 0

    def __init__(
        self,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_classes, self.class_names, self.dropout, self.device = num_classes, class_names, dropout, device

    def __call__(self, batch: Batch, random: PositionRandom) -> Condition:
        """{"class_labels": [B] int64}. Raises DataError for a label that is no class."""
        labels = batch.class_labels
        assert labels is not None, "the data must give class labels"
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:  # num_classes itself means "no class"
            raise DataError(
                f"class labels must lie in 0..{self.num_classes - 1} (conditioning.num_classes {self.num_classes}), "
                f"got {int(labels.min())}..{int(labels.max())}: correct the labels, or raise conditioning.num_classes"
            )
        labels = labels.cpu().masked_fill(_dropped(random, self.dropout, len(labels)), self.num_classes)
        return {"class_labels": labels.to(self.device)}

    def condition(self, wanted: Sequence[int]) -> Condition:
        """{"class_labels": [n] int64}. Raises ConfigError for a label that is no class."""
        for label in wanted:
            if not 0 <= label < self.num_classes:
                raise ConfigError(f"class labels are 0..{self.num_classes - 1}, got {label}")
        return {"class_labels": torch.tensor(list(wanted), dtype=torch.int64, device=self.device)}

    def unconditional(self, n: int) -> Condition:
        """{"class_labels": [n]} of "no class"."""
        return {"class_labels": torch.full((n,), self.num_classes, device=self.device)}


class _Text:
    """A frozen CLIP text encoder; the embedding of the empty prompt stands for "no caption"."""

    kind: str
    argument: str  # of the UNet

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, *, dropout: float = 0.0) -> None:
        """Freezes the text encoder. Raises ConfigError if the tokenizer is not the encoder's."""
        _check_pair(text_encoder, tokenizer)
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer, self.dropout = tokenizer, dropout
        self.width: int = text_encoder.config.hidden_size
        self.parameters_frozen = sum(p.numel() for p in text_encoder.parameters())
        self.truncated = 0
        """Captions encoded so far that were longer than the encoder reads."""
        self._cache: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, random: PositionRandom) -> Condition:
        """The embeddings of the captions, the empty one where dropped."""
        assert batch.captions is not None, "the data must give captions"
        dropped = _dropped(random, self.dropout, len(batch.captions)).tolist()
        return self.condition(["" if drop else text for text, drop in zip(batch.captions, dropped, strict=True)])

    def condition(self, wanted: Sequence[str]) -> Condition:
        """The embeddings of prompts, one row each."""
        return {self.argument: self._embed(wanted)}

    def unconditional(self, n: int) -> Condition:
        """n times the embedding of the empty prompt."""
        return self.condition([""] * n)

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
            return self._read(self.text_encoder(tokens.input_ids.to(device))).float()

    def _read(self, output: Any) -> Tensor:
        raise NotImplementedError


class PooledText(_Text):
    """{"class_labels": [B, D] float32}: the encoder's state at the end of the text, added to the time embedding."""

    kind = "pooled_text"
    argument = "class_labels"

    def _read(self, output: Any) -> Tensor:
        return output.pooler_output


class TextSequence(_Text):
    """{"encoder_hidden_states": [B, L, D] float32}: the encoder's last states, read by cross-attention."""

    kind = "text"
    argument = "encoder_hidden_states"

    def _read(self, output: Any) -> Tensor:
        return output.last_hidden_state


def build_conditioner(
    cfg: TrainConfig, class_names: Sequence[str] | None = None, device: torch.device | str = "cpu"
) -> Conditioner:
    """The conditioner that cfg.conditioning names; class_names: those of the data, if it has any.

    Raises ConfigError if the number of classes is unknown or too small, or the text encoder cannot be loaded.
    """
    section = cfg.conditioning
    if section.kind == "none":
        return Unconditional()
    if section.kind == "class_label":
        named = len(class_names) if class_names is not None else 0
        num_classes = section.num_classes or named
        if not num_classes:
            raise ConfigError("conditioning.num_classes must be set: the data does not name its classes")
        if num_classes < named:
            raise ConfigError(f"conditioning.num_classes is {num_classes}, but the data has {named} classes: raise it")
        return ClassLabel(num_classes, class_names=class_names, dropout=section.condition_dropout, device=device)
    from transformers import CLIPTextModel

    tokenizer = load_tokenizer(
        section.tokenizer,
        setting="conditioning.tokenizer",
        revision=section.revision,
        subfolder=section.tokenizer_subfolder,
    )
    text_encoder = load_pretrained(
        CLIPTextModel,
        section.text_encoder,
        setting="conditioning.text_encoder",
        revision=section.revision,
        subfolder=section.text_encoder_subfolder,
    ).to(device)
    kinds = {"pooled_text": PooledText, "text": TextSequence}
    return kinds[section.kind](text_encoder, tokenizer, dropout=section.condition_dropout)


def _dropped(random: PositionRandom, rate: float, n: int) -> Tensor:
    """Which samples lose their condition -> [n] bool."""
    return random.uniform("condition_dropout") < rate if rate else torch.zeros(n, dtype=torch.bool)


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

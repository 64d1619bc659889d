"""From a batch to the keyword arguments of the UNet, with dropout for classifier-free guidance (Ho & Salimans 2022).

One condition, several at once, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from finetune.conditions import ClassLabel, Condition, LowRes, Single, Size, without
from finetune.config_choices import CONDITIONS, SDXL, Part, conditions
from finetune.errors import ConfigError
from finetune.frozen import Frozen
from finetune.pretrained import load_tokenizer
from finetune.sdxl_texts import sdxl_texts
from finetune.text_conditions import PooledText, Text, TextSequence

if TYPE_CHECKING:
    from transformers import CLIPTextModel

    from finetune.batching import Batch
    from finetune.config import TrainConfig
    from finetune.seeding import PositionRandom


class Conditioner(Protocol):
    """What the trainer and the pipelines need of a conditioning."""

    kind: str
    """none, or the kinds of its conditions joined by "+"."""
    parts: Mapping[str, Single]
    """Its conditions by their kind."""
    parameters_frozen: int

    def __call__(self, batch: Batch, random: PositionRandom) -> Condition:
        """The condition of a training batch, dropped for a share of the samples chosen by position in the run."""

    def of(self, batch: Batch) -> Condition:
        """The condition of every sample of a batch, as in training but without dropout and noise."""

    def condition(self, wanted: Any) -> Condition:
        """The condition that is asked for, one row each: prompts, labels, images, or several of them by kind."""

    def unconditional(self, n: int) -> Condition:
        """n rows of the unconditional case, the same that dropout trains."""

    def guided_from(self, condition: Condition) -> Condition:
        """What guidance extrapolates `condition` from."""


class Unconditional:
    """No condition: the UNet gets no further argument."""

    kind = "none"
    parameters_frozen = 0
    parts: Mapping[str, Single] = {}

    def __call__(self, batch: Batch, random: PositionRandom) -> Condition:
        """{}."""
        return {}

    def of(self, batch: Batch) -> Condition:
        """{}."""
        return {}

    def condition(self, wanted: Any) -> Condition:
        """{}."""
        return {}

    def unconditional(self, n: int) -> Condition:
        """{}."""
        return {}

    def guided_from(self, condition: Condition) -> Condition:
        """{}."""
        return {}


class Several:
    """Conditions side by side, each with its own rate of dropout and its own unconditional case."""

    def __init__(self, parts: Mapping[str, Single], *, dropout_draws: str = "joint") -> None:
        """parts: two or more, by kind. dropout_draws: joint, one draw per sample drops each condition whose rate lies
        above it; independent, one draw per sample and condition, as in generative-models.
        """
        self.parts, self.dropout_draws = dict(parts), dropout_draws
        self.kind = "+".join(parts)

    @property
    def parameters_frozen(self) -> int:
        """Of the text encoders, one that several read being counted once."""
        encoders = {id(text.text_encoder): text for text in texts_of(self)}
        return sum(text.parameters_frozen for text in encoders.values())

    def __call__(self, batch: Batch, random: PositionRandom) -> Condition:
        """The conditions of a training batch, dropped for shares of the samples chosen by position in the run."""
        found = {}
        for kind, part in self.parts.items():
            found[kind] = part.of(batch, random)
            if part.dropout:
                purpose = "condition_dropout" if self.dropout_draws == "joint" else f"condition_dropout {kind}"
                dropped = random.uniform(purpose) < part.dropout
                found[kind] = without(found[kind], part.unconditional(len(batch)), dropped)
        return self._joined(found)

    def of(self, batch: Batch) -> Condition:
        """The conditions of every sample of a batch, without dropout and noise."""
        return self._joined({kind: part.of(batch) for kind, part in self.parts.items()})

    def condition(self, wanted: Mapping[str, Any]) -> Condition:
        """The conditions of what is asked for by kind, one row each."""
        return self._joined({kind: part.condition(wanted[kind]) for kind, part in self.parts.items()})

    def unconditional(self, n: int) -> Condition:
        """n rows without any of the conditions."""
        return self._joined({kind: part.unconditional(n) for kind, part in self.parts.items()})

    def guided_from(self, condition: Condition) -> Condition:
        """`condition` without the parts that training dropped: a part that was never missing stays, so that guidance
        does not extrapolate from what the network has never seen. If none was dropped, without any of them.
        """
        n = len(next(iter(condition.values())))
        dropped = {kind: part for kind, part in self.parts.items() if part.dropout} or self.parts
        return condition | self._joined({kind: part.unconditional(n) for kind, part in dropped.items()})

    def _joined(self, found: Mapping[str, Condition]) -> Condition:
        """One Condition of all; the pooled text makes room for class labels, and lies beside sizes, as in SDXL."""
        joined: Condition = {}
        for kind, condition in found.items():
            moves = kind == "pooled_text" and pooled_is_added(self.parts)
            joined |= {"text_embeds": condition[PooledText.argument]} if moves else condition
        return joined


def pooled_is_added(kinds: Sequence[str] | Mapping[str, Any]) -> bool:
    """Whether the pooled text goes to a UNet2DConditionModel as SDXL's text_embeds, as class_labels it would alone."""
    return "pooled_text" in kinds and ("class_label" in kinds or "size" in kinds)


def assembled(parts: Mapping[str, Single], *, dropout_draws: str = "joint") -> Conditioner:
    """The conditioner of these conditions by kind: none, one alone, or several, in the order of CONDITIONS."""
    ordered = {kind: parts[kind] for kind in CONDITIONS if kind in parts}
    if len(ordered) < 2:
        return next(iter(ordered.values()), Unconditional())
    return Several(ordered, dropout_draws=dropout_draws)


def texts_of(conditioner: Conditioner) -> list[Text]:
    """All that reads a text with an encoder; SDXL's text sequence is two of them."""
    return [one for part in conditioner.parts.values() for one in part.members if isinstance(one, Text)]


def text_encoders(conditioner: Conditioner) -> dict[str, CLIPTextModel]:
    """The text encoders by the names that a pipeline gives them; the pooled text's own comes second."""
    parts = [conditioner.parts[kind] for kind in ("text", "pooled_text") if kind in conditioner.parts]
    found = [one.text_encoder for part in parts for one in part.members]
    return dict(zip(("text_encoder", "text_encoder_2"), dict.fromkeys(found), strict=False))


def build_conditioner(
    cfg: TrainConfig, class_names: Sequence[str] | None = None, device: torch.device | str = "cpu"
) -> Conditioner:
    """The conditioner that cfg.conditioning names; class_names: those of the data, if it has any.

    Raises ConfigError if the number of classes is unknown or too small, or a text encoder cannot be loaded.
    """
    several = cfg.conditioning.kind == "several"
    parts: dict[str, Single] = {}
    if cfg.conditioning.kind == "sdxl":
        return assembled(_sdxl(cfg.conditioning, device, hollow=cfg.cache.text))
    for kind, section in conditions(cfg.conditioning).items():
        setting = f"conditioning.{kind}" if several else "conditioning"
        if kind == "class_label":
            parts[kind] = _class_label(section, setting, class_names, device)
        elif kind == "low_res":
            parts[kind] = LowRes(
                channels=cfg.data.channels,
                side=cfg.data.resolution // section.factor,
                noise_augmentation=section.noise_augmentation,
                dropout=section.condition_dropout,
                device=device,
            )
        elif kind == "size":
            parts[kind] = Size(dropout=section.condition_dropout, device=device)
        else:
            known = parts.get("pooled_text") if several and _same_encoder(cfg) else None
            modules = known.modules if known else _text_modules(section, setting, device, hollow=cfg.cache.text)
            cls = {"pooled_text": PooledText, "text": TextSequence}[kind]
            further = {"chunks": section.chunks, "clip_skip": section.clip_skip} if kind == "text" else {}
            parts[kind] = cls(**modules, dropout=section.condition_dropout, null=section.null, **further)
    return assembled(parts, dropout_draws=cfg.conditioning.dropout_draws if several else "joint")


def _class_label(section: Part, setting: str, class_names: Sequence[str] | None, device: Any) -> ClassLabel:
    named = len(class_names) if class_names is not None else 0
    num_classes = section.num_classes or named
    if not num_classes:
        raise ConfigError(f"{setting}.num_classes must be set: the data does not name its classes")
    if num_classes < named:
        raise ConfigError(f"{setting}.num_classes is {num_classes}, but the data has {named} classes: raise it")
    return ClassLabel(
        num_classes,
        class_names=class_names,
        dropout=section.condition_dropout,
        null=section.null,
        trainable=section.trainable,
        device=device,
    )


def _sdxl(section: SDXL, device: Any, *, hollow: bool) -> dict[str, Single]:
    """The conditions of Stable Diffusion XL by kind."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    modules = []
    for cls, number in ((CLIPTextModel, ""), (CLIPTextModelWithProjection, "_2")):
        place = {"setting": "conditioning.pipeline", "revision": section.revision}
        tokenizer = load_tokenizer(section.pipeline, **place, subfolder=f"tokenizer{number}")
        place |= {"subfolder": f"text_encoder{number}", "variant": section.variant, "device": device}
        weights = Frozen(cls=cls, name=section.pipeline, **place)
        modules.append(_loaded(weights, tokenizer, hollow=hollow))
    texts = sdxl_texts(
        *modules,
        dropout=section.condition_dropout,
        null=section.null,
        clip_skip=section.clip_skip,
        chunks=section.chunks,
    )
    return texts | {"size": Size(device=device)}


def _same_encoder(cfg: TrainConfig) -> bool:
    """Whether the pooled text and the text sequence name one text encoder, which is then loaded once."""
    names = ("text_encoder", "tokenizer", "text_encoder_subfolder", "tokenizer_subfolder", "revision", "variant")
    pooled, text = cfg.conditioning.pooled_text, cfg.conditioning.text
    return None not in (pooled, text) and all(getattr(pooled, name) == getattr(text, name) for name in names)


def _text_modules(section: Part, setting: str, device: Any, *, hollow: bool) -> dict[str, Any]:
    """The text encoder and the tokenizer that a section names; hollow: the encoder is loaded when it computes."""
    from transformers import CLIPTextModel

    tokenizer = load_tokenizer(
        section.tokenizer,
        setting=f"{setting}.tokenizer",
        revision=section.revision,
        subfolder=section.tokenizer_subfolder,
    )
    weights = Frozen(
        cls=CLIPTextModel,
        name=section.text_encoder,
        setting=f"{setting}.text_encoder",
        revision=section.revision,
        subfolder=section.text_encoder_subfolder,
        variant=section.variant,
        device=device,
    )
    return _loaded(weights, tokenizer, hollow=hollow)


def _loaded(weights: Frozen, tokenizer: Any, *, hollow: bool) -> dict[str, Any]:
    """The modules of a text condition; hollow: the text encoder without its weights until it computes."""
    if hollow:
        return {"text_encoder": weights.hollow(), "tokenizer": tokenizer, "weights": weights}
    return {"text_encoder": weights.load(), "tokenizer": tokenizer}

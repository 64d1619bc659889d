"""LoRA: small matrices that are trained beside the frozen weights of the UNet, and of the text encoders. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from finetune.config_types import Count, Decay, Positive, section

if TYPE_CHECKING:
    from finetune.config import TrainConfig


@section
class Lora:
    """Train a LoRA (Hu et al. 2021) instead of the UNet's own weights, all of which stay frozen.

    Each chosen layer W x becomes W x + s B A x, with A of shape [rank, in] and B of [out, rank], which starts at zero.
    """

    rank: Count = 4
    """Rank of the matrices (4 as in diffusers' and sd-scripts' LoRA trainings)."""
    alpha: Positive | None = None
    """The scale s is alpha / rank; unset: alpha is the rank, hence s is 1, as in diffusers' scripts."""
    dropout: Decay = 0.0
    """Dropout on the input of A, in the UNet."""
    target: Literal["attention", "attention_ff", "all"] = "attention"
    """The layers of the UNet: attention: to_q, to_k, to_v, to_out (diffusers' scripts); attention_ff: besides, the feed
    forward layers of transformer blocks; all: every linear and convolutional layer."""
    use_rslora: bool = False
    """Rank-stabilised (Kalajdzievski 2023): the scale s is alpha / sqrt(rank), so that a higher rank learns as fast."""
    use_dora: bool = False
    """Weight-decomposed (Liu et al. 2024): besides, one magnitude per output channel is learned."""
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the frozen weights of the UNet's linear and convolutional layers are held: that of
    train.mixed_precision takes half the memory and trains bit for bit alike, as autocast rounds them in every step."""

    pretrained: str | None = None
    """Go on from this LoRA, of diffusers' or sd-scripts' naming: a .safetensors file, a folder or a Hub id. Its rank,
    scale and layers must be the ones set here; a setting that differs is named."""

    @property
    def scale(self) -> float:
        """s."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.use_rslora else self.rank)


def lora_contradictions(cfg: TrainConfig, *, text: bool) -> Iterator[tuple[str, str]]:
    """What does not go with an adapter or a trained text encoder, as (place, problem) pairs. text: there is one."""
    if cfg.lora is not None:
        if cfg.model.kind == "unet2d" and cfg.model.zero_init:
            yield "model.zero_init", "a LoRA beside weights that stay at zero learns nothing: use false"
        if cfg.ema.snapshot_every:
            yield "ema.snapshot_every", "`finetune ema` rebuilds whole UNets, not a LoRA: leave it unset"
        yield from _base_contradictions(cfg.lora, cfg.train.mixed_precision)
    trains = cfg.train.train_text_encoder
    if trains and not text and cfg.model.kind != "pretrained":
        yield "train.train_text_encoder", f"conditioning.kind is {cfg.conditioning.kind}, which has none: use false"
    if cfg.optimizer.text_encoder_lr is not None and not trains:
        yield "optimizer.text_encoder_lr", "the text encoder is frozen: set train.train_text_encoder, or leave it unset"


def _base_contradictions(lora: Lora, mixed_precision: str | None) -> Iterator[tuple[str, str]]:
    if lora.base_dtype == "float32":
        return
    rounded = {"bfloat16": "bf16", "float16": "fp16"}[lora.base_dtype]
    if mixed_precision != rounded:
        yield "lora.base_dtype", (
            f"{lora.base_dtype} is what autocast computes in with train.mixed_precision {rounded}, which is "
            f"{mixed_precision or 'unset'}: set it to {rounded}, or leave base_dtype at float32"
        )
    if lora.use_dora:
        yield "lora.base_dtype", "use_dora measures the base weights in float32: remove one of them"

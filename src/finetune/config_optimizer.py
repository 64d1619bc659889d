"""The section of the configuration that chooses the optimizer and its learning rate. Imports no torch.

All but adamw and adafactor need a package of their own, which is asked for before data are loaded (optimization.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from finetune.config_types import Count, CountOrZero, Decay, Float, Positive, PositiveOrZero, section

if TYPE_CHECKING:
    from finetune.config import Ema

PositiveDecay = Annotated[Float, Field(gt=0, lt=1)]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@section
class LearningRate:
    """What all optimizers have. Defaults of train_unconditional."""

    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    text_encoder_lr: Positive | None = None
    """Peak learning rate of the text encoder; unset: learning_rate."""
    lr_scheduler: Schedule = "cosine"
    """diffusers' schedule, a pure function of the optimizer step."""
    lr_warmup_steps: CountOrZero = 500
    """Optimizer steps of linear warm-up."""
    lr_num_cycles: Count | None = None
    """Hard restarts of cosine_with_restarts (unset: 1)."""
    lr_power: Positive | None = None
    """Power of polynomial (unset: 1)."""

    title: ClassVar[str]
    """What it is called in prose."""
    state_bytes: ClassVar[int]
    """Of its state, per trained parameter; rows, columns and block scales left out."""

    def state_size(self, shape: tuple[int, ...]) -> int:
        """Bytes of its state of a trained tensor of this shape, block scales left out."""
        return self.state_bytes * math.prod(shape)

    def __post_init__(self) -> None:
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                f"lr_scheduler constant has no warm-up, got lr_warmup_steps {self.lr_warmup_steps}: "
                "use constant_with_warmup, or set lr_warmup_steps to 0"
            )
        if self.lr_scheduler == "polynomial" and self.learning_rate <= 1e-7:
            raise ValueError(f"lr_scheduler polynomial ends at 1e-7: raise learning_rate {self.learning_rate}")
        if self.lr_num_cycles is not None and self.lr_scheduler != "cosine_with_restarts":
            raise ValueError("lr_num_cycles needs lr_scheduler cosine_with_restarts")
        if self.lr_power is not None and self.lr_scheduler != "polynomial":
            raise ValueError("lr_power needs lr_scheduler polynomial")

    @property
    def details(self) -> str:
        """Its other numbers, in prose."""
        raise NotImplementedError


@section
class AdamW(LearningRate):
    """torch's AdamW, fused. Defaults of train_unconditional."""

    kind: Literal["adamw"] = "adamw"
    adam_beta1: Decay = 0.95
    """Decay of the first moment."""
    adam_beta2: Decay = 0.999
    """Decay of the second moment."""
    adam_weight_decay: PositiveOrZero = 1e-6
    """Decoupled weight decay."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of the second moment."""

    title: ClassVar[str] = "AdamW"
    state_bytes: ClassVar[int] = 8

    @property
    def details(self) -> str:
        """Its other numbers, in prose."""
        return f"betas {self.adam_beta1:g} and {self.adam_beta2:g}, weight decay {self.adam_weight_decay:g}"


@section
class AdamW8bit(AdamW):
    """AdamW with its moments in 8 bits by blocks of 256 (Dettmers et al. 2022); needs the package bitsandbytes.

    Tensors of less than 4096 numbers keep theirs in float32.
    """

    kind: Literal["adamw_8bit"]

    title: ClassVar[str] = "8-bit AdamW"
    state_bytes: ClassVar[int] = 2


@section
class Adafactor(LearningRate):
    """Second moments of matrices kept as row and column means (Shazeer & Stern 2018), with the learning rate that is
    set here in place of its relative step. transformers' own."""

    kind: Literal["adafactor"]
    beta1: Decay | None = None
    """Decay of the first moment; unset: none is kept."""
    decay_rate: Annotated[Float, Field(lt=0)] = -0.8
    """The second moment's decay at step n is 1 - n ** decay_rate."""
    clip_threshold: Positive = 1.0
    """Root mean square above which the update of a tensor is scaled down."""
    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay."""

    title: ClassVar[str] = "Adafactor"

    @property
    def state_bytes(self) -> int:
        """Of its state, per trained parameter; rows and columns left out."""
        return 0 if self.beta1 is None else 4

    def state_size(self, shape: tuple[int, ...]) -> int:
        """As of the others. Of a 3x3 convolution, rows and columns together are two thirds of its numbers."""
        factored = math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1])) if len(shape) > 1 else math.prod(shape)
        return 4 * factored + super().state_size(shape)

    @property
    def details(self) -> str:
        """Its other numbers, in prose."""
        moment = "no first moment" if self.beta1 is None else f"beta1 {self.beta1:g}"
        return f"{moment}, weight decay {self.weight_decay:g}"


@section
class Lion(LearningRate):
    """Steps by the sign of a momentum (Chen et al. 2023); needs the package lion-pytorch, whose defaults these are.

    Its authors take a learning rate 3 to 10 times lower than AdamW's, and a weight decay as many times higher.
    """

    kind: Literal["lion"]
    beta1: Decay = 0.9
    """Share of the momentum in a step."""
    beta2: Decay = 0.99
    """Decay of the momentum."""
    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay."""

    title: ClassVar[str] = "Lion"
    state_bytes: ClassVar[int] = 4

    @property
    def details(self) -> str:
        """Its other numbers, in prose."""
        return f"betas {self.beta1:g} and {self.beta2:g}, weight decay {self.weight_decay:g}"


@section
class Prodigy(AdamW):
    """Adam that finds its step size itself (Mishchenko & Defazio 2023); needs the package prodigyopt.

    Defaults of diffusers' train_dreambooth_lora_sdxl_advanced. It keeps the weights that it began with.
    """

    kind: Literal["prodigy"]
    learning_rate: Positive = 1.0
    """Factor of the step size that it finds: 1."""
    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_weight_decay: PositiveOrZero = 1e-4
    """Weight decay."""
    beta3: Decay | None = None
    """Decay of the running sums that the step size is found by (unset: the root of adam_beta2)."""
    decouple: bool = True
    """Weight decay as in AdamW; false: added to the gradient."""
    use_bias_correction: bool = True
    """Adam's correction of the first steps."""
    safeguard_warmup: bool = True
    """Keep a warm-up of the learning rate from raising the step size that is found."""
    d_coef: Positive = 1.0
    """Factor of the estimate of the step size: 0.5 and 2 are usual."""

    title: ClassVar[str] = "Prodigy"
    state_bytes: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate < 0.1:
            raise ValueError(
                f"learning_rate {self.learning_rate:g} is that of another optimizer: prodigy multiplies the step size "
                "that it finds by it. Remove it, which means 1, or tune d_coef"
            )


@section
class ScheduleFreeAdamW(AdamW):
    """AdamW whose average of the weights stands in for a decaying learning rate (Defazio et al. 2024); needs the
    package schedulefree. Samples and export take that average; checkpoints hold the point that is trained."""

    kind: Literal["schedule_free_adamw"]
    lr_scheduler: Literal["constant", "constant_with_warmup"] = "constant_with_warmup"
    """The learning rate after the warm-up stays as it is."""
    adam_beta1: PositiveDecay = 0.9
    """Where gradients are taken: share of the average, the rest is of the fast weights."""
    adam_weight_decay: PositiveOrZero = 0.0
    """Weight decay."""

    title: ClassVar[str] = "schedule-free AdamW"
    state_bytes: ClassVar[int] = 8


def _kind(given: object) -> str | None:
    """The kind of a section given as a mapping or as itself; a mapping without one is what it always was, AdamW."""
    return given.get("kind", "adamw") if isinstance(given, dict) else getattr(given, "kind", None)


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[AdamW8bit, Tag("adamw_8bit")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[Lion, Tag("lion")]
    | Annotated[Prodigy, Tag("prodigy")]
    | Annotated[ScheduleFreeAdamW, Tag("schedule_free_adamw")],
    Discriminator(_kind),
]


def optimizer_contradictions(optimizer: Optimizer, ema: Ema) -> Iterator[tuple[str, str]]:
    """Rules between this section and others, as (place, problem) pairs."""
    if optimizer.kind == "prodigy" and optimizer.text_encoder_lr is not None:
        yield "optimizer.text_encoder_lr", "prodigy finds one step size for all that is trained: remove it"
    if optimizer.kind == "schedule_free_adamw" and ema.use_ema:
        yield "ema.use_ema", (
            "optimizer.kind schedule_free_adamw averages the weights itself, and that average is sampled and exported: "
            "remove use_ema"
        )

"""The section of the configuration that says how long, in which batches and by which kernels. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator

from finetune.config_types import Count, Positive, PositiveOrZero, Words, section

if TYPE_CHECKING:
    from finetune.config_optimizer import Optimizer

FORMER_COMPILE = {"false": "off", "true": "unet"}
"""What train.compile is called today, by what it was when it could only be on or off."""
BLOCK = re.compile(r"(down_blocks|up_blocks)\.\d+|mid_block")


def _as_called_today(value: object) -> object:
    return FORMER_COMPILE.get(str(value).lower(), value)


@section
class Train:
    """How long, in which batches and in which precision. Everything is counted in optimizer steps."""

    max_train_steps: Count | None = None
    """Optimizer steps of the whole run; overrides num_train_epochs."""
    num_train_epochs: Count = 100
    """Passes over the data (100 as in train_unconditional); the step count is rounded up."""
    global_batch_size: Count | None = None
    """Images per optimizer step over all processes and accumulation; unset: derived from train_batch_size."""
    train_batch_size: Count | None = None
    """Images per process and micro-step (16 as in train_unconditional, if global_batch_size is unset too)."""
    gradient_accumulation_steps: Count | None = None
    """Micro-steps per optimizer step; unset: what `accelerate launch` says, else 1."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the network; unset: what `accelerate launch` says. Trained weights stay float32."""
    max_grad_norm: PositiveOrZero = 1.0
    """Gradient norm above which gradients are scaled down (1.0 as in train_unconditional); 0: no clipping."""
    max_nonfinite_steps: Count = 10
    """Stop with exit code 3 after this many steps in a row with a NaN or infinite loss or gradient."""
    timeout_minutes: Positive = 10.0
    """A step that waits for another process or for samples this long ends the run; half as long, and stderr shows where
    each thread stands. Checking data, drawing and saving take what they need."""
    gradient_checkpointing: bool | Words = False
    """Recompute activations in the backward pass: less memory, up to half more time. true: of all blocks of the
    UNet; or of some, such as [down_blocks.0, up_blocks.3], which hold most of them, in less time."""
    fused_backward: bool = False
    """Take the optimizer's step of each parameter in the backward pass, and free its gradient at once: 4 bytes less per
    trained parameter, as full SDXL on one card needs. One process, max_grad_norm 0, no accumulation, no fp16."""
    train_text_encoder: bool = False
    """Train the text encoder too: all of it or, with the section lora, a LoRA on its attention."""
    channels_last: bool = False
    """Memory format of the UNet: faster on GPUs with tensor cores, not on CPUs."""
    compile: Annotated[Literal["off", "unet", "blocks"], BeforeValidator(_as_called_today)] = "off"
    """torch.compile for the training, of the whole UNet or of its repeated layers (residual blocks, transformers), each
    shape once; samples and validation are computed without. The plan says after how many steps it has paid off."""
    cuda_graphs: bool = False
    """Replay each pass of the compiled UNet as one CUDA graph: for small batches, where the GPU waits for the launch of
    its kernels. Shapes must not change. By torch's documentation; not run on a GPU by us."""
    allow_tf32: bool = False
    """TensorFloat-32 matrix products on Ampere and later."""
    cudnn_benchmark: bool = False
    """cuDNN tries its convolutions at the start of a run and takes the fastest: for shapes that do not change. Which
    that is may differ from start to start."""
    sdpa_backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """The kernel of the UNet's attention; auto: torch chooses. What it cannot take of the frozen models, such as the
    masks of a text encoder, goes by efficient or math."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """Send gradients between processes in bfloat16: half the bytes, rounded to 3 digits. For DDP on slow networks."""
    deterministic: bool = False
    """Only kernels that add in a fixed order: slower on a GPU, where a resume is bit for bit only with it."""

    def __post_init__(self) -> None:
        if self.global_batch_size is not None and self.train_batch_size is not None:
            raise ValueError(
                f"train.global_batch_size ({self.global_batch_size}, over all processes) and train.train_batch_size "
                f"({self.train_batch_size}, per process) both set the batch: give one of them"
            )
        if self.cuda_graphs and self.compile != "unet":
            raise ValueError(f"cuda_graphs needs compile unet, not {self.compile}: set both, or neither")
        if self.cudnn_benchmark and self.deterministic:
            raise ValueError("cudnn_benchmark may choose other kernels each time: not with deterministic")
        if not isinstance(self.gradient_checkpointing, bool):
            names = self.gradient_checkpointing
            if not names or not all(map(BLOCK.fullmatch, names)):
                raise ValueError(
                    f"gradient_checkpointing {' '.join(names) or '[]'}: use true, false, or names of blocks such as "
                    "down_blocks.0, mid_block and up_blocks.3"
                )


def train_contradictions(train: Train, buckets: str) -> Iterator[tuple[str, str]]:
    """Rules between this section and data.buckets, as (place, problem) pairs."""
    if train.cuda_graphs and buckets != "none":
        yield "train.cuda_graphs", "a graph replays one shape, and data.buckets make several: use data.buckets none"


def fused_backward_contradictions(train: Train, optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    """Rules between train.fused_backward and other settings, as (place, problem) pairs."""
    if not train.fused_backward:
        return
    rule = "train.fused_backward frees each gradient as soon as it is used"
    if train.max_grad_norm:
        yield "train.max_grad_norm", f"{train.max_grad_norm:g} needs the norm of all gradients, but {rule}: use 0"
    if (steps := train.gradient_accumulation_steps or 1) > 1:
        yield "train.gradient_accumulation_steps", (
            f"{steps} add up gradients, but {rule}: use 1, with a smaller batch or train.gradient_checkpointing"
        )
    if train.mixed_precision == "fp16":
        yield "train.mixed_precision", f"fp16 looks for an overflow in all gradients, but {rule}: use bf16 or no"
    if optimizer.kind in ("prodigy", "schedule_free_adamw"):
        yield "optimizer.kind", (
            f"a step of {optimizer.kind} needs all gradients, but {rule}: use adafactor, adamw, adamw_8bit or lion"
        )

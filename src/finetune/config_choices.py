"""The choices of a run, told apart by `kind`: space, conditioning and model. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune.config_types import Count, Fraction, Words, section


@section
class PixelSpace:
    """Train on the pixels themselves."""

    kind: Literal["pixel"] = "pixel"


@section
class LatentSpace:
    """Train on the latents of a frozen AutoencoderKL."""

    kind: Literal["latent"]
    vae: str
    """The VAE: a local folder or a Hub id."""
    subfolder: str | None = None
    """Folder of the VAE inside a pipeline (usually "vae")."""
    revision: str | None = None
    """Branch, tag or commit of a VAE on the Hub."""


Space = Annotated[PixelSpace | LatentSpace, Field(discriminator="kind")]


@section
class Unconditional:
    """No condition."""

    kind: Literal["none"] = "none"


@section
class ClassLabel:
    """Class labels, embedded and added to the time embedding; one more index stands for "no class"."""

    kind: Literal["class_label"]
    num_classes: Count | None = None
    """Number of classes; unset: as many as the data names."""
    condition_dropout: Fraction = 0.1
    """Share of samples trained without their label, for guidance (Ho & Salimans 2022 use 0.1 to 0.2)."""


@section
class PooledText:
    """The pooled embedding of a frozen CLIP text encoder, added to the time embedding."""

    kind: Literal["pooled_text"]
    text_encoder: str
    """The CLIPTextModel: a local folder or a Hub id. The empty prompt stands for "no caption"."""
    tokenizer: str
    """Its CLIPTokenizer: a local folder or a Hub id."""
    text_encoder_subfolder: str | None = None
    """Folder of the text encoder inside a pipeline."""
    tokenizer_subfolder: str | None = None
    """Folder of the tokenizer inside a pipeline."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    condition_dropout: Fraction = 0.1
    """Share of samples trained with the empty prompt, for guidance (Ho & Salimans 2022 use 0.1 to 0.2)."""


@section
class TextSequence(PooledText):
    """The token sequence of a frozen CLIP text encoder, read by cross-attention (needs model.kind unet2d_condition)."""

    kind: Literal["text"]


Conditioning = Annotated[Unconditional | ClassLabel | PooledText | TextSequence, Field(discriminator="kind")]


@section
class UNet2D:
    """A new diffusers UNet2DModel. The defaults are train_unconditional's 114 M parameters.

    Channels, sample size and the class embedding follow from the space and the conditioning.
    """

    kind: Literal["unet2d"] = "unet2d"
    block_out_channels: tuple[Count, ...] = (128, 128, 256, 256, 512, 512)
    """Channels of each level, from the finest to the coarsest."""
    layers_per_block: Count = 2
    """Residual layers per level."""
    down_block_types: Words = (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D")
    """diffusers' block of each level on the way down."""
    up_block_types: Words = ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4)
    """diffusers' block of each level on the way up."""
    attention_head_dim: Count | None = 8
    """Channels per attention head; null: one head."""
    norm_num_groups: Count = 32
    """Groups of the group normalisation; must divide every block_out_channels."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How the time embedding enters: added, or as scale and shift (Nichol & Dhariwal 2021)."""
    time_embedding_dim: Count | None = None
    """Width of the time embedding; unset: 4 x the first block_out_channels, or the width of the pooled text."""
    add_attention: bool = True
    """Attention in the middle block."""
    dropout: Fraction = 0.0
    """Dropout in the residual layers."""
    num_heads: Count | None = None
    """Number of attention heads at every level (improved-diffusion's 4); needs attention_head_dim null."""
    zero_init: bool = False
    """Start the last convolution, the second of each residual layer and the attention projections at zero, as
    improved-diffusion."""


@section
class UNet2DCondition:
    """A new diffusers UNet2DConditionModel. The defaults are those of Stable Diffusion 1.x (860 M parameters).

    Channels, sample size, cross-attention width and the class embedding follow from the space and the conditioning.
    """

    kind: Literal["unet2d_condition"]
    block_out_channels: tuple[Count, ...] = (320, 640, 1280, 1280)
    """Channels of each level, from the finest to the coarsest."""
    layers_per_block: Count = 2
    """Residual layers per level."""
    down_block_types: Words = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    """diffusers' block of each level on the way down."""
    up_block_types: Words = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    """diffusers' block of each level on the way up."""
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] = "UNetMidBlock2DCrossAttn"
    """diffusers' middle block."""
    attention_head_dim: Count = 8
    """Number of attention heads (diffusers' historical name for it)."""
    norm_num_groups: Count = 32
    """Groups of the group normalisation; must divide every block_out_channels."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How the time embedding enters: added, or as scale and shift."""
    dropout: Fraction = 0.0
    """Dropout in the residual layers."""


@section
class Pretrained:
    """The UNet of an existing pipeline or UNet folder, trained on. Space and conditioning must be the ones it has."""

    kind: Literal["pretrained"]
    pretrained_model_name_or_path: str
    """A local folder or a Hub id that holds a UNet2DModel or UNet2DConditionModel."""
    subfolder: str | None = "unet"
    """Folder of the UNet inside the pipeline; null: the folder itself."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    variant: str | None = None
    """Weights' variant, such as fp16; trained in float32 all the same."""


Model = Annotated[UNet2D | UNet2DCondition | Pretrained, Field(discriminator="kind")]

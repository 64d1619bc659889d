"""The choices of a run, told apart by `kind`: space, conditioning and model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune.config_foundation import SDXL, AutoConditioning, AutoSpace
from finetune.config_types import Count, CountOrZero, Fraction, Int, PositiveOrZero, Words, section


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
    variant: str | None = None
    """Weights' variant, such as fp16; used in float32 all the same."""


Space = Annotated[AutoSpace | PixelSpace | LatentSpace, Field(discriminator="kind")]


@section
class Unconditional:
    """No condition."""

    kind: Literal["none"] = "none"


@section
class LabelCondition:
    """Class labels, embedded and added to the time embedding."""

    num_classes: Count | None = None
    """Number of classes; unset: as many as the data names."""
    condition_dropout: Fraction = 0.1
    """Share of samples trained without their label, for guidance (Ho & Salimans 2022 use 0.1 to 0.2)."""
    null: Literal["index", "zero"] = "index"
    """What stands for "no class": one more learned embedding, or the embedding zero, which is not learned."""
    trainable: bool = True
    """Learn the embeddings of the classes; false: they stay as they start."""


@section
class ClassLabel(LabelCondition):
    """Class labels, embedded and added to the time embedding; one more index stands for "no class"."""

    kind: Literal["class_label"]


@section
class TextCondition:
    """A text, read by a frozen CLIP text encoder."""

    text_encoder: str
    """The CLIPTextModel: a local folder or a Hub id."""
    tokenizer: str
    """Its CLIPTokenizer: a local folder or a Hub id."""
    text_encoder_subfolder: str | None = None
    """Folder of the text encoder inside a pipeline."""
    tokenizer_subfolder: str | None = None
    """Folder of the tokenizer inside a pipeline."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    variant: str | None = None
    """Weights' variant, such as fp16; used in float32 all the same."""
    condition_dropout: Fraction = 0.1
    """Share of samples trained without their caption, for guidance (Ho & Salimans 2022 use 0.1 to 0.2)."""
    null: Literal["empty_prompt", "zero"] = "empty_prompt"
    """What stands for "no caption": the embedding of the empty prompt, or zeros (generative-models)."""


@section
class SequenceCondition(TextCondition):
    """A text, read by a frozen CLIP text encoder, token by token."""

    chunks: Count = 1
    """Text is read in up to so many pieces of 75 tokens, as sd-scripts' max_token_length 150 and 225 (2 and 3); what is
    longer is cut. Above 1 the export is a UNetPipeline, as StableDiffusionPipeline cuts prompts to one."""
    clip_skip: CountOrZero | None = None
    """Layers left out at the end, as in StableDiffusionPipeline: 1, the last one (sd-scripts' clip_skip 2); unset:
    none. The final normalisation is applied in any case."""


@section
class PooledText(TextCondition):
    """The pooled embedding of a frozen CLIP text encoder, added to the time embedding."""

    kind: Literal["pooled_text"]


@section
class TextSequence(SequenceCondition):
    """The token sequence of a frozen CLIP text encoder, read by cross-attention (needs model.kind unet2d_condition)."""

    kind: Literal["text"]


@section
class LowResCondition:
    """Super-resolution: the small image, enlarged bilinearly and concatenated to the network's input.

    It is made from the training image by averaging (Nichol & Dhariwal 2021), or read from data.low_res_column. Zeros
    stand for "no small image".
    """

    factor: Annotated[Int, Field(ge=2)] = 4
    """Side of the training image over that of the small one."""
    noise_augmentation: PositiveOrZero = 0.0
    """Largest std of noise added to the small image: drawn uniformly per sample, and not told to the network."""
    condition_dropout: Fraction = 0.0
    """Share of samples trained without the small image; with 0, guidance by other conditions keeps it."""


@section
class LowRes(LowResCondition):
    """Super-resolution: the small image, enlarged bilinearly and concatenated to the network's input."""

    kind: Literal["low_res"]


@section
class SizeCondition:
    """Micro-conditioning of SDXL (Podell et al. 2023): original size, corner of the crop, target size.

    Embedded and added to the time embedding (needs model.kind unet2d_condition). Zeros stand for "no sizes".
    """

    condition_dropout: Fraction = 0.0
    """Share of samples trained without their sizes; with 0, guidance by other conditions keeps them."""


@section
class Several:
    """Several conditions at once, each a section of its own."""

    kind: Literal["several"]
    class_label: LabelCondition | None = None
    pooled_text: TextCondition | None = None
    text: SequenceCondition | None = None
    low_res: LowResCondition | None = None
    size: SizeCondition | None = None
    dropout_draws: Literal["joint", "independent"] = "joint"
    """joint: one draw per sample drops each condition whose rate lies above it, so that all go together as often as
    the lowest rate says; independent: one draw per condition (generative-models), all with the product of the rates."""

    def __post_init__(self) -> None:
        if not conditions(self):
            raise ValueError(f"kind several needs at least one of {', '.join(CONDITIONS)}: add a section")


Conditioning = Annotated[
    AutoConditioning | Unconditional | ClassLabel | PooledText | TextSequence | LowRes | Several | SDXL,
    Field(discriminator="kind"),
]
CONDITIONS = ("class_label", "pooled_text", "text", "low_res", "size")
Part = LabelCondition | TextCondition | SequenceCondition | LowResCondition | SizeCondition | SDXL


def conditions(conditioning: Conditioning) -> dict[str, Part]:
    """The conditions of a run by their kind, in a fixed order: none, one or several; none of auto."""
    if conditioning.kind == "sdxl":
        return {"pooled_text": conditioning, "text": conditioning, "size": SizeCondition()}
    if conditioning.kind == "several":
        parts = {name: getattr(conditioning, name) for name in CONDITIONS}
        return {name: part for name, part in parts.items() if part is not None}
    return {} if conditioning.kind in ("auto", "none") else {conditioning.kind: conditioning}


def unet2d_contradictions(parts: dict[str, Part]) -> Iterator[tuple[str, str]]:
    """The conditions that a new UNet2DModel cannot take, as (place, problem) pairs."""
    if "text" in parts:
        yield "conditioning.kind", (
            "a UNet2DModel has no cross-attention to read a text sequence with: use conditioning.kind pooled_text, "
            "or model.kind unet2d_condition"
        )
    if {"class_label", "pooled_text"} <= parts.keys():
        yield "conditioning.pooled_text", (
            "a UNet2DModel has one class embedding, for either class_label or pooled_text: remove one of them, or use "
            "model.kind unet2d_condition"
        )
    if "size" in parts:
        yield "conditioning.size", (
            "a UNet2DModel has no embedding of sizes: remove it, or use model.kind unet2d_condition"
        )


def low_res_contradictions(
    parts: dict[str, Part], resolution: int, column: str | None, preparation: str, asked: bool
) -> Iterator[tuple[str, str]]:
    """What of the data does not go with super-resolution, as (place, problem) pairs."""
    if "low_res" not in parts:
        if column is not None:
            yield "data.low_res_column", "there is no condition low_res, which would read it: remove it"
        return
    if asked:
        yield "sample.prompts", (
            "with low_res among the conditions, the samples are training samples, drawn by their own captions and "
            "classes: remove sample.prompts and sample.class_labels"
        )
    factor = parts["low_res"].factor
    if resolution % factor:
        yield "data.resolution", (
            f"{resolution} must be a multiple of the factor of conditioning low_res, {factor}: use "
            f"{-(-resolution // factor) * factor}"
        )
    if column is not None and preparation == "iddpm":
        yield "data.preparation", (
            "iddpm rounds sizes, so that a small image of data.low_res_column would not lie on the large one: use "
            "standard"
        )


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
    """The UNet of an existing pipeline or UNet folder, trained on. Of a pipeline (model_index.json), space,
    conditioning and the noise of the objective are taken too; what is written of them must fit the UNet."""

    kind: Literal["pretrained"]
    pretrained_model_name_or_path: str
    """A local folder or a Hub id that holds a UNet2DModel or UNet2DConditionModel; or a whole Stable Diffusion in one
    local .safetensors file."""
    single_file_config: str | None = None
    """Of a single file: the pipeline whose shapes, tokenizers and scheduler it has, a folder or a Hub id."""
    subfolder: str | None = "unet"
    """Folder of the UNet inside the pipeline; null: the folder itself."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    variant: str | None = None
    """Variant of the weights, such as fp16, of all parts; in float32 all the same."""
    change_objective: bool = False
    """Train on with another prediction or noise than the pipeline's scheduler states, from weights made for that."""


Model = Annotated[UNet2D | UNet2DCondition | Pretrained, Field(discriminator="kind")]

"""The section of the configuration that says what of the frozen models is computed once and kept on the disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Literal

from finetune.config_types import section

if TYPE_CHECKING:
    from finetune.config_data import Data


@section
class Cache:
    """What the frozen VAE and text encoders make of the data, computed once and kept on the disk for every run."""

    latents: bool = False
    """Keep the posterior's mean and log-variance of each image and crop; every step still draws its own sample."""
    text: bool = False
    """Keep the embedding of each different caption, and of the empty one."""
    folder: str | None = None
    """Where they are kept; unset: finetune/cache under HF_HOME."""
    dtype: Literal["float16", "float32"] | None = None
    """Numbers are kept in this precision (unset: float16, half the space and reading)."""

    def __post_init__(self) -> None:
        for name in ("folder", "dtype"):
            if getattr(self, name) is not None and not (self.latents or self.text):
                raise ValueError(
                    f"cache.{name} is {getattr(self, name)}, but nothing is cached: set cache.latents or cache.text "
                    "true, or remove it"
                )

    @property
    def stored_dtype(self) -> str:
        """dtype, or its default."""
        return self.dtype or "float16"


def cache_contradictions(
    cache: Cache,
    data: Data,
    space_kind: str,
    conditions: Collection[str] | None,
    *,
    words_change: bool,
    text_trained: bool,
) -> Iterator[tuple[str, str]]:
    """What a cache cannot be of, as (place, problem) pairs; conditions: the kinds of the conditioning, None while a
    pretrained pipeline has to say them; words_change: whether the tags of a caption are shuffled or dropped;
    text_trained: whether the text encoder is trained."""
    streaming = "keeps rows by number, which a stream does not check beforehand: remove data.streaming, or the cache"
    if cache.latents:
        if space_kind == "pixel":
            yield "cache.latents", f"space.kind is {space_kind}, which has no latents: remove it, or use a VAE"
        if data.variants is None and not data.is_deterministic:
            yield "cache.latents", (
                "every epoch has new crops or flips, so that no latent would be used twice: set data.variants to the "
                "number of them that each image gets, such as 4, or data.center_crop true and data.random_flip false"
            )
        if data.streaming:
            yield "cache.latents", streaming
        if data.masked:
            yield "cache.latents", (
                "a mask is cut with its image in every step, and cached latents look at no image: remove "
                "data.mask_column or data.alpha_mask, or the cache"
            )
        for reader in sorted({"low_res", "inpaint"} & set(conditions or ())):
            yield "cache.latents", (
                f"conditioning {reader} reads the pixels of each image, which are not looked at with cached latents: "
                "remove one of them"
            )
    if cache.text:
        if conditions is not None and not {"text", "pooled_text"} & set(conditions):
            yield "cache.text", "there is no text among the conditions, hence nothing to keep: remove it"
        if data.streaming:
            yield "cache.text", streaming
        if words_change:
            yield "cache.text", (
                "captions.shuffle and captions.tag_dropout make new captions in every epoch, so that no embedding "
                "would be used twice: remove them, or cache.text"
            )
        if text_trained:
            yield "cache.text", "train.train_text_encoder changes the embeddings in every step: remove one of them"

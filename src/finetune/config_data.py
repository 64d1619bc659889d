"""The section of the configuration that says where the images come from and how they become samples."""

from __future__ import annotations

import re
from typing import Literal

from finetune.config_types import Count, CountOrZero, Decay, Positive, Words, section

PACK = "pack the images into Parquet with datasets (load_dataset('imagefolder', ...), embed_table_storage, to_parquet)"
"""How data become shards that can be streamed: the way out of what is refused."""
SHUFFLE_BUFFER_SIZE = 5000


@section
class Data:
    """Where the images come from and how they become samples."""

    dataset_name: str | None = None
    """Data set: a Hub id, or the path of a local folder, saved data set, Parquet, Arrow, CSV or JSON file."""
    train_data_dir: str | None = None
    """Local folder of images: flat, class sub-folders, metadata.jsonl or .csv, or a.jpg beside a.txt; or, unless
    conditioning has class_label, sub-folders 10_name, each image of which comes 10 times per epoch (sd-scripts)."""
    dataset_config: str | None = None
    """sd-scripts' dataset_config, a TOML file that lists folders of images, their repeats and captions."""
    dataset_config_name: str | None = None
    """Configuration of a Hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    split: str = "train"
    """Split to train on."""
    streaming: bool = False
    """Read Parquet shards a row group at a time while training, instead of loading and checking all rows before it."""
    shuffle_buffer_size: Count | None = None
    """Streaming: rows, as they are stored, that each loader process holds in memory; half as many are mixed at a time
    (unset: 5000, as in open_clip; at least one row group)."""
    image_column: str = "image"
    """Column that holds the images."""
    caption_column: str | Words = "text"
    """Column(s) that hold the captions; of several, or of a list in one cell, one is drawn per epoch and row."""
    instance_prompt: str | None = None
    """The caption of every image, in place of a column: such as "a photo of sks dog"."""
    label_column: str = "label"
    """Column that holds the class labels."""
    label_from_filename: bool = False
    """Take the class from the file name, up to its first "_", instead of label_column (improved-diffusion)."""
    low_res_column: str | None = None
    """Column that holds the small images of conditioning low_res; unset: they are made from the large ones."""
    mask_column: str | None = None
    """Column that holds the masks of a masked loss, of the size of their images: white counts, black does not."""
    alpha_mask: bool = False
    """Masked loss by the images' own transparency: what is transparent does not count; an opaque image counts whole."""
    unmasked_weight: Decay = 0.0
    """Masked loss: how much counts at least what a mask leaves out."""
    max_train_samples: Count | None = None
    """Use only this many rows, drawn by the seed; streaming: whole row groups, of the last one a part."""
    resolution: Count
    """Side of the square training image, in pixels; with buckets, the square has about as many pixels as each shape."""
    buckets: Literal["none", "auto"] = "none"
    """Shapes of the training images. none: the square; auto: all that have resolution^2 pixels up to a tenth more or
    less. Each image comes in the one that crops it least, each global batch is of one shape."""
    bucket_step: Count | None = None
    """Sides of the buckets are multiples of this, in pixels; it divides the resolution, and VAE and UNet can reduce it.
    Unset: the smallest from a 16th of the resolution (64 at 1024, as in SDXL). Larger: fewer buckets, larger crops."""
    bucket_min_side: Count | None = None
    """Shortest side of a bucket, in pixels (unset: half the resolution)."""
    bucket_max_side: Count | None = None
    """Longest side of a bucket, in pixels (unset: twice the resolution; both as in SDXL, Podell et al. 2023)."""
    bucket_upscale: bool = True
    """Enlarge an image that is smaller than its bucket; false: it comes in a smaller bucket of its own size, each side
    rounded down to a multiple of the step (bucket_min_side does not count for it)."""
    channels: Literal[1, 3] = 3
    """Colour channels of the training image: 3 (RGB) or 1 (grey)."""
    center_crop: bool = False
    """Crop the centre instead of a random place (random as in train_unconditional)."""
    random_flip: bool = False
    """Mirror each image left to right with probability one half."""
    variants: Count | None = None
    """Crops and flips that each image gets, in turns of an epoch each; unset: new ones in every epoch."""
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    """Filter of the resize, antialiased (bilinear as in train_unconditional)."""
    preparation: Literal["standard", "iddpm"] = "standard"
    """standard: resize the short side once, then crop; iddpm: as improved-diffusion, halve by box filter while the
    short side is at least twice the resolution, resize bicubic, crop the centre."""
    background: str = "white"
    """Colour that transparent images are composited on: a name or #rrggbb."""
    on_error: Literal["error", "skip"] = "error"
    """What a row that cannot be used does: stop before training with a report, or be left out and listed."""
    max_pixels: Count = 64_000_000
    """Largest image accepted, in pixels, by its header (guards against decompression bombs)."""
    min_side: Count = 8
    """Smallest side accepted, in pixels."""
    max_aspect_ratio: Positive = 8.0
    """Longest side over shortest that is accepted."""
    dataloader_num_workers: CountOrZero | None = None
    """Loader processes per training process; unset: as many as help, at most 8."""

    def __post_init__(self) -> None:
        names = ("dataset_name", "train_data_dir", "dataset_config")
        given = [f"data.{name} ({value})" for name in names if (value := getattr(self, name)) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given[:2])} both name the data: give one of them")
        others = {"streaming": False, "split": "train", "revision": None, "dataset_config_name": None}
        for name, unset in others.items() if self.dataset_config is not None else ():
            if getattr(self, name) != unset:
                raise ValueError(f"data.{name} is not for the folders that data.dataset_config lists: remove it")
        if self.preparation == "iddpm" and self.image_interpolation_mode != "bilinear":
            raise ValueError(
                f"data.image_interpolation_mode is {self.image_interpolation_mode}, but data.preparation iddpm has its "
                "own filters (box, then bicubic): remove one of them"
            )
        if self.variants is not None and self.is_deterministic:
            raise ValueError(
                f"data.variants is {self.variants}, but data.center_crop or data.preparation iddpm without "
                "data.random_flip makes the same of an image in every epoch: remove it"
            )
        if self.instance_prompt is not None and self.caption_column != "text":
            raise ValueError(
                f"data.caption_column ({self.caption_column}) and data.instance_prompt both give the captions: give "
                "one of them"
            )
        if self.mask_column is not None and self.alpha_mask:
            raise ValueError(
                f"data.mask_column ({self.mask_column}) and data.alpha_mask both mask the loss: give one of them"
            )
        if self.unmasked_weight and not self.masked:
            raise ValueError(
                f"data.unmasked_weight is {self.unmasked_weight:g}, but nothing is masked: remove it, or set "
                "data.mask_column or data.alpha_mask"
            )
        self._refuse_what_has_no_buckets()
        self._refuse_what_does_not_stream()

    def _refuse_what_has_no_buckets(self) -> None:
        if self.buckets == "none":
            names = ("bucket_step", "bucket_min_side", "bucket_max_side")
            given = [name for name in names if getattr(self, name) is not None]
            for name in given + ["bucket_upscale"] * (not self.bucket_upscale):
                raise ValueError(
                    f"data.{name} is {getattr(self, name)}, but all images are {self.resolution}x{self.resolution}: "
                    "remove it, or set data.buckets auto"
                )
            return
        if self.preparation == "iddpm":
            raise ValueError("data.preparation iddpm crops a square: remove it, or data.buckets")
        if self.shortest_side > self.resolution or self.longest_side < self.resolution:
            raise ValueError(
                f"data.resolution {self.resolution} must lie between data.bucket_min_side ({self.shortest_side}) and "
                f"data.bucket_max_side ({self.longest_side}), as the square is one of the buckets: change one of them"
            )

    @property
    def shortest_side(self) -> int:
        """Of a bucket, in pixels."""
        return self.bucket_min_side or self.resolution // 2

    @property
    def longest_side(self) -> int:
        """Of a bucket, in pixels."""
        return self.bucket_max_side or 2 * self.resolution

    @property
    def is_deterministic(self) -> bool:
        """Whether the settings leave nothing of the crop and the flip to chance."""
        return (self.center_crop or self.preparation == "iddpm") and not self.random_flip

    @property
    def masked(self) -> bool:
        """Whether the loss is masked."""
        return self.mask_column is not None or self.alpha_mask

    def _refuse_what_does_not_stream(self) -> None:
        if not self.streaming:
            if self.shuffle_buffer_size is not None:
                raise ValueError(
                    f"data.shuffle_buffer_size is {self.shuffle_buffer_size}, but without data.streaming each epoch is "
                    "one permutation of all rows: remove it, or set data.streaming true"
                )
            return
        if self.buckets != "none":
            raise ValueError(
                "data.buckets auto needs the sizes of all images before training, which data.streaming does not read: "
                "remove data.streaming, or data.buckets"
            )
        if self.train_data_dir is not None:
            raise ValueError(
                f"data.train_data_dir ({self.train_data_dir}) is a folder of images, but data.streaming reads Parquet "
                f"files: remove data.streaming; or {PACK} and name them by data.dataset_name"
            )
        if not re.fullmatch(r"[\w.-]+", self.split):
            raise ValueError(
                f"data.split {self.split} is more or less than one split, which data.streaming does not take: name one "
                "split, and limit its rows by data.max_train_samples"
            )
        if self.label_from_filename:
            raise ValueError(
                "data.label_from_filename needs the names of all images before training, which data.streaming does not "
                "read: give the data a column of datasets.ClassLabel and name it by data.label_column"
            )

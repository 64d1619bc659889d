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
    """Local folder of images: flat, class sub-folders, metadata.jsonl or .csv, or a.jpg beside a.txt."""
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
    """Side of the square training image, in pixels."""
    channels: Literal[1, 3] = 3
    """Colour channels of the training image: 3 (RGB) or 1 (grey)."""
    center_crop: bool = False
    """Crop the centre instead of a random place (random as in train_unconditional)."""
    random_flip: bool = False
    """Mirror each image left to right with probability one half."""
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
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError(
                f"data.dataset_name ({self.dataset_name}) and data.train_data_dir ({self.train_data_dir}) both name "
                "the data: give one of them"
            )
        if self.preparation == "iddpm" and self.image_interpolation_mode != "bilinear":
            raise ValueError(
                f"data.image_interpolation_mode is {self.image_interpolation_mode}, but data.preparation iddpm has its "
                "own filters (box, then bicubic): remove one of them"
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
        self._refuse_what_does_not_stream()

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

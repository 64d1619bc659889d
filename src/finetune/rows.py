"""The rows of a data set as training needs them: encoded image, captions, class label."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from finetune.captions import whole
from finetune.config import Data
from finetune.config_captions import Captions
from finetune.errors import DataError
from finetune.folder import Subsets, is_within
from finetune.images import BadRow
from finetune.shards import Shards
from finetune.sources import Source, with_encoded_images


class Unreadable(BadRow):
    """A file that stands there and cannot be read, which may pass without the file being changed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as it is stored; `Rows` says what it means."""

    number: int
    content: bytes | None
    path: str | None
    captions: tuple[Any, ...]
    label: Any
    small: Row | None = None
    """Its small image, as a row of an image only."""
    mask: Row | None = None
    """Its mask, likewise."""

    @property
    def name(self) -> str:
        """What an error calls it: the file, the row, or both."""
        if self.content is None and self.path:
            return self.path
        return f"row {self.number} ({self.path})" if self.path else f"row {self.number}"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Access to the rows of a data set by number, which stays the same whichever rows are used. Picklable."""

    dataset: Dataset | Shards
    folders: tuple[str, ...] | None
    image_column: str
    caption_columns: tuple[str, ...]
    label_column: str | None
    class_names: tuple[str, ...] | None
    class_index: dict[str, int] | None
    """Index of each class name; None if the column holds the indices themselves."""
    low_res_column: str | None = None
    """The column of the small images of super-resolution."""
    mask_column: str | None = None
    """The column of the masks of a masked loss."""
    instance_prompt: str | None = None
    """The caption of all rows, if one setting gives it."""
    label_from_filename: bool = False
    """Whether a class is named by the image's file name, up to its first "_", and label_column is of no account."""
    subsets: Subsets | None = None
    wordings: tuple[Captions, ...] = (Captions(),)
    """What is made of the captions: of each of the `subsets`, or of all rows."""

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, numbers: Sequence[int]) -> list[Row]:
        """Read rows by number, without opening the files that they name."""
        table = self.dataset[[int(number) for number in numbers]]
        nothing = {"bytes": None, "path": None}
        if self.image_column in table:
            images = [image or nothing for image in table[self.image_column]]
        else:
            images = [nothing | {"path": path} for path in table[f"{self.image_column}.path"]]
        beside = {}
        for column in filter(None, (self.low_res_column, self.mask_column)):
            of = (image or nothing for image in table[column])
            beside[column] = [
                Row(number=int(number), content=image["bytes"], path=image["path"], captions=(), label=None)
                for number, image in zip(numbers, of, strict=True)
            ]
        none = [None] * len(images)
        small, masks = beside.get(self.low_res_column, none), beside.get(self.mask_column, none)
        captions = [()] * len(images)
        if self.caption_columns:
            captions = list(zip(*(table[column] for column in self.caption_columns), strict=True))
        labels = table[self.label_column] if self.label_column else [None] * len(images)
        if self.label_from_filename:
            labels = [_class_of(image["path"]) for image in images]
        columns = (numbers, images, captions, labels, small, masks)
        return [
            Row(number=int(n), content=image["bytes"], path=image["path"], captions=cells, label=label, small=other,
                mask=mask)
            for n, image, cells, label, other, mask in zip(*columns, strict=True)
        ]  # fmt: skip

    def without_images(self) -> Rows:
        """The same rows by the paths of their images alone, not of a stream: bytes take most of the time of a read."""
        path = f"{self.image_column}.path"
        if path in self.dataset.column_names:
            raise DataError(f"cache.latents: the data have a column {path!r} too: rename it, or remove the setting")
        columns = (path, *self.caption_columns, self.label_column)
        paths = self.dataset.flatten().select_columns(list(dict.fromkeys(filter(None, columns))))
        return replace(self, dataset=paths, low_res_column=None, mask_column=None)

    def name(self, row: Row) -> str:
        """What an error calls a row: its name, and the shard that holds it."""
        shard = self.dataset.file_of(row.number) if isinstance(self.dataset, Shards) else None
        return f"{row.name} of {shard}" if shard else row.name

    def file(self, row: Row) -> str | None:
        """The file that holds the image; None if the row itself does. Raises BadRow outside the data's folders."""
        if row.content is not None:
            return None
        if not row.path:
            raise BadRow("has no image (null)")
        if "://" in row.path or "::" in row.path:
            raise BadRow("names an address, not a local file")
        if self.folders is None:
            return row.path
        path = os.path.join(self.folders[0], row.path)
        if not is_within(path, self.folders):
            raise BadRow(f"leads out of the folder of the data, {self.folders[0]}")
        return path

    def paths(self) -> list[np.ndarray]:
        """For each column of images: [rows] the path of the file of each, None where the row itself holds the image.

        To be looked at, not to be opened: `file` refuses those that lead out of the folders of the data. None of
        shards, whose rows hold their images.
        """
        if isinstance(self.dataset, Shards):
            return []
        columns, indices = (self.image_column, self.low_res_column, self.mask_column), self.dataset._indices
        found = []
        for name in filter(None, columns):
            column = self.dataset.data.column(name)  # as Arrow: reading rows takes ten times as long
            inside = pc.is_valid(pc.struct_field(column, "bytes"))
            paths = pc.if_else(inside, None, pc.struct_field(column, "path")).to_numpy()
            if self.folders is not None:
                paths = np.array([path and os.path.join(self.folders[0], path) for path in paths], dtype=object)
            found.append(paths if indices is None else paths[indices.column(0).to_numpy()])
        return found

    def image_bytes(self, row: Row) -> bytes:
        """The encoded image. Raises BadRow."""
        path = self.file(row)
        if path is None:
            return row.content
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for without end
                raise BadRow("cannot be read: it is not a file")
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise BadRow("cannot be read: there is no such file") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            raise Unreadable(f"cannot be read: {error}") from None

    def mask_bytes(self, row: Row) -> bytes | None:
        """The encoded mask; None without a column of masks. Raises BadRow."""
        try:
            return self.image_bytes(row.mask) if row.mask else None
        except BadRow as problem:
            raise type(problem)(f"has a mask that {problem}") from None

    def captions(self, row: Row) -> tuple[str, ...] | None:
        """The captions that one is drawn from, at least one; None if captions are not used. Raises BadRow."""
        if self.instance_prompt is not None:
            return (self.instance_prompt,)
        if not self.caption_columns:
            return None
        options: list[str] = []
        for column, cell in zip(self.caption_columns, row.captions, strict=True):
            cells = cell if isinstance(cell, list | tuple) else [cell]
            for caption in cells:
                if not isinstance(caption, str):
                    what = "is null" if caption is None else f"is {caption!r}, not text"
                    raise BadRow(f"has no caption: column {column!r} {what} (an empty caption is '')")
                options.append(caption)
        if not options:
            raise BadRow(f"has no caption: the list in column {self.caption_columns[0]!r} is empty")
        return tuple(options)

    def wording(self, row: Row) -> Captions:
        """What is made of the captions of a row."""
        return self.wordings[0 if self.subsets is None else self.subsets.of[row.number]]

    @property
    def words_change(self) -> bool:
        """Whether the tags of some captions are shuffled or dropped."""
        return any(wording.shuffle or wording.tag_dropout for wording in self.wordings)

    def texts(self, numbers: Sequence[int]) -> set[str]:
        """The different texts of rows, with all tags in their order; rows without one are passed over. Reads no images.
        """
        if self.instance_prompt is not None:
            return {whole(self.instance_prompt, wording) for wording in self.wordings}
        table = self.dataset.select_columns(list(self.caption_columns))[[int(number) for number in numbers]]
        cells = zip(*(table[column] for column in self.caption_columns), strict=True)
        found: set[str] = set()
        for number, captions in zip(numbers, cells, strict=True):
            row = Row(number=int(number), content=None, path=None, captions=captions, label=None)
            with suppress(BadRow):
                found |= {whole(caption, self.wording(row)) for caption in self.captions(row)}
        return found

    def label(self, row: Row) -> int | None:
        """The index into class_names; None if labels are not used. Raises BadRow."""
        if self.class_names is None:
            return None
        if row.label is None or row.label == -1:  # -1 is how datasets' ClassLabel says "not labelled"
            raise BadRow(f"has no label: column {self.label_column!r} is {row.label!r}")
        label = row.label if self.class_index is None else self.class_index[row.label]
        if not 0 <= label < len(self.class_names):
            raise BadRow(f"has the label {label}, but there are {len(self.class_names)} classes")
        return label

    def digest(self, row: Row, images: Sequence[bytes]) -> int:
        """A number that identifies the images, mask, captions and label of a usable row, wherever they are stored.

        images: the digest of each. 64 bits, signed as numpy's int64, never 0.
        """
        label = self.label(row)
        name = None if label is None else self.class_names[label]
        own = () if self.subsets is None else (dict(self.subsets.wording[self.subsets.of[row.number]]),)
        words = repr((self.captions(row), label, name, *filter(None, own))).encode()
        head = len(words).to_bytes(8, "little")
        total = hashlib.blake2b(head + words + b"".join(images), digest_size=8).digest()
        return int.from_bytes(total, "little", signed=True) or 1


def rows_of(
    source: Source, data: Data, *, captions: bool, labels: bool, wording: Captions | None = None
) -> Rows:
    """The rows of a source by the columns that the configuration names. Raises DataError about a missing column.

    wording: what is made of captions, as far as no subset has its own; unset: nothing.
    """
    wording = wording or Captions()
    dataset, columns = source.dataset, [data.image_column]
    caption_columns: tuple[str, ...] = ()
    _require(source, data.image_column, "data.image_column", "set it to the column that holds the images")
    if captions and data.instance_prompt is None:
        caption_columns = (data.caption_column,) if isinstance(data.caption_column, str) else data.caption_column
        remedy = (
            "set it to the column that holds the captions; in a folder of images, write a.txt beside each a.jpg, or a "
            'metadata.jsonl with lines such as {"file_name": "a.jpg", "text": "a red chair"}; or train without text '
            "(conditioning.kind none)"
        )
        for column in caption_columns:
            _require(source, column, "data.caption_column", remedy)
        columns += caption_columns
    if data.low_res_column:
        remedy = "set it to the column that holds the small images, or unset it to make them from the large ones"
        _require(source, data.low_res_column, "data.low_res_column", remedy)
        columns.append(data.low_res_column)
    if data.mask_column is not None:
        remedy = "set it to the column that holds the masks, or unset it to train on whole images"
        _require(source, data.mask_column, "data.mask_column", remedy)
        columns.append(data.mask_column)
    class_names, class_index = None, None
    named_by_file = labels and data.label_from_filename
    if labels and not named_by_file:
        remedy = "set it to the column that holds the labels; in a folder of images, give each class its sub-folder"
        _require(source, data.label_column, "data.label_column", remedy)
        class_names, named = _classes(dataset, data.label_column, source.name)
        class_index = {name: index for index, name in enumerate(class_names)} if named else None
        columns.append(data.label_column)
    dataset = dataset.select_columns(list(dict.fromkeys(columns)))
    for column in filter(None, (data.image_column, data.low_res_column, data.mask_column)):
        dataset = with_encoded_images(dataset, column, source.name)
    if named_by_file:
        class_names = _classes_of_files(dataset, data.image_column, source.name)
        class_index = {name: index for index, name in enumerate(class_names)}
    return Rows(
        dataset=dataset,
        folders=source.folders,
        image_column=data.image_column,
        caption_columns=caption_columns,
        label_column=data.label_column if labels and not named_by_file else None,
        class_names=class_names,
        class_index=class_index,
        low_res_column=data.low_res_column,
        mask_column=data.mask_column,
        instance_prompt=data.instance_prompt if captions else None,
        label_from_filename=named_by_file,
        subsets=source.subsets,
        wordings=tuple(replace(wording, **own) for own in source.subsets.wording) if source.subsets else (wording,),
    )


def _class_of(path: str | None) -> str | None:
    """cat_001.png -> cat, as in improved-diffusion; None without a "_"."""
    name, found, _ = os.path.basename(path or "").partition("_")
    return name if found else None


def _classes_of_files(dataset: Dataset, column: str, name: str) -> tuple[str, ...]:
    """The classes that the file names begin with, sorted."""
    classes: set[str] = set()
    for table in dataset.select_columns([column]).with_format("arrow").iter(1000):
        for path in table[column].combine_chunks().field("path").to_pylist():
            if (found := _class_of(path)) is None:
                raise DataError(
                    f"data.label_from_filename takes the class from the file name before its first '_', but {name} has "
                    f"an image {path!r}: rename it to CLASS_name, or use data.label_column"
                )
            classes.add(found)
    return tuple(sorted(classes))


def _require(source: Source, column: str, setting: str, remedy: str) -> None:
    if column not in source.dataset.column_names:
        found = ", ".join(source.dataset.column_names) or "none"
        raise DataError(f"{source.name} has no column {column!r} ({setting}); columns found: {found}. {remedy}.")


def _classes(dataset: Dataset | Shards, column: str, name: str) -> tuple[tuple[str, ...], bool]:
    """Class names, and whether the column holds names (sorted here) rather than their indices."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names), False
    if isinstance(dataset, Shards):
        raise DataError(
            f"column {column!r} (data.label_column) of {name} holds {feature} without class names, which a stream does "
            "not go through all rows to find: cast the column to datasets.ClassLabel, or remove data.streaming"
        )
    values = [value for value in dataset.unique(column) if value is not None]
    if values and all(type(value) is int for value in values):
        if min(values) < 0:
            raise DataError(f"column {column!r} of {name} holds the label {min(values)}: classes are numbered from 0")
        return tuple(str(index) for index in range(max(values) + 1)), False
    if values and all(type(value) is str for value in values):
        digits = all(value.isdecimal() for value in values)  # "10" comes after "9", as the numbers of a CSV file do
        return tuple(sorted(values, key=int if digits else None)), True
    raise DataError(f"column {column!r} (data.label_column) of {name} holds {feature}, not class labels")

"""The class images of prior preservation as samples: rows after those of the data, each with one caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from finetune.config import TrainConfig
from finetune.config_captions import Captions
from finetune.config_validation import Validation
from finetune.data import TrainData, open_data
from finetune.data_changes import fingerprint
from finetune.rows import Row, Rows


@dataclass(frozen=True, kw_only=True)
class TwoTables:
    """The rows of two tables as those of one, read as `Rows` are: the second's are numbered on from the first's."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def read(self, numbers: Sequence[int]) -> list[Row]:
        """See `Rows`."""
        n, (own, others) = len(self.first), self._parted(numbers)
        first = iter(self.first.read(own) if own else ())
        second = iter(self.second.read(others) if others else ())
        found = (next(first if number < n else second) for number in numbers)
        return [replace(row, number=int(number)) for row, number in zip(found, numbers, strict=True)]

    def without_images(self) -> TwoTables:
        """See `Rows`."""
        return TwoTables(first=self.first.without_images(), second=self.second.without_images())

    def _parted(self, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """The numbers of the first table's rows and, as it counts them, of the second's."""
        n = len(self.first)
        return [number for number in numbers if number < n], [number - n for number in numbers if number >= n]

    def _of(self, row: Row) -> Rows:
        return self.first if row.number < len(self.first) else self.second

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """See `Rows`."""
        return self.first.class_names

    def name(self, row: Row) -> str:
        """See `Rows`."""
        return self._of(row).name(row)

    def image_bytes(self, row: Row) -> bytes:
        """See `Rows`."""
        return self._of(row).image_bytes(row)

    def mask_bytes(self, row: Row) -> bytes | None:
        """See `Rows`."""
        return self._of(row).mask_bytes(row)

    def captions(self, row: Row) -> tuple[str, ...] | None:
        """See `Rows`."""
        return self._of(row).captions(row)

    def wording(self, row: Row) -> Captions:
        """See `Rows`."""
        return self._of(row).wording(row)

    @property
    def words_change(self) -> bool:
        """See `Rows`."""
        return self.first.words_change

    def texts(self, numbers: Sequence[int]) -> set[str]:
        """See `Rows`."""
        own, others = self._parted(numbers)
        return self.first.texts(own) | self.second.texts(others)

    def label(self, row: Row) -> int | None:
        """See `Rows`."""
        return self._of(row).label(row)


def with_class_images(cfg: TrainConfig, data: TrainData) -> TrainData:
    """The data with the first prior.num_class_images of prior.class_data_dir; as they are without prior.

    Raises DataError for class images that cannot be used.
    """
    if cfg.prior is None:
        return data
    rules = replace(
        cfg.data,
        train_data_dir=cfg.prior.class_data_dir,
        instance_prompt=cfg.prior.class_prompt,
        dataset_name=None,
        dataset_config=None,
        dataset_config_name=None,
        revision=None,
        image_column="image",
        split="train",
        caption_column="text",
        max_train_samples=None,
        mask_column=None,
        alpha_mask=False,
        unmasked_weight=0.0,
    )
    plain = {"captions": Captions(), "validation": Validation(), "prior": None}
    classes = open_data(replace(cfg, data=rules, **plain))
    used = classes.rows[: cfg.prior.num_class_images]
    digests = np.zeros_like(classes.digests)
    digests[used] = classes.digests[used]
    return replace(
        data,
        table=TwoTables(first=data.table, second=classes.table),
        rows=np.concatenate([data.rows, len(data.table) + used]),
        digests=np.concatenate([data.digests, digests]),
        images=np.concatenate([data.images, classes.images]),
        sizes=np.concatenate([data.sizes, classes.sizes]),
        held_out=None if data.held_out is None else _padded(data.held_out, len(digests)),
        fingerprint=fingerprint(data.digests),
        class_images_from=len(data.table),
        class_weight=cfg.prior.weight,
        facts=data.facts | {"class_images": len(used)},
    )


def _padded(held_out: TrainData, n: int) -> TrainData:
    """The held-out rows among n more rows, none of which is one."""
    arrays = {name: getattr(held_out, name) for name in ("digests", "images", "sizes")}
    longer = {name: np.pad(values, [(0, n)] + [(0, 0)] * (values.ndim - 1)) for name, values in arrays.items()}
    return replace(held_out, **longer)

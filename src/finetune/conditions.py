"""The conditions that need no text: class labels, the small image of super-resolution, sizes; and how one is dropped.

Training and sampling share these classes, so the unconditional case that guidance extrapolates from is the one that
was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.errors import ConfigError, DataError
from finetune.transfer import to_device

if TYPE_CHECKING:
    from finetune.batching import Batch
    from finetune.seeding import PositionRandom
    from finetune.space import Space

Condition = dict[str, Tensor]
"""What `models.bind` gives the UNet, one row per sample, empty for none: class_labels, encoder_hidden_states,
text_embeds, time_ids, low_res, inpaint."""


class Single:
    """One condition. A subclass says what it is of a batch, of what a user asks for, and in the unconditional case."""

    kind: str
    dropout: float
    parameters_frozen = 0
    null: str
    """What stands for its absence."""

    @property
    def members(self) -> Sequence[Single]:
        """What it is made of: itself, or SDXL's two text encoders."""
        return (self,)

    @property
    def parts(self) -> dict[str, Single]:
        """Itself, by its kind."""
        return {self.kind: self}

    def __call__(self, batch: Batch, random: PositionRandom) -> Condition:
        """The condition of a training batch, dropped for a share of the samples chosen by position in the run."""
        condition = self.of(batch, random)
        if not self.dropout:
            return condition
        dropped = random.uniform("condition_dropout") < self.dropout
        return without(condition, self.unconditional(len(batch)), dropped)

    def guided_from(self, condition: Condition) -> Condition:
        """What guidance extrapolates `condition` from: the unconditional case."""
        return self.unconditional(len(next(iter(condition.values()))))

    def of(self, batch: Batch, random: PositionRandom | None = None) -> Condition:
        """The condition of every sample of a batch; without `random`, free of noise too."""
        raise NotImplementedError

    def condition(self, wanted: Any) -> Condition:
        """The condition that is asked for, one row each."""
        raise NotImplementedError

    def unconditional(self, n: int) -> Condition:
        """n rows of the unconditional case, the same that dropout trains."""
        raise NotImplementedError


def without(condition: Condition, null: Condition, dropped: Tensor) -> Condition:
    """The condition with the rows of `null` where dropped ([B] bool, on the CPU)."""
    result = {}
    for name, rows in condition.items():
        where = to_device(dropped, rows.device).reshape(-1, *[1] * (rows.ndim - 1))
        result[name] = torch.where(where, null[name], rows)
    return result


class ClassLabel(Single):
    """Class labels 0 .. num_classes - 1; the index num_classes stands for "no class".

    null: "index", its embedding is learned; "zero", it stays zero (see `models.build_unet`). trainable: whether the
    embeddings of the classes are learned.
    """

    kind = "class_label"

    def __init__(
        self,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        dropout: float = 0.0,
        null: str = "index",
        trainable: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_classes, self.class_names, self.dropout, self.device = num_classes, class_names, dropout, device
        self.null, self.trainable = null, trainable

    def of(self, batch: Batch, random: PositionRandom | None = None) -> Condition:
        """{"class_labels": [B] int64}. Raises DataError for a label that is no class."""
        labels = batch.class_labels
        assert labels is not None, "the data must give class labels"
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:  # num_classes itself means "no class"
            raise DataError(
                f"class labels must lie in 0..{self.num_classes - 1} (conditioning.num_classes {self.num_classes}), "
                f"got {int(labels.min())}..{int(labels.max())}: correct the labels, or raise conditioning.num_classes"
            )
        return {"class_labels": to_device(labels, self.device)}

    def condition(self, wanted: Sequence[int]) -> Condition:
        """{"class_labels": [n] int64}. Raises ConfigError for a label that is no class."""
        for label in wanted:
            if not 0 <= label < self.num_classes:
                raise ConfigError(f"class labels are 0..{self.num_classes - 1}, got {label}")
        return {"class_labels": torch.tensor(list(wanted), dtype=torch.int64, device=self.device)}

    def unconditional(self, n: int) -> Condition:
        """{"class_labels": [n]} of "no class"."""
        return {"class_labels": torch.full((n,), self.num_classes, device=self.device)}


class LowRes(Single):
    """{"low_res": [B, channels, side, side] float32 in [-1, 1]}: the small image of super-resolution.

    `models.bind` enlarges it bilinearly to x0's side and concatenates it to the network's input (Nichol & Dhariwal
    2021). Zeros, a grey image, stand for its absence.
    """

    kind = "low_res"
    null = "zero"

    def __init__(
        self,
        *,
        channels: int,
        side: int,
        noise_augmentation: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """channels, side: of the small image. noise_augmentation: the largest std of noise added in training."""
        self.channels, self.side, self.dropout, self.device = channels, side, dropout, device
        self.noise_augmentation = noise_augmentation

    def of(self, batch: Batch, random: PositionRandom | None = None) -> Condition:
        """The batch's small images, or its images reduced; with noise of a std drawn in [0, noise_augmentation)."""
        images = batch.pixel_values if batch.low_res is None else batch.low_res
        low_res = self.condition(images)["low_res"]
        if self.noise_augmentation and random is not None:
            std = random.uniform("low_res_noise_level") * self.noise_augmentation
            std = to_device(std, low_res.device, torch.float32)
            noise = random.normal("low_res_noise", low_res.shape[1:]).to(low_res.device)
            low_res = low_res + std[:, None, None, None] * noise
        return {"low_res": low_res}

    def condition(self, wanted: Tensor) -> Condition:
        """Images [n, channels, H, H] in [-1, 1]; those larger than `side` by a whole factor are reduced by averaging.

        Raises ConfigError for another shape.
        """
        _, channels, height, width = wanted.shape
        if channels != self.channels or height != width or width % self.side:
            raise ConfigError(
                f"the small image of super-resolution must be {self.side}x{self.side} pixels, or square and a whole "
                f"multiple of that, in {self.channels} channels, got {width}x{height} in {channels}: resize it"
            )
        images = to_device(wanted, self.device).float()
        return {"low_res": images if width == self.side else F.interpolate(images, self.side, mode="area")}

    def unconditional(self, n: int) -> Condition:
        """Zeros."""
        return {"low_res": torch.zeros(n, self.channels, self.side, self.side, device=self.device)}


class Inpaint(Single):
    """{"inpaint": [B, 1 + c, h, w] float32}: a mask, 1 where is to be painted, and the latents of the image without it.

    The latents are the posterior's mean. The order of channels, and nearest pixels for the mask, are those of
    StableDiffusionInpaintPipeline.
    """

    kind = "inpaint"
    dropout = 0.0
    null = "zero"

    def __init__(self, space: Space, *, full_mask: float = 0.25) -> None:
        """full_mask: the share of training samples that are hidden as a whole."""
        self.space, self.full_mask = space, full_mask
        self.channels = 1 + space.channels

    def of(self, batch: Batch, random: PositionRandom | None = None) -> Condition:
        """Of rectangles drawn for the batch; without `random`, of the middle of each image."""
        images = batch.pixel_values
        masks = self.masks(len(batch), images.shape[-2:], random).to(images.device, non_blocking=True)
        return self.condition((images, masks))

    def masks(self, n: int, sides: tuple[int, int], random: PositionRandom | None = None) -> Tensor:
        """[n, 1, H, W] float32 of 0 and 1: rectangles of a quarter of each side or more, or all; or the middle half."""
        masks = torch.zeros(n, 1, *sides)
        spans = []
        for axis, side in zip(("height", "width"), sides, strict=True):
            length, start = torch.full((n,), 0.5), torch.full((n,), 0.5)
            if random is not None:
                length, start = 0.25 + 0.75 * random.uniform(f"mask {axis}"), random.uniform(f"mask {axis} start")
            length = (length * side).round().long()
            first = (start * (side - length + 1)).long().clamp(max=side - 1)
            spans.append((first, first + length))
        for mask, top, bottom, left, right in zip(masks, *spans[0], *spans[1], strict=True):
            mask[:, top:bottom, left:right] = 1
        if random is not None:
            masks[random.uniform("full mask") < self.full_mask] = 1
        return masks

    def condition(self, wanted: tuple[Tensor, Tensor]) -> Condition:
        """Of images [n, C, H, W] in [-1, 1] and masks [n, 1, H, W]."""
        images, masks = wanted
        latents = self.space.encode(to_device(images * (masks < 0.5), self.space.vae.device))
        small = F.interpolate(to_device(masks, latents.device), latents.shape[-2:])
        return {"inpaint": torch.cat([small, latents], dim=1)}

    def unconditional(self, n: int) -> Condition:
        """Zeros."""
        return {"inpaint": torch.zeros(n, self.channels, self.space.size, self.space.size)}


class Size(Single):
    """{"time_ids": [B, 6] float32}, SDXL's micro-conditioning (Podell et al. 2023), in pixels.

    Height and width of the original image, top and left of the crop after the resize, height and width of the training
    image. Zeros stand for their absence.
    """

    kind = "size"
    null = "zero"

    def __init__(self, *, dropout: float = 0.0, device: torch.device | str = "cpu") -> None:
        self.dropout, self.device = dropout, device

    def of(self, batch: Batch, random: PositionRandom | None = None) -> Condition:
        """What each sample really was and became."""
        assert batch.time_ids is not None, "the data must give sizes"
        return {"time_ids": to_device(batch.time_ids, self.device)}

    def condition(self, wanted: Sequence[Sequence[float]]) -> Condition:
        """Six numbers each."""
        return {"time_ids": torch.tensor([list(six) for six in wanted], dtype=torch.float32, device=self.device)}

    def unconditional(self, n: int) -> Condition:
        """Zeros."""
        return {"time_ids": torch.zeros(n, 6, device=self.device)}

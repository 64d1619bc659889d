"""Masks: each lies on its image whatever is cut and mirrored, and only what it marks has a gradient."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image

import tiny
from finetune.batching import first_batch
from finetune.config import Data
from finetune.data import open_data
from finetune.errors import DataError
from finetune.images import BadRow, decode, mask_of, normalised, prepare, strict_pillow
from finetune.objective import build_objective
from finetune.seeding import PositionRandom
from finetune.trainer import Trainer
from forked import log, metrics, run


def blob(width, height, seed=0):
    """A mask of several rectangles, whole pixels of 0 or 255."""
    random, mask = np.random.RandomState(seed), np.zeros((height, width), np.uint8)
    for _ in range(3):
        top, left = random.randint(0, height - 2), random.randint(0, width - 2)
        mask[top : top + height // 3 + 1, left : left + width // 3 + 1] = 255
    return mask


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


# -- from the files to the batch ---------------------------------------------------------------------------------------


def probes(sizes, *, alpha=False):
    """Images whose red is their mask, so that a sample shows by itself whether its mask lies where it should."""
    rows = {"image": [], "mask": []}
    for seed, (width, height) in enumerate(sizes):
        mask = blob(width, height, seed)
        noise = np.random.RandomState(seed).randint(0, 256, (height, width, 2), np.uint8)
        colours = np.concatenate([mask[..., None], noise], axis=2)
        rows["image"].append(Image.fromarray(np.dstack([colours, mask]) if alpha else colours))
        rows["mask"].append(Image.fromarray(mask))
    return Dataset.from_dict(rows, features=Features({"image": ImageColumn(), "mask": ImageColumn()}))


def opened(tmp_path, dataset, **data):
    cfg = tiny.config(tmp_path / "run", conditioning={"kind": "none"})
    return open_data(replace(cfg, data=Data(resolution=16, **data)), dataset=dataset, progress=False)


@pytest.mark.parametrize("preparation", ["standard", "iddpm"])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_mask_is_cut_and_mirrored_with_its_image(tmp_path, alpha, preparation):
    which = {"alpha_mask": True, "background": "black"} if alpha else {"mask_column": "mask"}
    if preparation == "standard":
        which["image_interpolation_mode"] = "box"  # the filter of the masks, so that they can be compared to the bit
    sizes = [(16, 16), (30, 16), (16, 41), (64, 48), (11, 9)] * 2
    data = opened(tmp_path, probes(sizes, alpha=alpha), random_flip=True, preparation=preparation, **which)
    apart = []
    for epoch in range(3):
        for sample in data.samples(data.rows, [epoch] * len(data)):
            assert sample.mask.shape == (1, 16, 16) and 0 <= sample.mask.min() and sample.mask.max() <= 1
            red = (normalised(sample.pixels[:1]) + 1) / 2
            torch.testing.assert_close(sample.mask, red, atol=2e-3 if alpha else 0, rtol=0)
            apart.append(not torch.equal(red, red.flip(2)) and not torch.allclose(red, red.flip(2), atol=2e-3))
    assert sum(apart) > 20, "negative control: the masks are not symmetric, so that a wrong place would be seen"


def test_what_counts_of_a_batch(tmp_path):
    data = opened(tmp_path, probes([(16, 16)] * 3), mask_column="mask", unmasked_weight=0.25)
    mask = first_batch(data, 3).mask
    assert mask.shape == (3, 1, 16, 16) and mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0.25, 1}
    assert first_batch(opened(tmp_path, probes([(16, 16)] * 3)), 3).mask is None
    opaque = opened(tmp_path, probes([(16, 16)]), alpha_mask=True)
    assert first_batch(opaque, 1).mask.min() == 1, "an image without transparency counts whole"


def test_a_folder_names_its_masks_by_the_metadata(tmp_path):
    folder = tmp_path / "images"
    (folder / "masks").mkdir(parents=True)
    lines = []
    for name, image, mask in zip("ab", *probes([(16, 16), (20, 16)])[:].values(), strict=True):
        image.save(folder / f"{name}.png"), mask.save(folder / "masks" / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "mask": f"masks/{name}.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rules = {"train_data_dir": str(folder), "mask_column": "mask", "image_interpolation_mode": "box"}
    found = first_batch(opened(tmp_path, None, **rules), 2)
    assert torch.equal(found.mask, (found.pixel_values[:, :1] + 1) / 2)
    before = opened(tmp_path, None, **rules).fingerprint
    Image.fromarray(255 - blob(16, 16)).save(folder / "masks" / "a.png")
    assert opened(tmp_path, None, **rules).fingerprint != before, "a mask is a part of the data"
    Image.new("L", (16, 16)).save(folder / "forgotten.png")
    with pytest.raises(DataError, match="forgotten.png: is not listed in metadata.jsonl"):
        opened(tmp_path, None, **rules)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.zeros((16, 16), np.uint8), "has a mask that leaves out all of it"),
        (blob(16, 15), "is 16x16 and its mask 16x15: they must have one size"),
        (np.dstack([blob(16, 16)] * 4), "has a mask that is transparent in places"),
        (b"GIF8", "has a mask that"),
        (None, r"has a mask that has no image \(null\)"),
    ],
    ids=["black", "size", "transparent", "broken", "none"],
)
def test_masks_that_cannot_be_meant_are_found_before_training(tmp_path, mask, says):
    content = mask if mask is None or isinstance(mask, bytes) else png(mask)
    image = png(np.zeros((16, 16, 3), np.uint8))
    column = [{"bytes": one, "path": None} if one else None for one in (png(blob(16, 16)), content)]
    rows = {"image": [{"bytes": image, "path": None}] * 2, "mask": column}
    dataset = Dataset.from_dict(rows, features=Features({"image": ImageColumn(), "mask": ImageColumn()}))
    with pytest.raises(DataError, match=f"row 1: {says}"):
        opened(tmp_path, dataset, mask_column="mask")
    assert opened(tmp_path, dataset, mask_column="mask", on_error="skip").rows.tolist() == [0]
    with pytest.raises(DataError, match=r"no column 'masks' \(data.mask_column\)"):
        opened(tmp_path, dataset, mask_column="masks")


def test_an_opaque_alpha_of_a_mask_and_a_floor_are_no_mistakes():
    rules = Data(resolution=16, mask_column="mask", unmasked_weight=0.5)
    with strict_pillow():
        decoded = decode(png(np.zeros((16, 16, 3), np.uint8)), rules)
        four = np.dstack([blob(16, 16)] * 3 + [np.full((16, 16), 255, np.uint8)])
        assert np.array_equal(np.asarray(mask_of(decoded, png(four), rules)), blob(16, 16))
        black = mask_of(decoded, png(np.zeros((16, 16), np.uint8)), rules)
        made = prepare(decoded.image, rules, seed=0, epoch=0, row=0, mask=black)
        assert made.mask.unique().tolist() == [0.5]
        with pytest.raises(BadRow):  # negative control
            mask_of(decoded, png(np.zeros((16, 16), np.uint8)), replace(rules, unmasked_weight=0.0))


def test_settings_that_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match="both mask the loss: give one of them"):
        Data(resolution=8, mask_column="mask", alpha_mask=True)
    with pytest.raises(ValueError, match="nothing is masked: remove it"):
        Data(resolution=8, unmasked_weight=0.1)
    bound = {"kind": "ddpm", "variance": {"kind": "learned_range"}}
    tiny.config(tmp_path, objective=bound)  # negative control
    with pytest.raises(ValueError, match="has no masked form: .* or remove data.alpha_mask"):
        tiny.config(tmp_path, objective=bound, data={"alpha_mask": True})


# -- the loss ----------------------------------------------------------------------------------------------------------

OBJECTIVES = [
    {"kind": "ddpm"},
    {"kind": "ddpm", "prediction_type": "v_prediction", "weighting": {"kind": "min_snr", "snr_gamma": 5.0}},
    {"kind": "edm"},
    {"kind": "flow", "loss": {"kind": "huber"}},
]


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda settings: "-".join(settings))
def test_only_what_a_mask_marks_counts(tmp_path, settings):
    objective = build_objective(tiny.config(tmp_path, objective=settings).objective, clip_sample=True)
    random = PositionRandom(0, torch.arange(3))
    x0 = random.normal("data", (2, 8, 8)).float()
    output = torch.zeros(3, 2, 8, 8, requires_grad=True)

    def network(x_t, timestep):
        return x_t * 0.1 + output

    plain = objective.loss(network, x0, random)
    ones = objective.loss(network, x0, random, mask=torch.ones(3, 1, 8, 8))
    assert torch.equal(plain.per_sample, ones.per_sample)

    half = torch.zeros(3, 1, 8, 8)
    half[:, :, :, :4] = 1
    masked = objective.loss(network, x0, random, mask=half)
    masked.per_sample.sum().backward()
    assert (output.grad[..., 4:] == 0).all() and (output.grad[..., :4] != 0).all()
    rest = objective.loss(network, x0, random, mask=1 - half)
    torch.testing.assert_close(masked.per_sample + rest.per_sample, plain.per_sample)  # not divided by the area
    assert not torch.allclose(masked.per_sample, plain.per_sample)

    fine = torch.rand(3, 1, 32, 32)  # as large as the image whose latents x0 are
    by_hand = fine.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    found = objective.loss(network, x0, random, mask=fine).per_sample
    torch.testing.assert_close(found, objective.loss(network, x0, random, mask=by_hand).per_sample)


def test_a_masked_loss_by_hand():
    """epsilon-prediction with the output 0: mask * noise^2, over all places."""
    objective = build_objective(tiny.config(Path("unused")).objective, clip_sample=True)
    noise, mask = torch.randn(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    found = objective.loss_at(
        lambda x_t, _: torch.zeros_like(x_t), torch.randn(2, 3, 4, 4), torch.tensor([5, 900]), noise, mask=mask
    )
    torch.testing.assert_close(found.per_sample, (mask * noise**2).sum((1, 2, 3)) / (3 * 4 * 4))


def test_masks_reach_the_training(tmp_path):
    """White masks are no masks, to the bit; those of grey 51 leave a fifth of the loss of held-out images before the
    first step, and of the loss of that step."""
    sections = {"conditioning": {"kind": "none"}, "validation": {"held_out": 0.4}}
    cfg = tiny.config(tmp_path / "run", train={"max_train_steps": 2}, **sections)
    images = probes([(8, 8)] * 20).remove_columns("mask")
    losses = {}
    for name, grey in (("none", None), ("white", 255), ("grey", 51)):
        content = {"bytes": png(np.full((8, 8), grey or 0, np.uint8)), "path": None}
        dataset = images if grey is None else images.add_column("mask", [content] * 20, feature=ImageColumn())
        data = Data(resolution=8, mask_column=None if grey is None else "mask", dataloader_num_workers=0)
        one = replace(cfg, output_dir=str(tmp_path / name), data=data)
        assert run(one, body=lambda one, dataset=dataset: Trainer(one, dataset=dataset).fit()) == [0], log(one)
        losses[name] = [line.get("loss", line.get("validation_loss")) for line in metrics(one)]
    assert losses["white"] == losses["none"]
    assert losses["grey"][:2] == pytest.approx([loss / 5 for loss in losses["none"][:2]], rel=1e-5)

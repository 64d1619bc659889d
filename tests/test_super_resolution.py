"""Whole runs with several conditions and with small images: trained, resumed by position, exported, drawn from."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from pydantic import TypeAdapter

import forked
import tiny
from finetune.batching import first_batch
from finetune.config import TrainConfig
from finetune.config_io import dump, load_text
from finetune.data import open_data
from finetune.errors import ConfigError, DataError
from finetune.images import normalised
from finetune.run import train
from finetune.sample import generate, load_pipeline
from finetune.sample_command import sample_main
from finetune.trainer import Trainer
from golden_numbers import arrays, compare
from tiny_models import CROSS, parts  # noqa: F401

SHORT = {"train": {"max_train_steps": 2}, "checkpoint": {"checkpointing_steps": 2}}


def whole(cfg):
    assert forked.run(cfg, body=lambda cfg: train(cfg) and None) == [0], forked.log(cfg)
    return load_pipeline(cfg.output_dir)


def tiny_config(folder, conditioning, **sections):
    """tiny.config with this conditioning, in two steps; `sections` are merged over its own."""
    settings = asdict(tiny.config(folder)) | {"conditioning": conditioning}
    for name, values in {**SHORT, **sections}.items():
        settings[name] = settings[name] | values if name != "model" else values
    return TypeAdapter(TrainConfig).validate_python(settings)


BOTH = {
    "kind": "several",
    "class_label": {"condition_dropout": 0.3, "null": "zero"},
    "low_res": {"factor": 2, "noise_augmentation": 0.1},
}


def test_class_and_small_image_train_export_and_draw(tmp_path):
    cfg = tiny_config(tmp_path / "run", BOTH, sample={"num_images": 3, "guidance_scale": 2.0})
    assert load_text(dump(cfg)) == cfg
    pipeline = whole(cfg)
    assert pipeline.config.conditioning == "class_label+low_res" and pipeline.config.dropped == "class_label"
    assert not pipeline.unet.class_embedding.weight[10].any(), "no class stays zero through training, averages, export"
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert 'pipeline(class_labels=0, image=Image.open("small.png"), generator' in card and "small image, drawn" in card
    grid = Image.open(tmp_path / "run" / "samples" / "step-00000002.png")
    data = open_data(cfg, progress=False)
    shown = first_batch(data, 3)
    assert grid.width == 6 * 100 + 4 and shown.rows.tolist() == data.rows[:3].tolist()
    cells = [np.asarray(grid.crop((4 + 100 * i, 4, 100 + 100 * i, 100))).astype(int) for i in range(6)]
    truth = ((shown.pixel_values[0] / 2 + 0.5) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(cells[2][6::12, 6::12] - truth).max() <= 1
    small = torch.nn.functional.interpolate(shown.pixel_values, 4, mode="area")[0]
    small = ((small / 2 + 0.5) * 255).permute(1, 2, 0).numpy()
    assert np.abs(cells[0][12::24, 12::24] - small).max() <= 1
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):  # one of the right size and mode, one twice as large and grey
        one = Image.fromarray(np.full((4 * (i + 1),) * 2, 90 * i, "uint8"))
        one.convert(["RGB", "L"][i]).save(pictures / f"{i}.png")
    words = ["--image", str(pictures), "--class_label", "0", "--out", str(tmp_path / "out")]
    sample_main([str(tmp_path / "run"), *words])
    images = torch.stack([torch.full((3, 4, 4), 90 * i / 255) for i in range(2)])
    expected = generate(pipeline, num_images=2, seed=0, class_labels=[0], images=images)
    for i, image in enumerate(expected):
        drawn = np.asarray(Image.open(tmp_path / "out" / f"{i:04d}.png")).astype(int)
        assert np.abs(drawn - np.asarray(image)).max() <= 1
    with pytest.raises(ConfigError, match="0.png: the small image .* must be 4x4"):
        Image.new("RGB", (5, 5)).save(pictures / "0.png")
        sample_main([str(tmp_path / "run"), *words[:-1], str(tmp_path / "out2")])


def test_class_text_and_sizes_train_export_and_draw(parts, tmp_path):  # noqa: F811
    text = {"text_encoder": str(parts / "text_encoder"), "tokenizer": str(parts / "tokenizer")}
    conditioning = {"kind": "several", "class_label": {}, "text": text, "size": {"condition_dropout": 0.1}}
    conditioning |= {"dropout_draws": "independent"}
    cfg = tiny_config(tmp_path / "run", conditioning, model=CROSS, sample={"prompts": ["a"]})
    pipeline = whole(cfg)
    assert pipeline.config.conditioning == "class_label+text+size"
    images = generate(pipeline, num_images=2, seed=0, prompts=["a"], class_labels=[1, 2], guidance_scale=2.0)
    assert len(images) == 2 and images[0].size == (8, 8)


def test_a_run_of_several_conditions_resumes_bit_for_bit(tmp_path):
    one, two = (tiny_config(tmp_path / name, BOTH, train={"max_train_steps": 4}) for name in ("one", "two"))
    Trainer(one).fit()
    half = Trainer(two)
    half.steps = 2
    half.fit()
    Trainer(replace(two, allow_change=("train.max_train_steps",))).fit()
    assert forked.state(one, 4) == forked.state(two, 4)
    assert forked.state(one, 4) != forked.state(one, 2), "negative control"


# -- pairs and sizes ---------------------------------------------------------------------------------------------------


def pairs(sizes, factor=2, *, shrink=None):
    """Images of a gradient, which tells where a crop lies, with their small ones."""
    rows = {"image": [], "small": [], "label": []}
    for number, (width, height) in enumerate(sizes):
        small = np.add.outer(np.arange(height // factor), np.arange(width // factor) * 3).astype("uint8") + number
        rows["image"].append(Image.fromarray(small.repeat(factor, 0).repeat(factor, 1)))
        rows["small"].append(Image.fromarray(small if shrink is None else small[:shrink, :shrink]))
        rows["label"].append(number % 2)
    features = Features({"image": ImageColumn(), "small": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict(rows, features=features)


def pair_config(tmp_path, factor=2, **data):
    conditioning = {"kind": "low_res", "factor": factor}
    data = {"resolution": 16, "channels": 1, "low_res_column": "small", **data}
    cfg = tiny_config(tmp_path / "run", conditioning)
    return replace(cfg, data=type(cfg.data)(**data))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_small_images_of_a_column_are_cut_like_the_large_ones(tmp_path, flip, centre):
    cfg = pair_config(tmp_path, random_flip=flip, center_crop=centre, min_side=4)
    data = open_data(cfg, dataset=pairs([(16, 16), (22, 16), (16, 30)] * 4), progress=False)
    seen = []
    for epoch in range(3):
        for sample in data.samples(data.rows, [epoch] * len(data)):
            assert sample.low_res.shape == (1, 8, 8)
            assert torch.equal(sample.low_res, sample.pixels[:, ::2, ::2])
            seen.append(sample.time_ids)
    assert len({six[2:4] for six in seen}) > (1 if centre and not flip else 2)
    assert {six[:2] for six in seen} == {(16, 16), (16, 22), (30, 16)}


def test_pairs_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match="is 16x16 and its small image 7x7, which must be smaller by .* 2"):
        open_data(pair_config(tmp_path, min_side=4), dataset=pairs([(16, 16)] * 3, shrink=7), progress=False)
    with pytest.raises(DataError, match=r"no column 'tiny' \(data.low_res_column\)"):
        open_data(pair_config(tmp_path, low_res_column="tiny"), dataset=pairs([(16, 16)]), progress=False)
    one, other = pairs([(16, 16)] * 3), pairs([(16, 16)] * 3)
    other = other.map(lambda row: {"small": Image.fromarray(255 - np.asarray(row["small"]))})
    prints = [open_data(pair_config(tmp_path, min_side=4), dataset=d, progress=False).fingerprint for d in (one, other)]
    assert prints[0] != prints[1], "the small images are a part of the data"


def test_sizes_are_those_of_the_crop_that_was_made(tmp_path):
    """A gradient shows where its crop lies; a mirrored one is a crop of the mirrored image, as in diffusers' script."""
    height, width = 20, 40
    image = np.add.outer(np.arange(height) * 4, np.arange(width) * 4).astype("uint8")
    dataset = Dataset.from_dict({"image": [Image.fromarray(image)]}, features=Features({"image": ImageColumn()}))
    cfg = tiny_config(tmp_path / "run", {"kind": "none"})
    cfg = replace(cfg, data=type(cfg.data)(resolution=20, channels=1, random_flip=True))
    data = open_data(cfg, dataset=dataset, progress=False)
    kinds = set()
    for epoch in range(20):
        [sample] = data.samples([0], [epoch])
        pixels = sample.pixels[0].float()
        h, w, top, left, *target = sample.time_ids
        flipped = bool(pixels[0, 0] > pixels[0, -1])
        seen = image[:, ::-1] if flipped else image
        np.testing.assert_allclose(pixels, seen[top : top + 20, left : left + 20].astype(float), atol=1e-3)
        assert (h, w, target) == (height, width, [20, 20])
        kinds.add((flipped, left))
    assert len(kinds) > 10 and {flipped for flipped, _ in kinds} == {True, False}


def test_classes_by_file_name(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(["cat_1.png", "ant_9_x.png", "deep/cat_2.png", "bee_.png"]):
        Image.new("L", (16, 16), i).save(folder / name)
    cfg = tiny_config(tmp_path / "run", {"kind": "class_label"})
    cfg = replace(cfg, data=type(cfg.data)(train_data_dir=str(folder), resolution=16, label_from_filename=True))
    data = open_data(cfg, progress=False)
    assert data.class_names == ["ant", "bee", "cat"]
    labels = {row: sample.label for row, sample in zip(data.rows, data.samples(data.rows, [0] * 4), strict=True)}
    paths = {row: data.table.read([row])[0].path for row in data.rows}
    assert {paths[row]: label for row, label in labels.items()} == {
        "ant_9_x.png": 0, "bee_.png": 1, "cat_1.png": 2, "deep/cat_2.png": 2
    }  # fmt: skip
    Image.new("L", (16, 16)).save(folder / "dog.png")
    with pytest.raises(DataError, match="has an image 'dog.png': rename it"):
        open_data(cfg, progress=False)


def test_classes_by_file_name_are_those_of_improved_diffusion(tmp_path):
    golden = arrays("iddpm_data")
    names = [name[2:] for name in golden if name.startswith("y_")]
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        Image.fromarray(golden[f"in_{name[2]}"]).save(folder / name)
    cfg = tiny_config(tmp_path / "run", {"kind": "class_label"})
    rules = {"train_data_dir": str(folder), "resolution": 16, "label_from_filename": True, "preparation": "iddpm"}
    data = open_data(replace(cfg, data=type(cfg.data)(**rules)), progress=False)
    for row, sample in zip(data.rows, data.samples(data.rows, [0] * 3), strict=True):
        name = data.table.read([row])[0].path
        compare("iddpm_data", f"y_{name}", sample.label, rtol=0)
        compare("iddpm_data", f"out_{name}", normalised(sample.pixels), rtol=0)

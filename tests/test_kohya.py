"""sd-scripts' data as they stand: each image comes as often per epoch as is said, with its own caption."""

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import finetune.datacheck
from finetune.batching import make_loader
from finetune.card import model_card
from finetune.config_io import dump, load, load_text
from finetune.data import TrainData, open_data
from finetune.data_changes import changes
from finetune.errors import ConfigError, DataError
from finetune.plan import data_line
from finetune.provenance import published_config
from forked import log, metrics, run
from test_data import _private_caches, config, images  # noqa: F401
from tiny import ROOT
from tiny import config as tiny_config
from tiny_models import CROSS


def opened(kind="text", **data) -> TrainData:
    return open_data(config(kind, **data), progress=False)


def refusal(kind="text", **data) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        opened(kind, **data)
    return str(caught.value)


def layout(root: Path) -> Path:
    images(root, ["3_sks dog/a.png", "3_sks dog/b.png", "1_dog/a.png", "2_dog/c.png"])
    (root / "3_sks dog" / "b.txt").write_text("b, of sks\nmore\n")
    (root / "2_dog" / "c.caption").write_text("  the c \n")
    return root


TIMES = {"3_sks dog/a.png": 3, "3_sks dog/b.png": 3, "1_dog/a.png": 1, "2_dog/c.png": 2}
SAID = {"3_sks dog/a.png": "sks dog", "3_sks dog/b.png": "b, of sks", "1_dog/a.png": "dog", "2_dog/c.png": "the c"}


def listed(folder: Path, *subsets: dict, dataset="", general="") -> str:
    """A dataset_config of these subsets."""
    tables = ["[general]", general, "[[datasets]]", dataset]
    for subset in subsets:
        tables += ["[[datasets.subsets]]", *(f"{key} = {json.dumps(value)}" for key, value in subset.items())]
    (folder / "data.toml").write_text("\n".join(tables))
    return str(folder / "data.toml")


def paths(data: TrainData) -> list[str]:
    return [row.path for row in data.table.read(data.rows)]


def test_folders_with_numbers_are_repeats(tmp_path, caplog):
    data = opened(train_data_dir=str(layout(tmp_path / "data")))
    assert len(data) == 9 and Counter(paths(data)) == TIMES
    for path, sample in zip(paths(data), data.samples(data.rows, [0] * 9), strict=True):
        assert sample.caption == SAID[path]
    assert data.facts["subsets"] == [
        {"name": "1_dog", "images": 1, "repeats": 1},
        {"name": "2_dog", "images": 1, "repeats": 2},
        {"name": "3_sks dog", "images": 2, "repeats": 3},
    ]
    assert data.facts["rows"] == 9 and data.facts["captions"]["count"] == 4 and not data.facts["duplicates"]
    assert "of 1 text files only the first line is read" in caplog.text
    cfg = config("text", train_data_dir="data")
    assert "9 images by repeats (1_dog 1 x 1, 2_dog 1 x 2, 3_sks dog 2 x 3)" in data_line(data.facts, cfg)
    cfg = replace(cfg, captions={"trigger_word": "sks"})
    card = model_card(cfg, {"data": data.facts}, pipeline="UNetPipeline", samples=False, metrics=[])
    assert "2\\_dog (1 × 2)" in card and "`sks`, in front of every caption" in card


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_image_comes_so_often_in_every_epoch_each_time_with_a_crop_of_its_own(tmp_path, world_size):
    cfg = config("text", train_data_dir=str(layout(tmp_path / "data")), dataloader_num_workers=0)
    data = open_data(cfg, progress=False)
    name = dict(zip(data.rows.tolist(), paths(data), strict=True))
    came, left = [], []
    for rank in range(world_size):
        loader = iter(make_loader(data, cfg, start=0, rank=rank, world_size=world_size, accumulation=1,
                                  micro_batch=18 // world_size, pin_memory=False))  # fmt: skip
        batch = next(loader)
        own = [name[int(row)] for row in batch.rows]
        came += zip((batch.positions // 9).tolist(), own, batch.captions, strict=True)
        left += zip(own, batch.pixel_values[:, 0, 0, 0].tolist(), strict=True)
    for epoch in (0, 1):
        assert Counter(path for e, path, _ in came if e == epoch) == TIMES
    assert all(SAID[path] == text for _, path, text in came)
    assert len({corner for path, corner in left if path == "3_sks dog/a.png"}) > 1, "crops differ"


def test_classes_and_folders_without_numbers_are_as_ever(tmp_path, caplog):
    root = str(layout(tmp_path / "data"))
    classes = opened("class_label", train_data_dir=root)
    assert len(classes) == 4 and classes.class_names == ["1_dog", "2_dog", "3_sks dog"]
    assert "subsets" not in classes.facts
    assert len(opened("none", train_data_dir=root)) == 9, "without text they are repeated all the same"
    years = ["2023_trip/x.png", "2024_trip/y.png"]
    others = [["1_a/x.png", "b/x.png"], ["1_a/x.png", "x.png"], years, ["0_a/x.png"], ["1_a/deep/x.png"]]
    for number, names in enumerate(others):
        other = images(tmp_path / str(number), names)
        assert len(opened("none", train_data_dir=str(other))) == len(names)
    assert "2023_trip, 2024_trip" in caplog.text and "within 1 to 999" in caplog.text


def test_a_repeated_image_is_decoded_once_and_told_once(tmp_path, monkeypatch):
    root, decoded = layout(tmp_path / "data"), []
    whole = finetune.datacheck.decode
    monkeypatch.setattr(finetune.datacheck, "decode", lambda *given: decoded.append(1) or whole(*given))
    opened(train_data_dir=str(root))
    assert len(decoded) == 4
    (root / "3_sks dog" / "a.png").write_bytes(b"broken")
    message = refusal(train_data_dir=str(root))
    assert message.startswith("1 problem in") and "3_sks dog/a.png: is not a PNG" in message
    data = opened(train_data_dir=str(root), on_error="skip")
    assert len(data) == 6 == data.facts["rows"] and data.facts["rows_found"] == 9


def test_what_is_wrong_with_captions_is_told(tmp_path):
    root = layout(tmp_path / "data")
    (root / "3_sks dog" / "b.caption").write_text("another")
    (root / "1_dog" / "a.txt").write_bytes(b"\xff")
    (tmp_path / "secret.txt").write_text("secret")
    (root / "2_dog" / "c.caption").unlink()
    (root / "2_dog" / "c.caption").symlink_to(tmp_path / "secret.txt")
    lines = refusal(train_data_dir=str(root)).splitlines()
    assert "1_dog/a.png: has no caption: a.txt is not UTF-8 text" in lines[1]
    assert "2_dog/c.png: has no caption: c.caption leads out of the folder" in lines[2]
    assert "3_sks dog/b.png: has two captions, b.txt and b.caption: keep one" in lines[3]
    assert len(lines) == 5
    assert len(opened("none", train_data_dir=str(root))) == 9  # captions are not read


def test_a_file_lists_subsets(tmp_path):
    images(tmp_path, ["one/a.png", "one/b.png", "two/c.png", "two/nested/d.png", "three/e.png"])
    (tmp_path / "one" / "a.tags").write_text("x, y, z")
    (tmp_path / "two" / "c.txt").write_text("p, q")
    one = {"image_dir": str(tmp_path / "one"), "num_repeats": 4, "caption_extension": "tags", "class_tokens": "sks"}
    one |= {"shuffle_caption": True, "keep_tokens": 1}
    two = {"image_dir": str(tmp_path / "two"), "caption_prefix": "best"}
    meta = {"e": {"caption": "an e", "tags": "r, s", "train_resolution": [1, 1]}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    three = {"image_dir": str(tmp_path / "three"), "metadata_file": str(tmp_path / "meta.json"), "num_repeats": 2}
    file = listed(tmp_path, one, two, three)
    data = opened(dataset_config=file)
    names = [Path(path).relative_to(tmp_path).as_posix() for path in paths(data)]
    assert Counter(names) == {"one/a.png": 4, "one/b.png": 4, "two/c.png": 1, "three/e.png": 2}
    said = {name: set() for name in names}
    for epoch in range(8):
        for name, sample in zip(names, data.samples(data.rows, [epoch] * 11), strict=True):
            said[name].add(sample.caption)
    assert said == {
        "one/a.png": {"x, y, z", "x, z, y"}, "one/b.png": {"sks"}, "two/c.png": {"best p, q"},
        "three/e.png": {"an e, r, s"},
    }  # fmt: skip
    assert data.captions(0) == ("x, y, z",) and data.table.texts(data.rows) == {"x, y, z", *[
        "sks", "best p, q", "an e, r, s"]}  # fmt: skip
    assert [one["name"] for one in data.facts["subsets"]] == ["one", "two", "three"], "no path of this machine"


def test_a_subset_speaks_for_itself_and_the_rest_comes_from_the_run(tmp_path):
    images(tmp_path, ["one/a.png", "two/b.png"])
    for name in ("one/a.txt", "two/b.txt"):
        (tmp_path / name).write_text("u, v, w")
    one = {"image_dir": str(tmp_path / "one"), "shuffle_caption": False}
    two = {"image_dir": str(tmp_path / "two"), "caption_suffix": "end"}
    cfg = config("text", dataset_config=listed(tmp_path, one, two))
    cfg = replace(cfg, captions={"shuffle": True, "keep_tokens": 1, "trigger_word": "sks"})
    data = open_data(cfg, progress=False)
    drawn = [[s.caption for s in data.samples([0, 1], [epoch] * 2)] for epoch in range(12)]
    assert {first for first, _ in drawn} == {"sks, u, v, w"}
    assert {second for _, second in drawn} == {"sks, u, v, w end", "sks, u, w end, v"}


def test_a_changed_file_changes_the_data(tmp_path):
    images(tmp_path, ["one/a.png", "one/b.png"])
    subset = {"image_dir": str(tmp_path / "one"), "class_tokens": "sks"}

    def digests(**more) -> np.ndarray:
        return opened(dataset_config=listed(tmp_path, subset | more)).digests

    base = digests()
    assert not changes(base, digests()) and not changes(base, digests(num_repeats=1))
    assert changes(base, digests(shuffle_caption=True)).changed.tolist() == [0, 1]
    assert len(changes(base, digests(num_repeats=2)).new) == 2
    plain = images(tmp_path / "plain", ["a.png", "b.png"])
    for name in "ab":
        (plain / f"{name}.txt").write_text("sks")
    assert not changes(base, opened(train_data_dir=str(plain)).digests), "as the same images and captions elsewhere"


def test_metadata_file_is_confined_to_its_folder(tmp_path, caplog):
    images(tmp_path, ["pics/a.png", "pics/sub/b.png", "pics/c.png", "secret.png"])
    here = str(tmp_path / "pics")
    meta = {"a.png": {"caption": "one"}, "sub/b": {"tags": "t"}, "../secret.png": {"caption": "x"},
            str(tmp_path / "secret.png"): {"caption": "y"}, "absent.png": {}, "c": {"caption": 3}}  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    subset = {"image_dir": here, "metadata_file": str(tmp_path / "meta.json")}
    message = refusal(dataset_config=listed(tmp_path, subset))
    assert message.count("leads out of its folder") == 2 and "there is no image 'absent.png'" in message
    assert "'c' has no caption and tags of text" in message and message.startswith("4 problems")
    good = {str(tmp_path / "pics" / "a.png"): {"caption": "one"}, "sub/b": {"tags": "t"}}
    (tmp_path / "meta.json").write_text(json.dumps(good))
    data = opened(dataset_config=listed(tmp_path, subset))
    assert [data.captions(row) for row in data.rows] == [("one",), ("t",)]
    assert "1 images are not listed" in caplog.text
    lines = [{"image_path": "a.png", "caption": "l"}, {"image_path": "c.png", "caption": "m", "image_size": [24, 16]}]
    (tmp_path / "meta.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = opened(dataset_config=listed(tmp_path, subset | {"metadata_file": str(tmp_path / "meta.jsonl")}))
    assert [data.captions(row) for row in data.rows] == [("l",), ("m",)]
    for content, problem in (("{", "is not JSON"), ("[1]", "must hold one object")):
        (tmp_path / "meta.json").write_text(content)
        assert problem in refusal(dataset_config=listed(tmp_path, subset))


def test_errors_teach(tmp_path, caplog):
    images(tmp_path, ["one/a.png", "one/deep/b.png", "empty/x/y.png"])
    message = refusal(dataset_config=listed(tmp_path, {"image_dir": str(tmp_path / "absent")}))
    assert "image_dir" in message and "is not a folder" in message
    message = refusal(dataset_config=listed(tmp_path, {"image_dir": str(tmp_path / "empty")}))
    assert "holds no images (.png, .jpg, ...) of its own" in message
    with caplog.at_level(logging.WARNING):
        message = refusal(dataset_config=listed(tmp_path, {"image_dir": str(tmp_path / "one")}))
    assert "a.png: has no caption: write a.txt or a.caption, or set class_tokens" in message
    assert len(message.splitlines()) == 3 and "1 images in its sub-folders are not read" in caplog.text
    with pytest.raises(ValueError, match="both name the data"):
        config(dataset_config="a.toml", train_data_dir="pics")
    for setting in ({"streaming": True}, {"split": "test"}, {"revision": "main"}):
        with pytest.raises(ValueError, match=f"data.{next(iter(setting))} is not for the folders"):
            config(dataset_config="a.toml", **setting)
    cfg = load(["--dataset_config", "a.toml", "--resolution", "16", "--output_dir", "out"])
    assert cfg.data.dataset_config == "a.toml" and load_text(dump(cfg)) == cfg
    assert published_config(replace(cfg, data=replace(cfg.data, dataset_config="/home/me/a.toml"))) == replace(
        cfg, output_dir="out"
    )


def text_run(folder: Path, data: str, **sections):
    """The tiny run, by a text of up to two pieces, on sd-scripts' data with shuffled and dropped tags."""
    text = {"text_encoder": str(ROOT / "assets" / "text_encoder"), "tokenizer": str(ROOT / "assets" / "tokenizer")}
    settings = {
        "data": {"dataset_name": None, "dataset_config": data, "max_train_samples": None},
        "conditioning": {"kind": "text", "chunks": 2, **text},
        "captions": {"shuffle": True, "tag_dropout": 0.3, "keep_tokens": 1, "trigger_word": "sks"},
        "model": CROSS | {"dropout": 0.0},
        "sample": {"prompts": ["a seven"]},
    }
    return tiny_config(folder, **settings, **sections)


def test_a_run_on_them_resumes_bit_for_bit_and_is_the_same_in_two_processes(tmp_path):
    images(tmp_path, ["one/a.png", "one/b.png", "two/c.png"])
    long = ", ".join(f"tag {n}" for n in range(60))
    for name in ("one/a", "two/c"):
        (tmp_path / f"{name}.txt").write_text(long if name == "one/a" else "seven, eight, nine, ten")
    one = {"image_dir": str(tmp_path / "one"), "num_repeats": 3, "class_tokens": "zero, one, two, three"}
    data = listed(tmp_path, one, {"image_dir": str(tmp_path / "two")}, dataset="resolution = 8")
    losses = {}
    for name, steps, processes in (("whole", [6], 1), ("resumed", [4, 6], 1), ("two", [6], 2)):
        for last in steps:
            cfg = text_run(tmp_path / name, data, train={"max_train_steps": last},
                           optimizer={"lr_scheduler": "constant_with_warmup"})  # fmt: skip
            assert run(cfg, processes=processes) == [0] * processes, log(cfg)
        losses[name] = [line["loss"] for line in metrics(cfg)]
    assert losses["whole"] == losses["resumed"] and len(losses["whole"]) == 6
    assert losses["two"] == pytest.approx(losses["whole"], rel=1e-5)
    cfg = replace(text_run(tmp_path / "plain", data, train={"max_train_steps": 6}), captions={})
    assert run(cfg) == [0]
    assert [line["loss"] for line in metrics(cfg)] != pytest.approx(losses["whole"], rel=1e-3), "negative control"
    facts = json.loads((tmp_path / "whole" / "run.json").read_text())["data"]
    captions = facts["captions"]
    assert facts["rows"] == 7 and captions["texts"] == 3
    assert captions["truncated"] == 1 and captions["tokens"]["longest"] > captions["tokens"]["limit"] == 152
    other = listed(tmp_path, one, dataset="resolution = 16")
    assert run(cfg := text_run(tmp_path / "other", other)) == [2]
    assert "set data.resolution to 16, or take resolution out of data.toml" in log(cfg)

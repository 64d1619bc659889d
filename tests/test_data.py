"""Opening and checking data: each source gives the same samples; everything wrong is told at once, before training."""

import csv
import io
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

import finetune.datacheck
from finetune.config import TrainConfig
from finetune.data import TrainData, open_data
from finetune.errors import ConfigError, DataError

NAMES = [f"{name}.png" for name in "abcdef"]
CAPTIONS = [f"picture {name}" for name in "abcdef"]
LABELS = [0, 1, 1, 0, 2, 1]
CLASSES = ["ant", "bee", "cat"]
TEXT = {"kind": "pooled_text", "text_encoder": "unused", "tokenizer": "unused"}
PROMPTS = {"prompts": ["unused"]}


@pytest.fixture(autouse=True)
def _private_caches(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "caches" / name)


def png(seed: int, width: int = 24, height: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def images(folder: Path, names=NAMES) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    return folder


def config(kind: str = "none", **data) -> TrainConfig:
    text = {"conditioning": TEXT, "sample": PROMPTS, "model": {"kind": "unet2d"}} if kind == "text" else {}
    label = {"conditioning": {"kind": "class_label"}} if kind == "class_label" else {}
    return TrainConfig(output_dir="unused", data={"resolution": 16, **data}, **text, **label)


def opened(kind: str = "none", dataset: Dataset | None = None, **data) -> TrainData:
    return open_data(config(kind, **data), dataset=dataset, progress=False)


def refusal(kind: str = "none", error=DataError, **data) -> str:
    with pytest.raises(error) as caught:
        opened(kind, **data)
    return str(caught.value)


def metadata(folder: Path, records: list[dict], kind: str = "jsonl") -> Path:
    with (folder / f"metadata.{kind}").open("w", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(record) + "\n" for record in records)
        else:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    return folder


def records() -> list[dict]:
    rows = zip(NAMES, CAPTIONS, LABELS, strict=True)
    return [{"file_name": name, "text": caption, "label": label} for name, caption, label in rows]


def memory() -> Dataset:
    columns = {"image": [{"bytes": png(n), "path": None} for n in range(6)], "text": CAPTIONS, "label": LABELS}
    features = Features(
        {"image": datasets.Image(), "text": Value("string"), "label": ClassLabel(names=["0", "1", "2"])}
    )
    return Dataset.from_dict(columns, features=features)


def make_source(kind: str, at: Path) -> dict:
    """Store the six images, captions and labels in one way; the data settings that open it."""
    if kind == "python":
        return {"dataset": memory()}
    if kind == "python, decoded elsewhere":
        return {"dataset": memory().with_format("torch")}
    if kind in ("jsonl", "csv"):
        return {"train_data_dir": str(metadata(images(at), records(), kind))}
    if kind == "parquet":
        memory().to_parquet(at / "train.parquet")
        memory().select([0]).to_parquet(at / "test.parquet")
        return {"dataset_name": str(at)}
    if kind == "one parquet file":
        memory().to_parquet(at / "some.parquet")
        return {"dataset_name": str(at / "some.parquet")}
    if kind == "saved":
        memory().save_to_disk(at / "saved")
        return {"dataset_name": str(at / "saved")}
    if kind == "saved splits":
        DatasetDict(train=memory(), test=memory().select([0])).save_to_disk(at / "saved")
        return {"dataset_name": str(at / "saved")}
    if kind == "arrow":
        memory().save_to_disk(at / "saved")
        return {"dataset_name": str(next((at / "saved").glob("*.arrow")))}
    suffix = kind.removeprefix("table of paths, ")
    table = Dataset.from_list([{**record, "image": "pictures/" + record.pop("file_name")} for record in records()])
    images(at / "pictures")
    (table.to_csv if suffix == "csv" else table.to_json)(at / f"table.{suffix}")
    return {"dataset_name": str(at / f"table.{suffix}")}


SOURCES = [
    "python", "python, decoded elsewhere", "jsonl", "csv", "parquet", "one parquet file", "saved", "saved splits",
    "arrow", "table of paths, csv", "table of paths, jsonl",
]  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_samples_and_fingerprint(kind, tmp_path):
    (tmp_path / "data").mkdir()
    found = make_source(kind, tmp_path / "data")
    for conditioning in ("none", "text", "class_label"):
        data, expected = opened(conditioning, **found), opened(conditioning, dataset=memory())
        assert data.fingerprint == expected.fingerprint and data.facts == expected.facts
        assert data.class_names == (["0", "1", "2"] if conditioning == "class_label" else None)
        for row, (sample, other) in enumerate(
            zip(data.samples(range(6), [1] * 6), expected.samples(range(6), [1] * 6), strict=True)
        ):
            assert torch.equal(sample.pixels, other.pixels) and sample.pixels.shape == (3, 16, 16)
            assert sample.caption == (CAPTIONS[row] if conditioning == "text" else None)
            assert sample.label == (LABELS[row] if conditioning == "class_label" else None)
            assert data.image_bytes(row) == png(row)


def test_the_fingerprint_is_of_the_content_used(tmp_path):
    base = opened("text", dataset=memory()).fingerprint
    assert opened("text", dataset=memory(), resolution=8, random_flip=True).fingerprint == base
    moved = shutil.copytree(metadata(images(tmp_path / "one"), records()), tmp_path / "two")
    assert opened("text", train_data_dir=str(moved)).fingerprint == base
    other = memory().to_dict() | {"text": ["another", *CAPTIONS[1:]]}
    changed = Dataset.from_dict(other, features=memory().features)
    assert opened("text", dataset=changed).fingerprint != base
    assert opened(dataset=changed).fingerprint == opened(dataset=memory()).fingerprint  # captions are not used
    assert opened("text", dataset=memory().select([1, 0, 2, 3, 4, 5])).fingerprint != base


def test_sub_folders_are_classes_and_text_files_captions(tmp_path):
    paths = [f"{CLASSES[label]}/{name}" for label, name in zip(LABELS, NAMES, strict=True)]
    images(tmp_path / "data", paths)
    for path in paths:
        (tmp_path / "data" / path).with_suffix(".txt").write_text(f"about {path}\n")
    (tmp_path / "data" / "README.txt").write_text("belongs to no image")
    (tmp_path / "data" / ".hidden.png").write_bytes(b"not looked at")
    data = opened("class_label", train_data_dir=str(tmp_path / "data"))
    assert data.class_names == CLASSES and data.facts["classes"] == {"ant": 2, "bee": 3, "cat": 1}
    assert [sample.label for sample in data.samples(range(6), [0] * 6)] == [0, 0, 1, 1, 1, 2]
    data = opened("text", train_data_dir=str(tmp_path / "data"))
    assert data.captions(0) == ("about ant/a.png",)


def test_sub_folders_named_like_splits_are_splits(tmp_path):
    images(tmp_path / "data", ["train/a.png", "train/b.png", "test/c.png"])
    assert len(opened(train_data_dir=str(tmp_path / "data"))) == 2
    assert len(opened(train_data_dir=str(tmp_path / "data"), split="test")) == 1
    assert "has no split 'val'" in refusal(train_data_dir=str(tmp_path / "data"), split="val")


def test_several_captions_are_drawn_by_epoch_and_row():
    lists = [[f"{caption} {n}" for n in range(4)] for caption in CAPTIONS]
    columns = {"image": [{"bytes": png(n), "path": None} for n in range(6)], "text": lists, "long": CAPTIONS}
    dataset = Dataset.from_dict(columns)
    data = opened("text", dataset=dataset)
    drawn = [[sample.caption for sample in data.samples(range(6), [epoch] * 6)] for epoch in range(40)]
    assert drawn[0] != drawn[1] and drawn == [[s.caption for s in data.samples(range(6), [e] * 6)] for e in range(40)]
    assert {row[2] for row in drawn} == set(lists[2])
    assert opened("text", dataset=dataset, caption_column=["text", "long"]).captions(3) == (*lists[3], CAPTIONS[3])


def test_rows_without_their_images_are_the_same_rows():
    data = opened("text", memory(), caption_column="text")
    table = data.table.without_images()
    assert [row.captions for row in table.read(range(3))] == [row.captions for row in data.table.read(range(3))]
    assert [row.content for row in table.read(range(3))] == [None] * 3
    clash = memory().add_column("image.path", ["a"] * len(memory()))
    with pytest.raises(DataError, match="have a column 'image.path' too: rename it"):
        opened("text", clash, caption_column="image.path").table.without_images()


def test_classes_by_name_and_by_number():
    def classes(labels) -> tuple[list[str], list[int]]:
        columns = {"image": [{"bytes": png(n), "path": None} for n in range(len(labels))], "label": labels}
        data = opened("class_label", dataset=Dataset.from_dict(columns))
        return data.class_names, [sample.label for sample in data.samples(range(len(labels)), [0] * len(labels))]

    assert classes(["dog", "ant", "dog"]) == (["ant", "dog"], [1, 0, 1])
    assert classes(["9", "10", "9"]) == (["9", "10"], [0, 1, 0])
    assert classes([0, 2, 2]) == (["0", "1", "2"], [0, 2, 2])
    for labels, message in (([0, None, 1], "has no label"), ([0, -1, 1], "label -1"), ([0.5, 1.0, 2.0], "not class")):
        with pytest.raises(DataError, match=message):
            classes(labels)


def test_more_classes_than_the_model_is_told():
    cfg = TrainConfig(output_dir="x", data={"resolution": 16}, conditioning={"kind": "class_label", "num_classes": 2})
    with pytest.raises(DataError, match="has 3 classes, more than conditioning.num_classes 2"):
        open_data(cfg, dataset=memory())


def test_max_train_samples_draws_rows_by_the_seed():
    some = opened(dataset=memory(), max_train_samples=3)
    assert len(some) == 3 and len(set(some.rows.tolist())) == 3
    assert some.rows.tolist() == opened(dataset=memory(), max_train_samples=3).rows.tolist()
    subsets = {
        tuple(open_data(TrainConfig(output_dir="x", seed=s, data=some.rules), dataset=memory()).rows) for s in range(8)
    }
    assert len(subsets) > 1
    assert "max_train_samples 7 is more than the 6 rows" in refusal(dataset=memory(), max_train_samples=7)


def bad_folder(folder: Path) -> Path:
    images(folder, ["good1.png", "good2.png"])
    (folder / "empty.png").touch()
    (folder / "page.png").write_text("<!DOCTYPE html>")
    (folder / "cut.png").write_bytes(png(1, 64, 64)[:2000])
    (folder / "dot.png").write_bytes(png(1, 1, 1))
    (folder / "strip.png").write_bytes(png(1, 4000, 8))
    (folder / "phone.heic").write_bytes(b"...")
    return folder


BAD = {
    "empty.png": "is empty", "page.png": "is not a PNG", "cut.png": "cannot be decoded", "dot.png": "min_side",
    "strip.png": "max_aspect_ratio", "phone.heic": "format that is not read",
}  # fmt: skip


def test_everything_wrong_is_reported_at_once(tmp_path):
    lines = refusal(train_data_dir=str(bad_folder(tmp_path / "data"))).splitlines()
    assert lines[0].startswith("6 problems in ") and "data.on_error skip" in lines[-1]
    for name, reason in BAD.items():
        assert any(line.startswith(f"  {name}: ") and reason in line for line in lines), name
    assert not any("good" in line for line in lines)


def test_skip_leaves_bad_rows_out_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = opened(train_data_dir=str(bad_folder(tmp_path / "data")), on_error="skip")
    assert [data.table.read([row])[0].path for row in data.rows] == ["good1.png", "good2.png"]
    assert data.facts["left_out"] == 6 and data.facts["rows"] == len(data) == 2
    assert all(name in caplog.text for name in BAD) and "not trained on" in caplog.text
    for name in ("good1.png", "good2.png"):
        (tmp_path / "data" / name).unlink()
    assert "no usable row" in refusal(train_data_dir=str(tmp_path / "data"), on_error="skip")


def test_a_long_report_is_cut_after_fifty_lines(tmp_path):
    images(tmp_path, ["good.png"])
    for number in range(60):
        (tmp_path / f"{number}.png").touch()
    message = refusal(train_data_dir=str(tmp_path))
    assert message.startswith("60 problems") and message.count("is empty") == 50 and "and 10 more" in message


def test_captions_must_be_there_and_may_be_empty(tmp_path):
    folder = metadata(images(tmp_path / "data"), [{**record, "text": ""} for record in records()])
    assert opened("text", train_data_dir=str(folder)).facts["captions"]["empty"] == 6
    metadata(folder, [*records()[:4], {"file_name": "e.png"}, {"file_name": "f.png", "text": None}])
    message = refusal("text", train_data_dir=str(folder))
    assert message.startswith("2 problems") and "e.png (metadata.jsonl:5): has no caption" in message
    assert "f.png (metadata.jsonl:6): has no caption" in message
    assert len(opened("text", train_data_dir=str(folder), on_error="skip")) == 4
    assert len(opened(train_data_dir=str(folder))) == 6  # captions are not used


def test_metadata_and_images_must_match(tmp_path):
    folder = metadata(images(tmp_path), [*records()[:5], {"file_name": "gone.png", "text": "x"}])
    message = refusal("text", train_data_dir=str(folder))
    assert "metadata.jsonl:6: there is no file 'gone.png'" in message and "f.png: is not listed" in message
    metadata(folder, [{"file_name": "gone.png", "text": "x"}])
    assert "7 problems" in refusal("text", train_data_dir=str(folder))  # six images that are not listed
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{oops\n')
    assert "metadata.jsonl:2: not JSON" in refusal(train_data_dir=str(folder))
    metadata(folder, [{**records()[0], "text": 1}, records()[1]])
    assert "a.png (metadata.jsonl:1): 'text' is a number where other" in refusal("text", train_data_dir=str(folder))
    (folder / "metadata.csv").write_text("file_name\na.png\n")
    assert "keep one of them" in refusal(train_data_dir=str(folder))
    (folder / "metadata.jsonl").unlink()
    (folder / "a.txt").write_text("a caption")
    assert "keep one of them" in refusal(train_data_dir=str(folder))


@pytest.mark.parametrize(
    "path, reason",
    [("../secret.png", "'..'"), ("x/../../secret.png", "'..'"), ("/etc/secret.png", "absolute"),
     ("C:\\secret.png", "absolute"), ("https://host/a.png", "address"), ("zip://a.png::b.zip", "address"),
     (None, "not a file name")],
)  # fmt: skip
def test_paths_out_of_the_folder_are_refused_with_their_line(path, reason, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(0))
    folder = metadata(images(tmp_path / "data"), [records()[0], {"file_name": path, "text": "x"}])
    message = refusal("text", train_data_dir=str(folder))
    assert "metadata.jsonl:2: file_name" in message and reason in message
    data = opened("text", train_data_dir=str(folder), on_error="skip")
    assert [data.table.read([row])[0].path for row in data.rows] == ["a.png"]
    if path is not None:
        Dataset.from_dict({"image": ["a.png", path]}).to_csv(folder / "table.csv")
        assert "row 1" in refusal(dataset_name=str(folder / "table.csv"))
        rows = Dataset.from_dict({"image": [{"bytes": png(0), "path": None}, {"bytes": None, "path": path}]})
        rows.to_parquet(folder / "table.parquet")
        assert refusal(dataset_name=str(folder / "table.parquet")).startswith("1 problem ")


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder = images(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes(png(0))
    (folder / "within.png").symlink_to(folder / "a.png")
    assert len(opened(train_data_dir=str(folder))) == 7
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert "link.png: is a link that leads out of the folder" in refusal(train_data_dir=str(folder))
    assert len(opened(train_data_dir=str(folder), on_error="skip")) == 7
    (folder / "link.png").unlink()
    (folder / "sub").symlink_to(tmp_path, target_is_directory=True)
    assert "link to a folder" in refusal(train_data_dir=str(folder))
    assert len(opened(train_data_dir=str(folder), on_error="skip")) == 7
    (folder / "sub").unlink()
    (folder / "metadata.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert "leads out of the folder" in refusal(train_data_dir=str(folder), on_error="skip")  # not other data instead
    (folder / "metadata.jsonl").unlink()
    whole = tmp_path / "linked"
    whole.symlink_to(folder)  # what the user names may be a link
    data = opened(train_data_dir=str(whole))
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(tmp_path / "secret.png")  # after the check
    with pytest.raises(DataError, match="a.png leads out of the folder"):
        data.samples([0], [0])


def test_errors_about_sources_teach(tmp_path):
    folder = images(tmp_path / "data")
    (tmp_path / "nothing").mkdir()
    assert "has no rows" in refusal(dataset=memory().select([]))
    assert "holds no images" in refusal(train_data_dir=str(tmp_path / "nothing"))
    assert "columns found: image. " in refusal("text", train_data_dir=str(folder))
    assert "a.txt beside each a.jpg" in refusal("text", train_data_dir=str(folder))
    assert "columns found: image, text, label" in refusal("text", dataset=memory(), caption_column="caption")
    assert "its sub-folder" in refusal("class_label", train_data_dir=str(folder))
    assert "holds ClassLabel" in refusal(dataset=memory(), image_column="label")
    assert "no data" in refusal(error=ConfigError)
    assert "give one of them" in refusal(error=ConfigError, dataset=memory(), train_data_dir=str(folder))
    assert "local path" in refusal(error=ConfigError, train_data_dir=str(folder), revision="main")
    assert "data.background" in refusal(error=ConfigError, dataset=memory(), background="whitish")
    assert "pass one split of it: train" in refusal(dataset=DatasetDict(train=memory()))
    assert "is not a folder" in refusal(train_data_dir=str(tmp_path / "absent"))
    assert "no such file or folder" in refusal(dataset_name="./absent/data")
    (tmp_path / "a.zip").touch()
    assert "is not a file that is read" in refusal(dataset_name=str(tmp_path / "a.zip"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    assert "cannot be read" in refusal(dataset_name=str(tmp_path / "broken.parquet"))


def test_a_hub_id_that_cannot_be_loaded_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal(dataset_name="nobody/nothing-here")
    assert "nobody/nothing-here is not a local path, and cannot be loaded from the Hub" in message


@pytest.fixture
def decoded(monkeypatch) -> list:
    """Every decode of the check, counted."""
    calls, real = [], finetune.datacheck.decode
    monkeypatch.setattr(finetune.datacheck, "decode", lambda *arguments: (calls.append(1), real(*arguments))[1])
    return calls


def test_a_second_run_decodes_nothing_unless_something_changed(tmp_path, decoded):
    folder = str(bad_folder(tmp_path / "data"))
    first, first_report = opened(train_data_dir=folder, on_error="skip"), refusal(train_data_dir=folder)
    assert len(decoded) == 7
    again = opened(train_data_dir=folder, on_error="skip")
    assert len(decoded) == 7 and refusal(train_data_dir=folder) == first_report
    assert again.fingerprint == first.fingerprint and again.facts == first.facts
    assert again.rows.tolist() == first.rows.tolist()
    opened(train_data_dir=folder, on_error="skip", random_flip=True)
    assert len(decoded) == 7  # a setting that no check depends on
    (tmp_path / "data" / "good1.png").write_bytes(png(77))
    assert opened(train_data_dir=folder, on_error="skip").fingerprint != first.fingerprint and len(decoded) == 14
    opened(train_data_dir=folder, on_error="skip", min_side=1)
    assert len(decoded) == 21


def test_a_file_that_is_replaced_by_one_of_its_size_is_noticed(tmp_path, decoded):
    folder = images(tmp_path / "data")
    opened(train_data_dir=str(folder))
    os.utime(folder / "c.png", ns=(1, 1))
    opened(train_data_dir=str(folder))
    assert len(decoded) == 12


def test_the_cache_holds_for_data_from_python_and_parquet_and_survives_damage(tmp_path, decoded, caplog):
    memory().to_parquet(tmp_path / "train.parquet")
    for source in ({"dataset": memory()}, {"dataset_name": str(tmp_path / "train.parquet")}):
        decoded.clear()
        first = opened(**source)
        assert len(decoded) == 6 and opened(**source).fingerprint == first.fingerprint and len(decoded) == 6
    for entry in (tmp_path / "caches").rglob("datacheck/*.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-8] + bytes(8))
    assert opened(dataset=memory()).fingerprint == first.fingerprint and len(decoded) == 12
    assert "made anew" in caplog.text


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "file")
    assert len(opened(dataset=memory())) == 6 and "cannot be kept" in caplog.text


def test_facts_tell_what_happens_to_the_images(tmp_path):
    folder = images(tmp_path / "data")
    Image.new("RGBA", (8, 40), (9, 9, 9, 128)).save(folder / "glass.png")
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(folder / "deep.png")
    facts = opened(train_data_dir=str(folder), on_error="skip").facts
    assert facts == json.loads(json.dumps(facts))
    assert facts["rows"] == facts["rows_found"] == 8 and facts["upscaled"] == 1
    assert facts["width"] == {"min": 8, "median": 24, "max": 24} and facts["height"]["max"] == 40
    assert facts["traits"] == {"more than 8 bits": 1, "transparent": 1}


def test_a_row_that_changes_after_the_check_is_named(tmp_path):
    data = opened(train_data_dir=str(images(tmp_path / "data")))
    (tmp_path / "data" / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match="b.png is empty .* was usable when the data was checked"):
        data.samples([0, 1], [0, 0])


def test_pickles_and_gives_the_same_samples(tmp_path):
    data = opened("text", train_data_dir=str(metadata(images(tmp_path / "data"), records())))
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.samples([3], [2])[0].pixels, data.samples([3], [2])[0].pixels)


def test_many_rows_checked_by_threads_agree_with_the_loop():
    columns = {"image": [{"bytes": png(n, 16, 16), "path": None} for n in range(500)]}
    data = opened(dataset=Dataset.from_dict(columns))
    assert [data.image_bytes(row) for row in data.rows] == [image["bytes"] for image in columns["image"]]
    half = opened(dataset=Dataset.from_dict(columns).select(range(250)))
    assert half.fingerprint != data.fingerprint and data.facts["rows"] == 500

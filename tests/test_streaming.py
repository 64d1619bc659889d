"""Training from shards: the same samples as from loaded data, nothing lost or repeated at a resume, faults told."""

import io
import itertools
import json
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image

from fake_hub import FakeHub, Reply
from finetune.batching import make_loader
from finetune.config import TrainConfig
from finetune.data import TrainData, open_data
from finetune.errors import ConfigError, DataError
from finetune.order import RowOrder
from finetune.plan import data_line
from finetune.samples import Sample
from finetune.shards import Shards
from forked import last_step, log, metrics, run, state
from tiny import ROOT, config

STEPS = 9  # 72 samples of 23 rows: the run stops in the middle of its fourth epoch
IMAGE = datasets.Image(decode=False)
GROUPS = [[4, 3], [5], [1, 6], [4]]  # rows of each row group of each shard


@pytest.fixture(autouse=True)
def _private_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "caches")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A folder of shards of real digits, and loaded.parquet beside it with the same rows in one file."""
    folder = tmp_path_factory.mktemp("digits") / "shards"
    folder.mkdir()
    write_shards(folder)
    return folder


def write_shards(folder: Path, *, spoiled: Sequence[int] = ()) -> None:
    """spoiled: numbers of rows whose image is none."""
    table = pq.read_table(ROOT / "assets" / "digits" / "train.parquet").slice(0, sum(map(sum, GROUPS)))
    rows = table.to_pylist()
    for number in spoiled:
        rows[number]["image"]["bytes"] = b"no image"
    table, first = pa.Table.from_pylist(rows, schema=table.schema), 0
    for number, groups in enumerate(GROUPS):
        with pq.ParquetWriter(folder / f"train-{number:05d}.parquet", table.schema) as writer:
            for count in groups:
                writer.write_table(table.slice(first, count))
                first += count
    pq.write_table(table, folder.parent / "loaded.parquet")


def streamed(output_dir: Path, digits: Path, workers: int = 0, **sections) -> TrainConfig:
    """The tiny run on the shards, mixing four of the six row groups at a time."""
    data = {"dataset_name": str(digits), "streaming": True, "max_train_samples": None, "shuffle_buffer_size": 60}
    data |= {"dataloader_num_workers": workers} | sections.pop("data", {})
    return config(output_dir, data=data, **{"train": {"max_train_steps": STEPS, "global_batch_size": 8}} | sections)


def opened(digits: Path, **data) -> TrainData:
    return open_data(streamed(Path("unused"), digits, data=data), progress=False)


def same(one: Sample, other: Sample) -> bool:
    return torch.equal(one.pixels, other.pixels) and (one.label, one.time_ids) == (other.label, other.time_ids)


def test_the_samples_are_those_of_loaded_data(digits):
    stream = opened(digits)
    loaded = opened(digits.parent / "loaded.parquet", streaming=False, shuffle_buffer_size=None)
    assert len(stream) == len(loaded) == 23 and stream.class_names == loaded.class_names
    assert stream.order(global_batch=8).lanes == 4 and isinstance(loaded.order(global_batch=8), RowOrder)
    numbers = [22, 0, 7, 7, 15]
    for epoch in (0, 3):
        pairs = zip(stream.samples(numbers, [epoch] * 5), loaded.samples(numbers, [epoch] * 5), strict=True)
        assert all(same(one, other) for one, other in pairs)
    assert not same(*stream.samples([0, 1], [0, 0]))
    assert stream.image_bytes(9) == loaded.image_bytes(9)
    shown = "23 images, streamed from 6 row groups of 4 shards, -> 8x8"
    assert data_line(stream.facts, streamed(Path("unused"), Path("digits"))) == f"digits: {shown}"
    assert stream.facts == {"rows_found": 23, "rows": 23, "left_out": 0, "shards": 4, "row_groups": 6}


def seen(data: TrainData, steps: range, workers: int, **layout) -> list[tuple[int, int]]:
    """(position, row) of all samples of these steps."""
    layout = {"rank": 0, "world_size": 1, "accumulation": 1, "micro_batch": 8} | layout
    cfg = streamed(Path("unused"), Path("unused"), workers=workers)
    loader = make_loader(data, cfg, start=steps.start, pin_memory=False, **layout)
    batches = itertools.islice(loader, len(steps))
    return [pair for batch in batches for pair in zip(batch.positions.tolist(), batch.rows.tolist(), strict=True)]


@pytest.mark.parametrize("workers", [(0, 2), (2, 2), (2, 0)], ids=str)
def test_a_shuffled_stream_that_is_resumed_loses_nothing(digits, workers):
    """As a resumed `datasets` stream with a shuffle buffer does, which with two workers ends with an IndexError."""
    data = opened(digits)
    pairs = seen(data, range(4), workers[0]) + seen(data, range(4, 9), workers[1])
    assert [position for position, _ in pairs] == list(range(72))
    epochs = [[row for _, row in pairs[start : start + 23]] for start in range(0, 69, 23)]
    assert all(sorted(rows) == list(range(23)) for rows in epochs) and epochs[0] != epochs[1]


def test_a_resume_reads_what_its_batch_needs(digits, monkeypatch):
    data, read, units = pickle.loads(pickle.dumps(opened(digits))), Shards._read, []  # as in a loader process
    monkeypatch.setattr(Shards, "_read", lambda self, unit, count: units.append(unit) or read(self, unit, count))
    pairs = seen(data, range(7, 8), 0)
    ends = np.cumsum(list(itertools.chain(*GROUPS)))
    assert sorted(units) == sorted({int(np.searchsorted(ends, row, side="right")) for _, row in pairs})


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_take_the_rows_of_one(digits, world_size):
    data = opened(digits)
    layout = {"world_size": world_size, "micro_batch": 8 // world_size}
    shared = [pair for rank in range(world_size) for pair in seen(data, range(6), 0, rank=rank, **layout)]
    assert sorted(shared) == seen(data, range(6), 0)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory, digits):
    """reference(processes) -> configuration of an uninterrupted run that is done."""
    known: dict[int, TrainConfig] = {}

    def uninterrupted(processes: int) -> TrainConfig:
        if processes not in known:
            known[processes] = cfg = streamed(tmp_path_factory.mktemp("reference") / "run", digits)
            assert run(cfg, processes=processes) == [0] * processes, log(cfg)
        return known[processes]

    return uninterrupted


@pytest.mark.parametrize(
    ("processes", "starts"),
    [(1, [(0, 2), (2, 6), (0, None)]), (2, [(0, 3), (0, None)])],
    ids=["1 process, workers 0 2 0", "2 processes"],
)
def test_killed_and_resumed_is_bit_equal(tmp_path, digits, reference, processes, starts):
    for workers, stop in starts:
        cfg = streamed(tmp_path / "run", digits, workers=workers)
        codes = run(cfg, processes=processes, stop=stop and (stop, signal.SIGKILL))
        assert codes == [-signal.SIGKILL if stop else 0] * processes, log(cfg)
    expected = reference(processes)
    assert state(cfg, STEPS) == state(expected, STEPS)
    losses = [[(line["step"], line["loss"], line["lr"]) for line in metrics(one)] for one in (cfg, expected)]
    assert losses[0] == losses[1]


def test_the_number_of_processes_may_change(tmp_path, digits):
    model = {"dropout": 0.0}
    plain = streamed(tmp_path / "plain", digits, model=model)
    elastic = streamed(tmp_path / "elastic", digits, model=model)
    assert run(plain) == [0], log(plain)
    for processes, stop in [(1, 3), (2, 6), (1, None)]:
        run(elastic, processes=processes, stop=stop and (stop, signal.SIGTERM))
    assert last_step(elastic) == STEPS, log(elastic)
    for a, b in zip(metrics(plain), metrics(elastic), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["lr"] == b["lr"]


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_images_inside_shards_are_replaced_alike_at_a_resume(tmp_path, reference, processes):
    """Row 2 is among those that are read before the training, row 20 is not."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder, spoiled=[2, 20])
    assert 4 in run(streamed(tmp_path / "error", folder), processes=processes, seconds=60)
    straight, stopped = (streamed(tmp_path / name, folder, data={"on_error": "skip"}) for name in ("one", "two"))
    assert run(straight, processes=processes) == [0] * processes, log(straight)
    run(stopped, processes=processes, stop=(4, signal.SIGKILL))
    assert run(stopped, processes=processes) == [0] * processes, log(stopped)
    assert state(stopped, STEPS) == state(straight, STEPS)
    assert state(straight, STEPS) != state(reference(processes), STEPS), "negative control: the rows mattered"
    assert log(straight).count("of " + str(folder / "train-00003.parquet")) in range(1, processes + 1)


def test_a_changed_order_or_changed_shards_are_another_run(tmp_path, digits):
    train = {"max_train_steps": 2, "global_batch_size": 8}
    cfg = streamed(tmp_path / "run", digits, train=train)
    assert run(cfg) == [0], log(cfg)
    assert run(streamed(tmp_path / "run", digits, data={"shuffle_buffer_size": 30})) == [2]
    assert "data.shuffle_buffer_size: 60 -> 30" in log(cfg)
    assert run(streamed(tmp_path / "run", digits, data={"max_train_samples": 20})) == [2]
    assert "data.content: " in log(cfg)


def test_a_damaged_shard_ends_the_run_with_its_name(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder)
    path = folder / "train-00002.parquet"
    content = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[place : place + 20] = b"\xff" * 20  # the header of a page
    path.write_bytes(content)
    for processes, workers in [(1, 0), (1, 1), (2, 0)]:
        cfg = streamed(tmp_path / f"run{processes}{workers}", folder, workers=workers)
        assert 4 in run(cfg, processes=processes, seconds=30)
        assert "train-00002.parquet, row group 1 (rows 13 to 18 of the data) cannot be read" in log(cfg)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_of_many_rows_some_are_drawn_by_the_seed(digits):
    data = opened(digits, max_train_samples=10)
    assert len(data) == 10 and data.facts["rows"] == 10 and data.facts["rows_found"] == 23
    order = data.order(global_batch=8)
    assert sorted(order.row_at(2, index) for index in range(10)) == list(data.rows)
    fingerprints = [opened(digits, max_train_samples=wanted).fingerprint for wanted in (10, 11, 23, None)]
    assert data.fingerprint == fingerprints[0] and len(set(fingerprints[:3])) == 3
    assert fingerprints[2] == fingerprints[3]
    with pytest.raises(DataError, match="max_train_samples 24 is more than the 23 rows"):
        opened(digits, max_train_samples=24)


def test_the_first_rows_are_checked(tmp_path, caplog):
    contents = [png(0), png(1), b"<html>", png(3)]
    images = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(contents)]
    Dataset.from_dict({"image": images}, Features({"image": IMAGE})).to_parquet(tmp_path / "x.parquet")
    assert "row 2 (2.png): is not a PNG" in refusal(tmp_path / "x.parquet")
    assert len(open_data(plain(tmp_path / "x.parquet", on_error="skip"), progress=False)) == 4
    assert "row 2 (2.png): is not a PNG" in caplog.text


def test_a_row_that_is_bad_when_it_is_drawn_is_named_with_its_shard(tmp_path):
    contents = [png(n) for n in range(20)] + [b"<html>"]
    images = [{"bytes": content, "path": None} for content in contents]
    Dataset.from_dict({"image": images}, Features({"image": IMAGE})).to_parquet(tmp_path / "x.parquet")
    data = open_data(plain(tmp_path), progress=False)
    with pytest.raises(DataError, match=r"^row 20 of .*x\.parquet is not a PNG.*\)$"):
        data.samples([19, 20], [0, 0])


def test_small_images_and_captions_are_those_of_loaded_data(tmp_path):
    columns = {"image": [png(n, 16) for n in range(6)], "small": [png(n, 8) for n in range(6)]}
    columns = {name: [{"bytes": content, "path": None} for content in cells] for name, cells in columns.items()}
    columns["text"] = [[f"one {n}", f"two {n}"] for n in range(6)]
    rows = Dataset.from_dict(columns, Features({"image": IMAGE, "small": IMAGE, "text": List(Value("string"))}))
    rows.to_parquet(tmp_path / "x.parquet", batch_size=4)
    text = {"text_encoder": "unused", "tokenizer": "unused"}
    both = {"kind": "several", "pooled_text": text, "low_res": {"factor": 2}}
    samples = []
    for streaming in (True, False):
        data = {"resolution": 8, "low_res_column": "small", "streaming": streaming}
        cfg = TrainConfig(output_dir="x", data=data | {"dataset_name": str(tmp_path / "x.parquet")}, conditioning=both)
        samples.append(open_data(cfg, progress=False).samples(range(6), [2] * 6))
    assert all(same(*pair) and torch.equal(*(one.low_res for one in pair)) for pair in zip(*samples, strict=True))
    assert all(one.caption == other.caption for one, other in zip(*samples, strict=True))


def png(seed: int, side: int = 9) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_files_outside_are_not_read(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    for path in (str(tmp_path / "secret.png"), "../secret.png"):
        image = pa.array([{"bytes": None, "path": path}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pa.table({"image": image}), tmp_path / "data" / "x.parquet")
        with pytest.raises(DataError, match="leads out of the folder of the data"):
            open_data(plain(tmp_path / "data"), progress=False)


def plain(path: Path | str, **data) -> TrainConfig:
    return TrainConfig(output_dir="x", data={"resolution": 8, "dataset_name": str(path), "streaming": True, **data})


def refusal(path: Path | str, error=DataError, **data) -> str:
    with pytest.raises(error) as caught:
        open_data(plain(path, **data), progress=False)
    return str(caught.value)


def test_what_cannot_be_streamed_names_the_way_out(tmp_path):
    rows = Dataset.from_dict({"image": ["a.png"], "label": [0]})
    rows.to_csv(tmp_path / "x.csv")
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "paths.parquet")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.png")
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "0.tar").write_bytes(b"")
    assert "convert it with datasets (load_dataset" in refusal(tmp_path / "x.csv")
    assert "load_from_disk" in refusal(tmp_path / "saved")
    assert "embed_table_storage" in refusal(tmp_path / "images")
    assert "embed_table_storage" in refusal(tmp_path / "paths.parquet")
    assert "convert it" in refusal(tmp_path / "tar")
    assert "no split 'test'" in refusal(split(tmp_path), split="test")
    assert "cannot be opened on the Hub" in refusal("user/none")
    assert "no such file" in refusal(tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="remove data.streaming"):
        open_data(TrainConfig(output_dir="x", data={"resolution": 8, "streaming": True}), dataset=rows)
    with pytest.raises(DataError, match="set data.streaming true"):
        open_data(TrainConfig(output_dir="x", data={"resolution": 8}), dataset=rows.to_iterable_dataset())


def split(folder: Path) -> Path:
    (folder / "named").mkdir()
    (folder / "paths.parquet").rename(folder / "named" / "train.parquet")
    return folder / "named"


def test_class_names_are_needed(tmp_path, digits):
    table = pq.read_table(digits / "train-00000.parquet").replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="cast the column to datasets.ClassLabel, or remove data.streaming"):
        opened(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle_buffer_size": 10}, "without data.streaming"),
        ({"streaming": True, "dataset_name": "a/b", "split": "train[:9]"}, "name one split"),
        ({"streaming": True, "dataset_name": "a/b", "split": "train+test"}, "name one split"),
        ({"streaming": True, "train_data_dir": "photos"}, "is a folder of images"),
        ({"streaming": True, "dataset_name": "a/b", "label_from_filename": True}, "names of all images"),
        ({"streaming": True, "dataset_name": "a/b", "shuffle_buffer_size": 0}, "greater than"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(output_dir="x", data={"resolution": 8, **settings})


# -- the Hub -----------------------------------------------------------------------------------------------------------


class DatasetHub(FakeHub):
    """A Hub whose repositories are data sets, all files at the top."""

    def answer(self, request):
        """As of a model, whose addresses differ."""
        if re.search(r"/tree/\w+/", request.path):
            raise Reply(404, "no such folder", X_Error_Code="EntryNotFound")
        request.path = request.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        return super().answer(request)


HUB_RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
from finetune.data import open_data
from finetune.pretrained import commits
from tiny import config
def opened(**data):
    data = {"dataset_name": "user/digits", "max_train_samples": None} | data
    return open_data(config(Path("unused"), data=data), progress=False)
data, loaded = opened(streaming=True, shuffle_buffer_size=60), opened()
for one, other in zip(*(one.samples(range(23), [0] * 23) for one in (data, loaded)), strict=True):
    assert (one.pixels == other.pixels).all() and (one.label, one.time_ids) == (other.label, other.time_ids)
print(json.dumps([data.facts, data.fingerprint, data.class_names, commits()]))
"""


def test_shards_on_the_hub_give_the_samples_of_what_is_loaded_from_it(tmp_path, digits, monkeypatch):
    with DatasetHub() as hub:
        repo = hub.add_repo("user/digits", private=False)
        shards = sorted(digits.glob("*.parquet"))
        oid = repo.commit({f"{path.stem}-of-00004.parquet": (path.read_bytes(), True) for path in shards})
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        hub.fail(r"train-00003", 503, method="GET", times=1)  # the client asks again
        command = [sys.executable, "-c", HUB_RUN]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
        assert done.returncode == 0, done.stderr
        facts, fingerprint, classes, commits = json.loads(done.stdout.splitlines()[-1])
    local = opened(digits)
    assert facts == local.facts and fingerprint == local.fingerprint
    assert commits == {"datasets/user/digits@main": oid}
    assert classes == local.class_names
    named = [request.path for request in hub.requests if "/resolve/" in request.path and "parquet" in request.path]
    assert named and all(oid in path for path in named)

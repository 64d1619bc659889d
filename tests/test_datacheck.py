"""The corpus of bad data: the check lists exactly what is bad, in one report, cheaply; the rest is trained on."""

import hashlib
import itertools
import json
import resource
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset

import finetune.datacheck
import finetune.rows
from bad_data import SIDE, Corpus, bomb, make
from finetune.batching import make_loader
from finetune.config import Data, TrainConfig
from finetune.data import TrainData, open_data
from finetune.errors import DataError
from finetune.images import normalised
from finetune.rows import rows_of
from finetune.sources import Source
from finetune.trainer import Trainer
from forked import log, metrics, run
from tiny import config as tiny_config

KINDS = ["flat", "texts", "jsonl", "csv"]
TEXT = {
    "conditioning": {"kind": "pooled_text", "text_encoder": "unused", "tokenizer": "unused"},
    "sample": {"prompts": ["unused"]},
    "model": {"kind": "unet2d"},
}


@pytest.fixture(autouse=True)
def _private_caches(tmp_path, monkeypatch):
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "caches" / name)


def config(corpus: Corpus, kind: str, **data) -> TrainConfig:
    text = TEXT if kind != "flat" else {}
    return TrainConfig(
        output_dir="unused", data={"resolution": SIDE, "train_data_dir": str(corpus.folder)} | data, **text
    )


def opened(corpus: Corpus, kind: str, **data) -> TrainData:
    return open_data(config(corpus, kind, **data), progress=False)


def paths(data: TrainData) -> list[str]:
    return [row.path for row in data.table.read(data.rows)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_report_lists_exactly_what_is_bad(kind, tmp_path):
    corpus = make(tmp_path / "data", kind)
    begin = time.monotonic()
    with pytest.raises(DataError) as caught:
        opened(corpus, kind)
    assert time.monotonic() - begin < 5
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"{len(corpus.bad)} problems in {corpus.folder}:" and "data.on_error skip" in last
    unmatched = dict(corpus.bad)
    for line in lines:
        (name,) = [name for name in unmatched if line.startswith(f"  {name}: ")] or [f"nothing like {line}"]
        assert unmatched.pop(name) in line, line
    assert not unmatched


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_good_looks_right_and_is_trained_on_with_skip(kind, tmp_path):
    corpus = make(tmp_path / "data", kind)
    data = opened(corpus, kind, on_error="skip", center_crop=True)
    assert sorted(paths(data)) == sorted([*corpus.good, *corpus.twice])
    for path, sample in zip(paths(data), data.samples(data.rows, [0] * len(data)), strict=True):
        shown, difference = corpus.good[path]
        levels = (normalised(sample.pixels).numpy().transpose(1, 2, 0) + 1) * 127.5
        assert np.abs(levels - shown).max() <= difference + 1e-4, path
        assert abs(levels.mean() - np.mean(shown)) <= 0.01 * 255, path
        assert sample.caption is None or sample.caption == f"about {Path(path).stem}"
    assert data.facts["left_out"] == len(corpus.bad)
    assert data.facts["duplicates"] >= len(corpus.twice)
    layout = {"start": 0, "rank": 0, "world_size": 1, "accumulation": 1, "micro_batch": 1, "pin_memory": False}
    epoch = itertools.islice(make_loader(data, config(corpus, kind), **layout), len(data))
    assert sorted(int(batch.rows) for batch in epoch) == data.rows.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_negative_control_without_the_bad_ones_nothing_is_reported(kind, tmp_path, caplog):
    corpus = make(tmp_path / "data", kind, bad=False)
    data = opened(corpus, kind)
    assert data.facts["left_out"] == 0 and len(data) == len(corpus.good) + len(corpus.twice) and not caplog.text
    (corpus.folder / "grey.png").write_bytes(b"")
    with pytest.raises(DataError, match="^1 problem in .*\n  grey.png( .metadata.*)?: is empty"):
        opened(corpus, kind)


def test_a_run_trains_on_the_good_ones(tmp_path):
    corpus = make(tmp_path / "data", "flat")
    data = {"dataset_name": None, "train_data_dir": str(corpus.folder), "max_train_samples": None, "resolution": 8}
    cfg = tiny_config(tmp_path / "run", data=data | {"on_error": "skip"}, conditioning={"kind": "none"})
    assert run(cfg, body=lambda cfg: Trainer(cfg).fit()) == [0], log(cfg)
    assert all(np.isfinite(line["loss"]) for line in metrics(cfg))
    refused = tiny_config(tmp_path / "refused", data=data, conditioning={"kind": "none"})
    assert run(refused) == [4]
    assert all(name in log(refused) for name in corpus.bad) and not metrics(refused)


def growth(corpus: Corpus, tmp_path: Path, **data) -> float:
    """By how many MB the check grows a process at its peak."""

    def body(cfg):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        opened(corpus, "flat", on_error="skip", **data)
        print(json.dumps({"grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before}))

    cfg = tiny_config(tmp_path / "measured")
    assert run(cfg, body=body) == [0], log(cfg)
    return json.loads(log(cfg).splitlines()[-1])["grown"] / 1024


def test_bombs_cost_no_memory(tmp_path):
    assert growth(make(tmp_path / "data", "flat"), tmp_path) < 300


def test_negative_control_the_measurement_sees_a_bomb_go_off(tmp_path):
    (tmp_path / "data").mkdir()
    for name, content in (("plain.png", bomb(SIDE, whole=True)), ("bomb.png", bomb(9487, whole=True))):
        (tmp_path / "data" / name).write_bytes(content)
    assert growth(Corpus(tmp_path / "data"), tmp_path, max_pixels=100_000_000) > 300


def test_the_digests_belong_to_the_rows_and_are_cached(tmp_path, monkeypatch):
    corpus = make(tmp_path / "data", "jsonl")
    first = opened(corpus, "jsonl", on_error="skip")
    monkeypatch.setattr(finetune.datacheck, "decode", None)  # nothing is decoded again
    again = opened(corpus, "jsonl", on_error="skip")
    assert again.digests.dtype == np.int64 and again.digests.tolist() == first.digests.tolist()
    assert again.facts == first.facts and again.fingerprint == first.fingerprint
    assert len(first.digests) == len(first.table) and np.flatnonzero(first.digests).tolist() == first.rows.tolist()
    by_path = dict(zip(paths(first), first.digests[first.rows].tolist(), strict=True))
    assert by_path["plain.png"] != by_path["link_within.png"]  # the same picture under another caption
    twice = [row for row, path in zip(first.rows, paths(first), strict=True) if path == "plain.png"]
    assert len(twice) == 2 and len(set(first.digests[twice])) == 1
    images = dict(zip(paths(first), map(bytes, first.images[first.rows]), strict=True))
    assert again.images.tolist() == first.images.tolist()
    assert np.flatnonzero(first.images.any(1)).tolist() == first.rows.tolist()
    plain = hashlib.blake2b((corpus.folder / "plain.png").read_bytes()).digest()[:16]
    assert images["plain.png"] == images["link_within.png"] == plain
    assert images["plain.png"] != images["grey.png"]


def test_rows_that_are_not_drawn_have_no_digest(tmp_path):
    corpus = make(tmp_path / "data", "flat", bad=False)
    every, some = opened(corpus, "flat"), opened(corpus, "flat", max_train_samples=5)
    assert np.count_nonzero(some.digests) == 5 and len(some.digests) == len(every.digests)
    assert (some.digests[some.rows] == every.digests[some.rows]).all()


def test_a_file_that_could_not_be_read_for_a_moment_is_looked_at_again(tmp_path, monkeypatch):
    corpus = make(tmp_path / "data", "flat", bad=False)
    real = open

    def failing(path, *rest):
        if str(path).endswith("grey.png"):
            raise OSError(5, "Input/output error")
        return real(path, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(finetune.rows, "open", failing, raising=False)
        with pytest.raises(DataError, match="grey.png: cannot be read: .*Input/output error"):
            opened(corpus, "flat")
    assert len(opened(corpus, "flat")) == len(corpus.good)


def test_a_name_cannot_forge_lines_of_the_report(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a\n  fine.png: is good\x1b[2J.png").touch()
    with pytest.raises(DataError) as caught:
        open_data(config(Corpus(tmp_path / "data"), "flat"), progress=False)
    assert len(str(caught.value).splitlines()) == 3 and "a\\n  fine.png: is good\\x1b[2J.png: is empty" in str(
        caught.value
    )


def test_the_files_of_the_rows_are_found_without_reading_rows(tmp_path):
    """An unseen file is one whose changes are trained on unseen. Paths may be absolute, as those of Hub data sets."""
    corpus = make(tmp_path / "data", "flat", bad=False)
    files = [str(corpus.folder / "plain.png"), "grey.png", None]
    images = [{"bytes": None, "path": path} for path in files] + [{"bytes": b"x", "path": "grey.png"}]
    dataset = Dataset.from_dict({"image": images})
    for rows in ([0, 1, 2, 3], [3, 1], [1, 1, 0]):
        source = Source(name="it", dataset=dataset.select(rows), folders=(str(corpus.folder),), problems=[])
        table = rows_of(source, Data(resolution=SIDE), captions=False, labels=False)
        expected = [files[0], str(corpus.folder / "grey.png"), None, None]
        assert table.paths()[0].tolist() == [expected[row] for row in rows]
        stored = {row.number: table.file(row) for row in table.read(range(len(rows))) if row.content or row.path}
        assert all(table.paths()[0][number] == path for number, path in stored.items())

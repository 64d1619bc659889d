"""Records on the disk: found by their key, whole or not at all, of any shape; and `finetune cache`, which tidies up."""

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from finetune import cache_store
from finetune.cache_command import cache_main
from finetune.cache_store import Records, Writer, open_shelf, read_shard, shards_of
from finetune.errors import ConfigError, DataError


def key_of(i: int) -> np.ndarray:
    return np.random.RandomState(1000 + i).randint(-(2**63), 2**63, 2, np.int64)


def record(i: int, shape=(2, 3, 3)) -> np.ndarray:
    return np.random.RandomState(i).standard_normal(shape).astype(np.float32)


def fill(folder: Path, numbers, *, shape=(2, 3, 3), dtype="float32") -> None:
    with Writer(folder, dtype=dtype) as writer:
        for i in numbers:
            writer.add(key_of(i), record(i, shape), (i, -i))


def held(folder: Path, numbers) -> list[int]:
    """Those of `numbers` that the folder holds, each compared with what was written."""
    shelf = open_shelf(folder)
    records, found = Records(shelf.shards), []
    for i, (shard, index) in zip(numbers, shelf.find(np.stack([key_of(i) for i in numbers])), strict=True):
        if shard >= 0:
            data, sizes = records.read(int(shard), int(index))
            assert np.array_equal(data, record(i, data.shape)) and sizes == (i, -i)
            found.append(i)
    return found


def test_what_is_written_is_found_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_store, "SHARD_BYTES", 5 * record(0).nbytes)
    monkeypatch.setattr(cache_store, "OPEN_FILES", 2)
    fill(tmp_path, range(23))
    assert len(shards_of(tmp_path)) == 5 and not list(tmp_path.glob(".*"))
    order = np.random.RandomState(0).permutation(40).tolist()
    assert held(tmp_path, order) == [i for i in order if i < 23]
    assert held(tmp_path / "absent", [1, 2]) == []
    nearly = np.stack([key_of(3) + np.array([0, 1])])  # negative control: half a key is not enough
    assert open_shelf(tmp_path).find(nearly).tolist() == [[-1, -1]]


def test_records_of_several_shapes_lie_side_by_side(tmp_path):
    fill(tmp_path, range(3))
    fill(tmp_path, range(3, 6), shape=(2, 2, 5))
    with Writer(tmp_path, dtype="float32") as writer:
        writer.add(key_of(6), record(6, (7,)), (6, -6))
        writer.add(key_of(7), record(7, (2, 4)), (7, -7))
    assert held(tmp_path, range(8)) == list(range(8))


def test_numbers_are_rounded_once(tmp_path):
    fill(tmp_path, [4], dtype="float16")
    shelf = open_shelf(tmp_path)
    data, _ = Records(shelf.shards).read(*shelf.find(key_of(4)[None])[0].tolist())
    assert data.dtype == np.float16 and np.array_equal(data, record(4).astype(np.float16))


def damage(path: Path, at: int, *, quietly: bool = False) -> None:
    """Change one byte; quietly: without a trace in the file's time."""
    content, state = bytearray(path.read_bytes()), path.stat()
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns if quietly else time.time_ns() + 5_000_000_000))


def test_one_damaged_record_costs_one_record(tmp_path, caplog):
    fill(tmp_path, range(6))
    [path] = shards_of(tmp_path)
    damage(path, read_shard(path)[0].starts[0] + 2 * record(0).nbytes + 3)
    assert held(tmp_path, range(6)) == [0, 1, 3, 4, 5]
    assert "is damaged (a record is not what was written): what it held is made anew" in caplog.text
    assert not path.exists() and len(shards_of(tmp_path)) == 1
    caplog.clear()
    assert held(tmp_path, range(6)) == [0, 1, 3, 4, 5] and not caplog.text


@pytest.mark.parametrize("place", ["length", "header", "keys", "end"])
def test_damage_anywhere_else_costs_a_file_and_no_more(tmp_path, caplog, place):
    fill(tmp_path, range(4))
    fill(tmp_path, range(4, 8))
    path = shards_of(tmp_path)[0]
    if place == "end":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        shard, keys = read_shard(path)
        at = {"length": 6, "header": 12, "keys": path.read_bytes().index(keys.tobytes()[:16])}[place]
        damage(path, at)
    assert len(held(tmp_path, range(8))) == 4
    assert "is damaged" in caplog.text


def test_a_file_that_was_only_touched_is_read_through_and_kept(tmp_path, caplog):
    fill(tmp_path, range(4))
    [path] = shards_of(tmp_path)
    path.touch()
    os.utime(path, (time.time() + 9, time.time() + 9))
    assert held(tmp_path, range(4)) == [0, 1, 2, 3] and not caplog.text
    assert path.stat().st_mtime < time.time() + 1, "as when it was written: it need not be read through again"


def test_damage_without_a_trace_is_found_when_it_is_read(tmp_path, caplog):
    fill(tmp_path, range(4))
    [path] = shards_of(tmp_path)
    damage(path, read_shard(path)[0].starts[0], quietly=True)
    shelf = open_shelf(tmp_path)
    records = pickle.loads(pickle.dumps(Records(shelf.shards)))
    with pytest.raises(DataError, match="record 0 is not what was written. Give the same command again"):
        records.read(*shelf.find(key_of(0)[None])[0].tolist())
    assert held(tmp_path, range(4)) == [1, 2, 3], "the next start finds it"


def test_a_full_disk_is_told_with_the_way_out(tmp_path, monkeypatch):
    def full(path, chunks):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_store, "write", full)
    with pytest.raises(DataError, match=r"No space left on device.*finetune cache --prune"):
        fill(tmp_path, range(3))
    assert not list(tmp_path.iterdir())


def test_what_was_made_before_an_error_is_kept(tmp_path):
    with pytest.raises(ZeroDivisionError), Writer(tmp_path, dtype="float32") as writer:
        writer.add(key_of(1), record(1), (1, -1))
        raise ZeroDivisionError
    assert held(tmp_path, range(3)) == [1]


# --- finetune cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path) -> Path:
    """A cache with two models; of the second, one file was last used 40 days ago."""
    fill(tmp_path / "latents" / "a-float32", range(5))
    (tmp_path / "latents" / "a-float32" / "model.txt").write_text("some/vae")
    fill(tmp_path / "text" / "b-float32", range(3), shape=(4, 6))
    fill(tmp_path / "text" / "b-float32", range(3, 5), shape=(4, 6))
    old = shards_of(tmp_path / "text" / "b-float32")[0].with_suffix(".used")
    os.utime(old, (time.time() - 40 * 86400,) * 2)
    return tmp_path


def test_status_names_models_numbers_sizes_and_last_use(root, capsys):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    cache_main(["--status", "--folder", str(root)])
    out = capsys.readouterr().out
    assert "latents some/vae (float32)  5 of 2x3x3, 0.0 MB, last used" in out
    assert "text    unknown model (float32)  5 of 4x6" in out and f"MB in {root}" in out
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_prune_removes_what_is_old_or_broken_and_says_so(root, capsys):
    cache_main(["--prune", "--folder", str(root)])
    assert "0 damaged or half-written files" in capsys.readouterr().out
    assert len(held(root / "text" / "b-float32", range(5))) == 5
    cache_main(["--prune", "--older_than", "30", "--folder", str(root)])
    assert "1 not used for 30 days" in capsys.readouterr().out
    assert 0 < len(held(root / "text" / "b-float32", range(5))) < 5
    assert len(held(root / "latents" / "a-float32", range(5))) == 5
    [path] = shards_of(root / "latents" / "a-float32")
    damage(path, 12)
    half = root / "latents" / "a-float32" / ".0123.tmp"
    half.write_bytes(b"half")
    os.utime(half, (time.time() - 7200,) * 2)
    cache_main(["--prune", "--folder", str(root)])
    assert "2 damaged or half-written files" in capsys.readouterr().out
    assert not (root / "latents" / "a-float32").exists()


def test_options_that_mean_nothing_are_refused(root):
    for argv in (["--status", "--older_than", "3"], ["--prune", "--older_than", "-1"]):
        with pytest.raises(ConfigError, match="--older_than"):
            cache_main([*argv, "--folder", str(root)])

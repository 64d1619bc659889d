"""Rows of Parquet shards by number: what is read, what is held, and what is said of a shard that cannot be read."""

import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Value

from finetune.errors import DataError
from finetune.shards import END, Shards, open_shards

SIZES = [[3, 2], [4], [1, 1, 1]]  # rows of each row group of each shard: 12 rows
CLASSES = ["ant", "bee"]


def rows(first: int, count: int) -> dict[str, list]:
    numbers = range(first, first + count)
    images = [{"bytes": b"image %d" % n, "path": None} for n in numbers]
    return {"image": images, "text": [f"text {n}" for n in numbers], "label": [n % 2 for n in numbers]}


IMAGE = datasets.Image(decode=False)
FEATURES = Features({"image": IMAGE, "text": Value("string"), "label": ClassLabel(names=CLASSES)})


def write(path: Path, groups: list[int], first: int = 0, features: Features = FEATURES) -> str:
    with pq.ParquetWriter(path, features.arrow_schema, write_page_checksum=True) as writer:
        for count in groups:
            writer.write_table(pa.Table.from_pydict(rows(first, count), schema=features.arrow_schema))
            first += count
    return str(path)


def shards(folder: Path, **settings) -> Shards:
    first = np.cumsum([0, *map(sum, SIZES)])
    files = [write(folder / f"{n}.parquet", groups, int(first[n])) for n, groups in enumerate(SIZES)]
    return open_shards(files, **({"buffer_size": 6, "progress": False} | settings))


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The row groups that were read, in order."""
    done: list[int] = []
    read = Shards._read
    monkeypatch.setattr(Shards, "_read", lambda self, unit, count: done.append(unit) or read(self, unit, count))
    return done


def test_rows_by_number(tmp_path):
    data = shards(tmp_path)
    assert len(data) == 12 and data.column_names == ["image", "text", "label"]
    assert data.features["label"].names == CLASSES
    numbers = [11, 0, 4, 5, 5, 9]
    expected = rows(0, 12)
    assert data[numbers] == {name: [values[n] for n in numbers] for name, values in expected.items()}
    assert data.select_columns(["text"])[[7]] == {"text": ["text 7"]}
    assert list(data.units) == list(range(12))
    assert [Path(data.file_of(number)).stem for number in (0, 4, 5, 8, 9, 11)] == list("001122")


def test_a_row_group_is_read_when_wanted_and_held_within_the_buffer(tmp_path, reads):
    data = shards(tmp_path)
    assert reads == []  # opening reads no data
    for number in range(12):
        data[[number]]
        assert sum(map(len, data._held.values())) <= data.buffer_size
    assert reads == [0, 1, 2, 3, 4, 5]
    data[[6]]  # group 2 is still held: 4 + 1 + 1 of at most 6, after group 3 made room
    assert reads[6:] in ([], [2])
    small = shards(tmp_path, buffer_size=1)
    small[[0, 1, 2]]
    assert reads[-1] == 0 and len(small._held) == 1  # one that is larger than the buffer is held alone


def test_row_groups_too_large_to_be_mixed_are_told_of(tmp_path, caplog):
    shards(tmp_path, buffer_size=8)
    assert not caplog.text
    shards(tmp_path, buffer_size=7)
    assert "row groups of up to 4 rows are held whole" in caplog.text


def test_the_one_used_least_recently_makes_room(tmp_path, reads):
    data = shards(tmp_path)
    for number in (0, 3, 0, 9):  # groups 0 (3 rows), 1 (2), 0 again, 3 (1): full
        data[[number]]
    data[[10]]
    assert list(data._held) == [0, 3, 4] and reads == [0, 1, 3, 4]


def test_a_pickle_holds_no_rows(tmp_path):
    data = shards(tmp_path)
    data[list(range(12))]
    copy = pickle.loads(pickle.dumps(data))
    assert not copy._held and data._held
    assert copy[[3, 8]] == data[[3, 8]]


STRUCT = pa.struct({"path": pa.string(), "bytes": pa.binary()})


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT])
def test_images_as_bytes_or_struct(tmp_path, kind):
    contents = [b"one", None, b""]
    values = [c if c is None or not pa.types.is_struct(kind) else {"bytes": c, "path": "a"} for c in contents]
    pq.write_table(pa.table({"image": pa.array(values, kind)}), tmp_path / "x.parquet")
    data = open_shards([str(tmp_path / "x.parquet")], buffer_size=9).with_images("image")
    path = "a" if pa.types.is_struct(kind) else None
    expected = [{"bytes": b"one", "path": path}, None, {"bytes": b"", "path": path}]
    assert data[[0, 1, 2]] == {"image": expected}


def test_class_names_may_come_from_the_card(tmp_path):
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"label": pa.array([0, 1]), "text": ["a", "b"]}), path)
    declared = {"label": ClassLabel(names=CLASSES), "text": ClassLabel(names=CLASSES), "gone": Value("string")}
    features = open_shards([path], buffer_size=9, declared=declared).features
    assert features["label"].names == CLASSES and features["text"] == Value("string") and len(features) == 2


def test_the_digest_is_of_content_and_order(tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for folder in (one, two, three):
        folder.mkdir()
    first, second = shards(one), shards(two)
    assert first.footers == second.footers == first._fingerprint
    assert open_shards(first.files[::-1], buffer_size=6).footers != first.footers
    write(three / "0.parquet", [3, 2], first=1)
    assert open_shards([str(three / "0.parquet"), *first.files[1:]], buffer_size=6).footers != first.footers


def test_a_long_footer_is_read_whole(tmp_path):
    groups = [1] * 400
    data = open_shards([write(tmp_path / "x.parquet", groups)], buffer_size=6)
    assert int.from_bytes((tmp_path / "x.parquet").read_bytes()[-8:-4], "little") > END
    assert len(data.units.counts) == 400 and data[[399]]["text"] == ["text 399"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet" * 9, b"\xff" * 100, b"\xff\xff\xff\x7fPAR1"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, content):
    good = write(tmp_path / "0.parquet", [2])
    (tmp_path / "1.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.parquet is not a Parquet file that can be read"):
        open_shards([good, str(tmp_path / "1.parquet")], buffer_size=6)
    with pytest.raises(DataError, match=r"2\.parquet is not .*FileNotFoundError"):
        open_shards([good, str(tmp_path / "2.parquet")], buffer_size=6)


def test_other_columns_are_refused(tmp_path):
    good = write(tmp_path / "0.parquet", [2])
    other = Features({**FEATURES, "label": ClassLabel(names=["bee", "ant"])})
    with pytest.raises(DataError, match=r"(?s)1\.parquet has other columns than .*0\.parquet.*bee"):
        open_shards([good, write(tmp_path / "1.parquet", [2], features=other)], buffer_size=6)
    with pytest.raises(DataError, match="have no rows"):
        open_shards([write(tmp_path / "2.parquet", [])], buffer_size=6)


def test_damage_is_told_with_file_row_group_and_rows(tmp_path):
    data = shards(tmp_path)
    path = Path(data.files[0])
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(content)
    assert data[[0]]["text"] == ["text 0"]
    with pytest.raises(DataError, match=r"0\.parquet, row group 1 \(rows 3 to 4 of the data\) cannot be read"):
        data[[4]]
    path.unlink()
    with pytest.raises(DataError, match="FileNotFoundError"):
        data[[4]]


def test_a_shard_that_changed_is_noticed(tmp_path):
    data = shards(tmp_path)
    write(Path(data.files[1]), [3])
    with pytest.raises(DataError, match=r"1\.parquet changed since it was opened: it has \d+ bytes now, not \d+"):
        data[[5]]

"""Checkpoints are whole or absent; a broken one is seen, set aside, and the one before it is used."""

import errno
import json
import os
import random
import shutil
import stat

import pytest
import torch
from safetensors.torch import save_file

from finetune import checkpoint
from finetune.durable import crc_of, safetensors
from finetune.durable import write as write_file
from finetune.errors import CheckpointError

PARTS = ("model", "optimizer", "ema_0.9")


def parts_of(value):
    """Parts of a tiny checkpoint, each of two tensors that differ by part."""
    return {
        part: {"w": torch.full((64,), value + i), "b": torch.arange(3) + i} for i, part in enumerate(PARTS)
    }  # fmt: skip


def write(root, step, *, value=None):
    return checkpoint.save(
        root, parts=parts_of(float(step) if value is None else value), state={"step": step, "batches": step}
    )


WAYS = ("flip", "truncate", "empty", "delete", "swap", "step", "append")


def damage(path, how, rng):
    """One of the ways in which a disk, a crash or a person breaks a checkpoint; returns what was done."""
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    if how == "flip":
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif how == "truncate":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "delete":
        file.unlink()
    elif how == "swap":
        a, b = rng.sample(sorted(path.glob("*.safetensors")), 2)
        a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
        a.write_bytes(b_bytes), b.write_bytes(a_bytes)
    elif how == "step":
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "step": manifest["step"] + 1}))
    else:
        file.write_bytes(content + rng.randbytes(1 + rng.randrange(100)))
    return f"{how} {file.name}"


def test_round_trip_and_modes(tmp_path):
    umask = os.umask(0o027)
    try:
        for step in (5, 10, 15):
            write(tmp_path, step)
    finally:
        os.umask(umask)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000010", "step-00000015"]
    found = checkpoint.latest(tmp_path)
    assert found.step == 15
    assert torch.equal(found.tensors("model")["w"], torch.full((64,), 15.0))
    assert found.shapes("model") == {"w": (64,), "b": (3,)}
    assert {stat.S_IMODE(f.stat().st_mode) for f in found.path.iterdir()} == {0o640}
    with pytest.raises(CheckpointError, match=r"has no ema_0\.5; it has ema_0\.9, model, optimizer"):
        found.shapes("ema_0.5")


def test_tensor_files_are_byte_for_byte_those_of_safetensors(tmp_path):
    torch.manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    tensors = {f"{'ba'[i % 2]}.{i}": torch.randn(3, i + 1).mul(9).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"bool": torch.tensor([True, False, True]), "uint8": torch.arange(5, dtype=torch.uint8)}
    tensors |= {"int8": torch.arange(3, dtype=torch.int8), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    tensors |= {'quoted "ü"': torch.randn(2), "nan": torch.tensor([torch.nan, torch.inf])}
    tensors |= {"channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    size, crc = write_file(tmp_path / "ours", safetensors(tensors))
    theirs = (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").read_bytes() == theirs and size == len(theirs)
    assert crc == crc_of(tmp_path / "ours")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "ours", [b""])
    # Small and large ones in turn, each alone more than one piece, or all the small ones together.
    counts = [5_000_000, 3, 300_000, 7, 100_000, *[250_000] * 20, 1, 5_000_000]
    more = {f"{i:02}": torch.randn(count) for i, count in enumerate(counts)}
    size, crc = write_file(tmp_path / "large", safetensors(more))
    save_file(more, tmp_path / "theirs")
    assert (tmp_path / "large").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert crc == crc_of(tmp_path / "large")


@pytest.mark.parametrize("how", WAYS)
def test_200_damages_are_found_and_the_one_before_is_used(tmp_path, how):
    write(tmp_path, 5)
    corrupt = tmp_path / "step-00000010.corrupt"
    for seed in range(30):
        newest = write(tmp_path, 10)  # the run comes by again
        assert checkpoint.latest(tmp_path).step == 10
        done = damage(newest, how, random.Random(f"{how} {seed}"))
        assert checkpoint.latest(tmp_path, set_aside=False).step == 5, (seed, done)
        assert newest.is_dir() and not corrupt.is_dir()
        assert checkpoint.latest(tmp_path).step == 5, (seed, done)
        assert corrupt.is_dir() and not newest.is_dir()
        corrupt.rename(newest)
        with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
            checkpoint.load(newest)
        shutil.rmtree(newest)


def test_all_broken_is_an_error_that_names_each_and_stays_one(tmp_path):
    for step in (5, 10):
        (write(tmp_path, step) / "model.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint is whole:\n.*step-00000010.*\n.*step-00000005"):
            checkpoint.latest(tmp_path)


def test_explicit_path_is_never_replaced_by_another(tmp_path):
    write(tmp_path, 5)
    (write(tmp_path, 10) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a whole checkpoint: state.json has 2 bytes"):
        checkpoint.load(tmp_path / "step-00000010")
    with pytest.raises(CheckpointError, match="is no folder"):
        checkpoint.load(tmp_path / "step-00000099")


def test_nothing_there_is_a_fresh_start_and_strangers_are_ignored(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    for name in ("checkpoint-best", "step-5", "step-best", ".DS_Store"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_a_whole_one_is_not_written_again_and_a_broken_one_is(tmp_path):
    first = write(tmp_path, 5, value=1.0)
    inode = first.stat().st_ino
    assert write(tmp_path, 5, value=2.0).stat().st_ino == inode
    (first / "optimizer.safetensors").unlink()
    assert torch.equal(checkpoint.load(write(tmp_path, 5, value=2.0)).tensors("model")["w"], torch.full((64,), 2.0))
    assert (tmp_path / "step-00000005.corrupt").is_dir()


def test_what_the_disk_garbled_is_found_by_reading_back(tmp_path, monkeypatch):
    """The checksum is of what was meant: a disk that stores something else is seen at once."""
    write(tmp_path, 5)
    real = os.write

    def garbled(descriptor, data):
        return real(descriptor, bytes(data).replace(b"\0\0\x20\x41", b"\0\0\x21\x41"))  # of one 10.0

    with monkeypatch.context() as patch, pytest.raises(OSError, match="does not read back as it was written: model"):
        patch.setattr(os, "write", garbled)
        write(tmp_path, 10)
    assert checkpoint.latest(tmp_path).step == 5


def test_a_disk_that_is_nearly_full_is_not_begun_with(tmp_path, monkeypatch):
    write(tmp_path, 5)
    size = sum(tensor.nbytes for tensors in parts_of(0.0).values() for tensor in tensors.values())
    for free, fits in ((int(1.2 * size) + 1, True), (int(1.2 * size) - 1, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        if fits:
            write(tmp_path, 10)
        else:
            with pytest.raises(OSError, match="MB are needed on the disk, .* MB are free") as caught:
                write(tmp_path, 15)
            assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_one_of_another_version_is_refused_and_not_taken_for_broken(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(checkpoint, "FORMAT", 1)
        write(tmp_path, 5)
    with pytest.raises(CheckpointError, match="has the format 1 of another version of finetune; this one reads 2"):
        checkpoint.latest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_one_that_cannot_be_read_is_not_taken_for_broken(tmp_path, monkeypatch):
    """A network file system may be away for a moment."""
    write(tmp_path, 4), write(tmp_path, 5)

    def away(file):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="step-00000005 cannot be read"):
        patch.setattr(checkpoint, "crc_of", away)
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path).step == 5

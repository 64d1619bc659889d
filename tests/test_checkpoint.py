"""Checkpoints are whole or absent; a broken one is seen, set aside, and the one before it is used."""

import errno
import json
import os
import random
import stat

import pytest
import torch

from finetune import checkpoint
from finetune.errors import CheckpointError


def write(root, step, *, keep=2, value=None):
    value = float(step) if value is None else value
    parts = {"model": {"w": torch.full((64,), value)}, "optimizer": {"w/exp_avg": torch.full((64,), -value)}}
    return checkpoint.save(root, parts=parts, state={"step": step, "batches": step}, keep=keep)


def damage(path, how, rng):
    """One of the ways in which a disk or a crash breaks a checkpoint."""
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    if how == "flip":
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif how == "truncate":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif how == "delete":
        file.unlink()
    elif how == "swap":
        a, b = path / "model.safetensors", path / "optimizer.safetensors"
        a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
        a.write_bytes(b_bytes), b.write_bytes(a_bytes)
    elif how == "step":
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "step": manifest["step"] + 1}))


def test_round_trip_rotation_and_modes(tmp_path):
    umask = os.umask(0o027)
    try:
        for step in (5, 10, 15, 20):
            write(tmp_path, step)
    finally:
        os.umask(umask)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]
    found = checkpoint.latest(tmp_path)
    assert found.step == 20
    assert torch.equal(found.tensors("model")["w"], torch.full((64,), 20.0))
    assert {stat.S_IMODE(f.stat().st_mode) for f in found.path.iterdir()} == {0o640}


@pytest.mark.parametrize("trial", range(40))
def test_damage_is_found_and_the_one_before_is_used(tmp_path, trial):
    rng = random.Random(trial)
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    damage(newest, ("flip", "truncate", "delete", "swap", "step")[trial % 5], rng)
    assert checkpoint.latest(tmp_path).step == 5
    assert (tmp_path / "step-00000010.corrupt").is_dir()
    assert write(tmp_path, 10).is_dir()  # the run comes by again
    assert checkpoint.latest(tmp_path).step == 10


def test_all_broken_is_an_error_and_stays_one(tmp_path):
    for step in (5, 10):
        (write(tmp_path, step) / "model.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint is whole"):
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


@pytest.mark.parametrize("call", ["save_file", "_fsync"])
def test_failure_leaves_no_trace(tmp_path, monkeypatch, call):
    write(tmp_path, 5)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoint, call, full)
        write(tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert checkpoint.latest(tmp_path).step == 5


def test_crash_leftovers_are_swept(tmp_path):
    write(tmp_path, 5)
    for name in (".tmp-step-00000010-1", "step-00000001.trash"):
        (tmp_path / name).mkdir()
    checkpoint.tidy(tmp_path, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]

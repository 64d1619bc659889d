"""A save that dies, fails or is slow at any operation of the disk costs that save; in the background as at once."""

import errno
import itertools
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import forked
import tiny
from crash_points import BEHIND, END, NOW, RAM, SAVES, Reference, dies, fails, operations, save_all
from faulty_disk import BROKEN, FULL, Died, FaultyDisk
from finetune import checkpoint, lock, saving
from finetune.errors import CheckpointError, ConfigError
from finetune.saving import Saver, nonfinite
from finetune.trainer import Trainer
from test_checkpoint import WAYS, parts_of

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
BOTH = pytest.mark.parametrize("cfg", [NOW, BEHIND], ids=["synchronous", "asynchronous"])


def names(folder):
    root = folder / "checkpoints"
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


# --------------------------------------------------------------------------------------------------- at every operation


@pytest.fixture
def ram():
    """A folder in memory where there is such a thing: what other processes flush does not slow it down."""
    with tempfile.TemporaryDirectory(dir=RAM) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def tiny_operations(tmp_path_factory):
    found = operations(tmp_path_factory.mktemp("all") / "run")
    assert len(found) > 20 * SAVES
    return found


@pytest.mark.parametrize("how", ["killed", "torn", "power"])
@BOTH
def test_death_at_every_operation(ram, tiny_operations, cfg, how):
    """Every operation of synchronous saves, every third of those in the background; a write only can be torn."""
    points = [i for i, done in enumerate(tiny_operations) if how != "torn" or done.startswith("write")]
    for at in points[:: 3 if cfg.asynchronous else 1]:
        assert dies(ram / str(at), cfg, at, how) is None, at


def test_negative_control_without_flushes_a_loss_of_power_costs_checkpoints(tmp_path):
    with FaultyDisk(at=100, power=True) as disk, pytest.raises(Died):
        os.fsync = lambda descriptor: None
        save_all(tmp_path, NOW)
    assert sum(done.startswith("rename step-") for done in disk.operations[:100]) >= 2
    assert checkpoint.latest(tmp_path / "checkpoints") is None


@BOTH
def test_failure_at_every_operation(ram, tiny_operations, caplog, cfg):
    """The disk is full at every other operation, broken at those between; a third of them in the background."""
    for at in range(0, len(tiny_operations), 3 if cfg.asynchronous else 1):
        assert fails(ram / str(at), cfg, at, FULL if at % 2 else BROKEN) is None, at
        caplog.clear()


# ------------------------------------------------------------------------------------------------------ a real training


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The tiny training, synchronously and asynchronously saved."""
    return [Reference(tmp_path_factory.mktemp("reference") / "run", asynchronous=kind) for kind in (False, True)]


@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 1)])
def test_weights_that_are_not_finite_are_never_committed(tmp_path, processes, rank):
    """Also if they are those of one process only: all of them stop, with the exit code of it."""

    def spoiled(cfg):
        trainer = Trainer(cfg)
        step = trainer.train_step

        def train_step(batches, meter):
            taken = step(batches, meter)
            if trainer.step == 3 and trainer.accelerator.process_index == rank:
                next(iter(trainer.parameters.values())).data.view(-1)[5] = torch.inf
            return taken

        trainer.train_step = train_step
        trainer.fit()

    cfg = tiny.config(tmp_path / "run", checkpoint={"checkpointing_steps": 1})
    assert forked.run(cfg, processes=processes, body=spoiled) == [3] * processes, forked.log(cfg)
    assert "model held NaN or infinite values at step 3: lower optimizer.learning_rate" in forked.log(cfg)
    assert names(tmp_path / "run") == ["step-00000001", "step-00000002"]


def test_a_full_disk_costs_one_checkpoint_and_the_last_one_is_told(tmp_path, reference):
    for meant, code in (("mkdir .tmp-step-00000003", 0), ("mkdir .tmp-step-00000007", 1)):
        at = next(i for i, done in enumerate(reference[0].operations) if done.startswith(meant))
        cfg = reference[0].config(tmp_path / f"run{code}")

        def full(cfg, at=at):
            with FaultyDisk(at=at, error=FULL):
                Trainer(cfg).fit()

        assert forked.run(cfg, body=full) == [code], forked.log(cfg)
        assert len(names(tmp_path / f"run{code}")) == 2
        told = "no checkpoint at step 3" if code == 0 else "the checkpoint of step 7 could not be written"
        assert f"{told} ([Errno 28] No space left on device" in forked.log(cfg)
        assert "Traceback" not in forked.log(cfg)


def test_saving_in_the_background_does_not_matter(reference):
    assert reference[0].state == reference[1].state and reference[0].lines == reference[1].lines


def test_a_slow_disk_in_the_background_does_not_matter(ram, reference):
    """Each save takes longer than a step: the next one waits, and holds what it would have held."""

    def slow(cfg):
        with FaultyDisk(slow=0.01):
            Trainer(cfg).fit()

    cfg = reference[1].config(ram / "run")
    assert forked.run(cfg, body=slow) == [0], forked.log(cfg)
    assert forked.state(cfg, SAVES) == reference[0].state and names(ram / "run") == END


@pytest.mark.parametrize("sample", range(6))
def test_a_training_killed_at_an_operation_of_the_disk_ends_with_the_same_bits(ram, reference, sample):
    kind = reference[sample % 2]
    at = random.Random(f"crash {sample}").randrange(len(kind.operations))
    assert kind.crash(ram / "run", at) is None


@pytest.mark.parametrize("seed", range(4))
def test_a_training_killed_at_a_random_time_ends_with_the_same_bits(ram, reference, seed):
    assert reference[seed % 2].kill(ram / "run", seed) is None


@pytest.mark.parametrize("seed", range(len(WAYS)))
def test_a_training_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(ram, reference, seed):
    assert reference[0].damage(ram / "run", seed) is None


# ----------------------------------------------------------------------------------------------------------- the policy


@BOTH
def test_three_in_a_row_that_fail_end_the_run_and_fewer_do_not(tmp_path, monkeypatch, caplog, cfg):
    saver = Saver(tmp_path, cfg)
    root = tmp_path / "checkpoints"
    full = {3, 4, 6, 7, 9, 10, 11}
    real = checkpoint.need_space
    asked = iter(range(1, 100))

    def need_space(folder, size):
        if next(asked) in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, size)

    monkeypatch.setattr(checkpoint, "need_space", need_space)
    with pytest.raises(CheckpointError, match="3 checkpoints in a row could not be written"):
        for step in itertools.count(1):
            saver.save(parts_of(float(step)), {"step": step}, required=False)
    assert step == 11 + cfg.asynchronous  # which is told at the next one
    saver.wait()
    assert "no checkpoint at step 10 ([Errno 28] No space left on device)" in caplog.text
    assert names(tmp_path)[0] == f"step-{8 if step == 12 else 5:08d}" and checkpoint.latest(root).step in (8, 12)


@BOTH
def test_one_that_is_required_is_tried_after_one_that_failed(tmp_path, cfg):
    saver = Saver(tmp_path, cfg)
    with FaultyDisk(at=0, error=FULL, times=1):
        saver.save(parts_of(1.0), {"step": 1}, required=False)
        saver.save(parts_of(2.0), {"step": 2}, required=True)
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_in_the_background_the_same_bytes_are_written_whatever_the_training_does(tmp_path, monkeypatch, caplog, device):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    weight = torch.randn(3, 40, 5, 5, device=device).to(memory_format=torch.channels_last)
    live = {"model": {"w": weight, "n": torch.tensor(3)}}
    several = {"checkpoints_total_limit": 5}
    synchronous = Saver(tmp_path / "now", replace(NOW, **several))
    behind = Saver(tmp_path / "behind", replace(BEHIND, **several))
    disk, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *file: disk.wait(60) and write(*file))
    for step in range(1, 4):
        disk.set()
        behind.wait()
        synchronous.save(live, {"step": step}, required=False)
        disk.clear()  # it takes nothing now
        behind.save(live, {"step": step}, required=False)
        live["model"]["w"].mul_(0.5)
        live["model"]["n"] += 1
        assert not (tmp_path / "behind" / "checkpoints" / f"step-{step:08d}").exists()
    threading.Timer(0.2, disk.set).start()
    behind.save(live, {"step": 4}, required=False)  # at most one is in flight
    assert names(tmp_path / "behind")[-1] >= "step-00000003"
    assert "s for the checkpoint of step 3" in caplog.text, "waiting is said"
    for step in (1, 2, 3):
        ours, theirs = (tmp_path / kind / "checkpoints" / f"step-{step:08d}" for kind in ("now", "behind"))
        assert len(list(theirs.iterdir())) == 3
        assert all(file.read_bytes() == (theirs / file.name).read_bytes() for file in ours.iterdir())
    behind.wait()


def test_without_memory_for_a_copy_it_is_written_at_once(tmp_path, monkeypatch, caplog):
    memory = type("Memory", (), {"available": 100})
    monkeypatch.setattr(saving.psutil, "virtual_memory", lambda: memory)
    saver = Saver(tmp_path, BEHIND)
    saver.save(parts_of(1.0), {"step": 1}, required=False)
    assert names(tmp_path) == ["step-00000001"]
    assert "needs 0.0 GB of host memory for a copy, 0.0 GB are free: written at once" in caplog.text


def test_a_bug_in_the_background_is_raised_at_the_next_save(tmp_path):
    saver = Saver(tmp_path, BEHIND)
    saver.save(parts_of(1.0), {"step": 1, "what": object()}, required=False)
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.save(parts_of(2.0), {"step": 2}, required=False)
    assert names(tmp_path) == []


def test_what_is_not_finite_is_named():
    parts = parts_of(1.0) | {"empty": {"w": torch.zeros(0, 3)}}
    parts |= {"optimizer": {"w/exp_avg_sq": torch.tensor([torch.inf])}}
    assert nonfinite(parts) == []
    for bad in (torch.nan, torch.inf, -torch.inf):
        for kind in (torch.float32, torch.float16, torch.bfloat16):
            spoiled = torch.arange(70.0).to(kind)
            spoiled[random.Random(f"{bad}").randrange(70)] = bad
            assert nonfinite(parts | {"model": {"a": torch.ones(3), "w": spoiled}}) == ["model"]


# ---------------------------------------------------------------------------------------------------- a real small disk

SMALL_DISK = """
import logging, os, sys, shutil, types
from pathlib import Path
import torch
from finetune import checkpoint
from finetune.config import Checkpoint
from finetune.saving import Saver
torch.set_num_threads(1)
root, step, found = Path(sys.argv[1]), 0, set()
real_space, logging.lastResort = shutil.disk_usage, None
def parts(step):
    return {name: {"w": torch.full((60_000,), float(step))} for name in ("model", "ema_0.9", "optimizer")}  # 720 kB
saver = Saver(root, Checkpoint(checkpointing_steps=1))
def save():
    global step
    step += 1
    saver._missed = 0
    saver.save(parts(step), {"step": step}, required=False)
    return checkpoint.latest(root / "checkpoints").step == step
assert save() and save()
for room in range(0, 740_000, 20_000):  # the disk is full at each region of a save
    filler = root / "filler"
    with filler.open("wb") as file:
        free = shutil.disk_usage(root).free
        file.write(bytes(max(0, free - room)))
    for seen in (True, False):  # by the check beforehand; while writing, as when somebody else fills the disk meanwhile
        shutil.disk_usage = real_space if seen else lambda _: types.SimpleNamespace(free=1 << 40)
        before = checkpoint.latest(root / "checkpoints").step
        assert not save() and checkpoint.latest(root / "checkpoints").step == before
        assert [p.name for p in (root / "checkpoints").iterdir() if p.name.startswith(".tmp")] == []
        assert len(checkpoint.folders(root / "checkpoints")) == 2
        found.add((room, seen))
    shutil.disk_usage = real_space
    filler.unlink()
    assert save(), "the next one succeeds when space is free again"
print(len(found), "trials")
"""


def can_mount():
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="unshare -rm with a tmpfs is not allowed here")
def test_a_full_disk_at_each_region_of_a_save(tmp_path):
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=4m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path / "disk"), sys.executable, SMALL_DISK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "74 trials\n"


# --------------------------------------------------------------------------------------------------------- one run only


def test_a_second_run_is_refused_at_once_and_told_whose_the_folder_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/train_unet.py", "--token", "hf_" + "x" * 34])
    start = time.perf_counter()
    with lock.hold(tmp_path / "run"), pytest.raises(ConfigError) as refused:
        lock.hold(tmp_path / "run")
    assert time.perf_counter() - start < 1
    owner = rf"process {os.getpid()} on \S+, since [-\d]+ [:\d]+: train_unet.py --token \[token\]"
    assert refused.match(rf"in use by another run \({owner}\): wait for it, stop it, or choose another")
    lock.hold(tmp_path / "run").close()  # free again


def test_the_refusal_waits_for_nothing_heavy(tmp_path):
    code = "import sys; from finetune import cli; code = cli.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    words = ["--dataset_name", str(tiny.ROOT / "assets" / "digits"), "--output_dir", str(tmp_path / "run")]
    words += ["--resolution", "8"]
    with lock.hold(tmp_path / "run"):
        start = time.perf_counter()
        command = [sys.executable, "-c", code, "train", *words]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert time.perf_counter() - start < 2 + os.getloadavg()[0]  # alone, a second
    assert refused.returncode == 2 and f"in use by another run (process {os.getpid()} on" in refused.stderr


def test_the_lock_of_a_killed_run_is_free_although_its_children_live(tmp_path):
    """A loader process is forked, hence shares the lock's file; it may outlive a killed trainer by seconds."""
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        held = lock.hold(tmp_path / "run")  # noqa: F841  held by being alive
        if (child := os.fork()) == 0:
            time.sleep(30)
            os._exit(0)
        os.write(writer, str(child).encode())
        time.sleep(30)
        os._exit(0)
    child = int(os.read(reader, 20))
    try:
        with pytest.raises(ConfigError, match=f"process {owner} on"):
            lock.hold(tmp_path / "run")
        os.kill(owner, 9)
        os.waitpid(owner, 0)
        os.kill(child, 0)  # lives
        time.sleep(0.1)  # it may not have been through its first moment
        lock.hold(tmp_path / "run").close()
    finally:
        os.kill(child, 9)
        os.close(reader), os.close(writer)


def test_an_output_dir_that_is_renamed_is_not_made_anew(tmp_path):
    """The new folder of the old name would have neither the lock nor the checkpoints of the run."""

    def renamed(cfg):
        trainer = Trainer(cfg)
        step = trainer.train_step

        def train_step(batches, meter):
            taken = step(batches, meter)
            if trainer.state.batches == 3:
                Path(cfg.output_dir).rename(tmp_path / "elsewhere")
            return taken

        trainer.train_step = train_step
        trainer.fit()

    cfg = tiny.config(tmp_path / "run", tracking={"log_every": 100})
    assert forked.run(cfg, body=renamed) == [1]
    assert "was moved or replaced while the run used it" in forked.log(cfg)
    assert names(tmp_path / "elsewhere") == ["step-00000002"] and not (tmp_path / "run" / "checkpoints").exists()

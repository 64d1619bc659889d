"""Faults of saving as trials that anybody may repeat: each returns None if nothing was lost, or else what was.

On tiny tensors, in this process (milliseconds each):

    dies(folder, cfg, at, how)      killed, torn or power at the at-th durable operation of SAVES saves
    fails(folder, cfg, at, error)   ENOSPC or EIO there

On a real training of SAVES steps, saved after each, in forked processes (about a second each):

    reference = Reference(folder, asynchronous=...)     the run that nothing happens to
    reference.crash(folder, at)                         SIGKILL at the at-th durable operation, then resumed
    reference.kill(folder, seed)                        killed at a random time, then resumed
    reference.damage(folder, seed)                      the newest checkpoint damaged at random, then resumed

`len(operations(folder))` and `len(reference.operations)` say how many points there are. Folders are made, and deleted
if nothing was lost; in memory (RAM) they are several times as fast.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch

import forked
from faulty_disk import Died, FaultyDisk
from finetune import checkpoint, lock
from finetune.config import Checkpoint
from finetune.data import open_data
from finetune.errors import CheckpointError
from finetune.saving import Saver
from finetune.trainer import Trainer
from test_checkpoint import WAYS, damage, parts_of
from tiny import config

SAVES = 7
NOW, BEHIND = Checkpoint(checkpointing_steps=1), Checkpoint(checkpointing_steps=1, asynchronous=True)
RAM = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None  # for tempfile: None is its usual place
END = [f"step-{step:08d}" for step in (SAVES - 1, SAVES)]


# --------------------------------------------------------------------------------------------------------- tiny tensors


def save_all(folder: Path, cfg: Checkpoint, *, first: int = 1) -> None:
    """What a run does: tidy up, save at each step, the last one required."""
    saver = Saver(folder, cfg)
    saver.tidy()
    for step in range(first, SAVES + 1):
        saver.save(parts_of(float(step)), {"step": step}, required=step == SAVES)
    saver.wait()


def operations(folder: Path, cfg: Checkpoint = NOW) -> list[str]:
    """The durable operations of all saves, in order."""
    folder.mkdir()
    with FaultyDisk() as disk:
        save_all(folder, cfg)
    return disk.operations


def dies(folder: Path, cfg: Checkpoint, at: int, how: str) -> str | None:
    """Die at operation `at`: what is there then is the checkpoint before or the new one, whole; and it goes on."""
    folder.mkdir()
    with FaultyDisk(at=at, torn=how == "torn", power=how == "power") as disk, contextlib.suppress(Died):
        save_all(folder, cfg)
        return "it did not die"
    # A commit is a rename, which a loss of power spares only when the folder has been flushed.
    commits = "fsync checkpoints" if how == "power" else [f"rename step-{step:08d}" for step in range(SAVES + 1)]
    committed = sum(done in commits for done in disk.operations[:at])
    return _goes_on(folder, cfg, committed) or _ends(folder, END, disk.operations[at])


def fails(folder: Path, cfg: Checkpoint, at: int, error: int) -> str | None:
    """Operation `at` fails: that checkpoint is missed, unless it is the last; older ones are whole; no junk is left."""
    folder.mkdir()
    ended = False
    with FaultyDisk(at=at, error=error) as disk:
        try:
            save_all(folder, cfg)
        except CheckpointError:
            ended = True
    what, stay = disk.operations[at], _names(folder)
    begun = [done for done in disk.operations[:at] if done.startswith("mkdir .tmp")]
    if len(begun) < SAVES - 1 and (ended or len(stay) != 2):
        return f"{what}: left {stay}, ended: {ended}"
    return _goes_on(folder, cfg, SAVES - ended) or _ends(folder, None, what)


def _goes_on(folder: Path, cfg: Checkpoint, least: int) -> str | None:
    try:
        found = checkpoint.latest(folder / "checkpoints")
    except CheckpointError as error:
        return str(error)
    step = found.step if found else 0
    if step < least:
        return f"step {step} is the newest, {least} had been committed"
    for part, tensors in parts_of(float(step)).items() if found else ():
        if any(not torch.equal(found.tensors(part)[name], tensor) for name, tensor in tensors.items()):
            return f"{part} of step {step} holds something else"
    with FaultyDisk():  # which has no fault
        save_all(folder, cfg, first=step + 1)
    return None


def _ends(folder: Path, expected: list[str] | None, what: str) -> str | None:
    names = _names(folder)
    if (names != expected) if expected else (len(names) != 2 or names[-1] != END[-1]):
        return f"{what}: {names} is left at the end"
    shutil.rmtree(folder)
    return None


def _names(folder: Path) -> list[str]:
    root = folder / "checkpoints"
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


# ------------------------------------------------------------------------------------------------------ a real training


class Reference:
    """The run that nothing happens to, and trials that must end as it did: bit for bit, with its lines of metrics."""

    def __init__(self, folder: Path, *, asynchronous: bool = False) -> None:
        self._asynchronous = asynchronous
        cfg = self.config(folder)
        open_data(cfg, progress=False)  # whose check is in the cache from here on, so that all runs write alike
        start = time.perf_counter()
        self._run(cfg, lambda: FaultyDisk(), expected=0)
        self.seconds = time.perf_counter() - start
        self.operations: list[str] = json.loads(folder.with_suffix(".json").read_text())
        self.state, self.lines = forked.state(cfg, SAVES), self._metrics(cfg)
        assert len(self.state) == 5 and len(self.lines) == SAVES and _names(folder) == END
        self._template = folder.with_name(f"{folder.name}-stopped")  # between two saves, in the middle
        logged = [i for i, operation in enumerate(self.operations) if operation == "open metrics.jsonl"]
        self._run(self.config(self._template), lambda: FaultyDisk(at=logged[5], kill=True), expected=-signal.SIGKILL)

    def crash(self, folder: Path, at: int) -> str | None:
        """SIGKILL at the at-th durable operation, then the same command."""
        cfg = self.config(folder)
        self._run(cfg, lambda: FaultyDisk(at=at, kill=True), expected=-signal.SIGKILL)
        return self._held(cfg) or self._resumed(cfg)

    def kill(self, folder: Path, seed: int) -> str | None:
        """The process ends at a random time, from its start to after its end; then the same command."""
        cfg = self.config(folder)
        moment = random.Random(f"kill {seed}").uniform(0.01, 1.1 * self.seconds)

        @contextlib.contextmanager
        def timer():
            # By default SIGALRM ends a process as SIGKILL does: by the kernel, at that moment, and nothing runs then.
            signal.setitimer(signal.ITIMER_REAL, moment)
            yield
            signal.setitimer(signal.ITIMER_REAL, 0)

        forked.run(cfg, body=_body(timer, None))
        return self._held(cfg) or self._resumed(cfg)

    def damage(self, folder: Path, seed: int) -> str | None:
        """The newest checkpoint is damaged: an explicit path is refused, and else the one before it is used."""
        shutil.copytree(self._template, folder)
        cfg = self.config(folder)
        newest = checkpoint.folders(folder / "checkpoints")[-1]
        done = damage(newest, WAYS[seed % len(WAYS)], random.Random(f"damage {seed}"))
        explicit = replace(cfg, resume_from_checkpoint=str(newest))
        if forked.run(explicit) != [1] or "is not a whole checkpoint" not in forked.log(cfg):
            return f"{done}: the explicit path was not refused: {forked.log(cfg)[-2000:]}"
        if lost := self._resumed(cfg, corrupt=[f"{newest.name}.corrupt"]):
            return f"{done}: {lost}"
        return None

    def config(self, folder: Path):
        """The same run in another folder."""
        saving = {"checkpointing_steps": 1, "asynchronous": self._asynchronous}
        return config(folder, train={"max_train_steps": SAVES, "global_batch_size": 8}, checkpoint=saving)

    def _run(self, cfg, disk, *, expected: int) -> None:
        codes = forked.run(cfg, body=_body(disk, Path(cfg.output_dir).with_suffix(".json")))
        assert codes == [expected], f"exit code {codes}: {forked.log(cfg)[-3000:]}"

    def _held(self, cfg) -> str | None:
        """What was committed before the end is there: each step is logged before it is saved."""
        logged = forked.last_step(cfg)
        try:
            found = checkpoint.latest(Path(cfg.output_dir) / "checkpoints", set_aside=False)
        except CheckpointError as error:
            return str(error)
        least = logged - 1 - self._asynchronous
        return f"{found} at step {logged}" if (found.step if found else 0) < least else None

    def _resumed(self, cfg, *, corrupt: list[str] = ()) -> str | None:
        folder = Path(cfg.output_dir)
        if (codes := forked.run(cfg, body=_body(contextlib.nullcontext, None))) != [0]:
            return f"exit code {codes}: {forked.log(cfg)[-2000:]}"
        if forked.state(cfg, SAVES) != self.state:
            return "other bits at the end"
        if self._metrics(cfg) != self.lines:
            return "other lines of metrics.jsonl"
        if (names := _names(folder)) != sorted([*END, *corrupt]):
            return f"checkpoints/ holds {names} at the end"
        if junk := [path.name for path in folder.rglob("*") if ".tmp" in path.name or path.suffix == ".trash"]:
            return f"{junk} is left at the end"
        shutil.rmtree(folder)
        return None

    def _metrics(self, cfg) -> list[tuple]:
        return [(line["step"], line["loss"], line["lr"], line["samples_seen"]) for line in forked.metrics(cfg)]


def _body(disk, report: Path | None):
    """What a trial's process does: train under the lock, on the disk; its operations go into `report`."""

    def body(cfg):
        with disk() as entered, lock.hold(Path(cfg.output_dir)):
            Trainer(cfg).fit()
        if report is not None:
            report.write_text(json.dumps(entered.operations))

    return body

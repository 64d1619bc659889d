"""Processes that wait for each other as long as the other lives, and no longer; and what is told when one fails."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import forked
from finetune import checkpoint, sample
from finetune.errors import DataError
from finetune.objective import build_objective
from finetune.processes import Lifeline
from finetune.trainer import Trainer
from finetune.watchdog import Watchdog
from forked import log, run, start, state, wait
from test_resume import write_images
from tiny import config

STEPS = 6
SHORT = {"max_train_steps": STEPS, "global_batch_size": 8, "timeout_minutes": 4 / 60}


class Spoiled:
    """The objective of a config that does something else in one step (counted in batches drawn) of one process."""

    def __init__(self, cfg, at, what, rank=1):
        self._inner, self._at, self._what, self._rank = build_objective(cfg.objective, clip_sample=True), at, what, rank

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def loss(self, network, x0, random):
        self._at -= 1
        if self._at < 0 and int(os.environ.get("RANK", 0)) == self._rank:
            self._what()
        return self._inner.loss(network, x0, random)


def spoiled(at, what, rank=1):
    return lambda cfg: Trainer(cfg, objective=Spoiled(cfg, at, what, rank)).fit()


def ended(cfg, body, processes=2):
    """The exit code of each process, and when it ended."""
    pids, ends = forked.start(cfg, processes=processes, body=body), {}
    deadline = time.monotonic() + 40
    while len(ends) < processes and time.monotonic() < deadline:
        for pid in set(pids) - set(ends):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ends[pid] = os.waitstatus_to_exitcode(status), time.time()
        time.sleep(0.01)
    for pid in set(pids) - set(ends):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ends[pid] = None, time.time()
    return [ends[pid] for pid in pids]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("reference") / "run", train=SHORT)
    assert run(cfg, processes=2) == [0, 0], log(cfg)
    return state(cfg, STEPS)


def raises():
    raise ValueError("a bug of somebody")


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    time.sleep(60)


def is_stopped():
    if os.fork() == 0:  # somebody else wakes it up again, as a launcher's SIGKILL would
        time.sleep(7)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("what", "seconds", "words"),
    [
        (raises, 2, "process 1 ended: ValueError: a bug of somebody (rows "),
        (is_killed, 3, "process 1 was killed or stopped: no sign of life for 1."),
        (hangs, 8, "another process hangs, see where the threads of each stand"),
        (is_stopped, 8, "process 1 was killed or stopped: no sign of life for "),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_process_of_two(tmp_path, reference, what, seconds, words):
    cfg = config(tmp_path / "run", train=SHORT, checkpoint={"checkpointing_steps": 100})

    def marked():
        if not (tmp_path / "moment").exists():
            (tmp_path / "moment").write_text(str(time.time()))
        what()

    codes, ends = zip(*ended(cfg, spoiled(3, marked)), strict=True)
    assert codes[0] == 1 and codes[1] not in (0, None), log(cfg)
    moment = float((tmp_path / "moment").read_text())
    assert ends[0] - moment < seconds + 1, "a second more than wanted, for machines that are busy"
    assert words in log(cfg)
    if what is raises:
        assert "process 1 of 2, step 4, rows " in log(cfg) and "ValueError: a bug of somebody" in log(cfg)
    if what is hangs:  # both show where they stand
        assert log(cfg).count("no progress for ") == 2 and "in hangs" in log(cfg)
        assert "process 1 of 2, step 4, rows " in log(cfg)
    assert state(cfg, 3), "the steps that were whole are saved, although no checkpoint was due"
    assert run(cfg, processes=2) == [0, 0], log(cfg)
    assert state(cfg, STEPS) == reference


@pytest.mark.parametrize("what", [raises, is_killed])
def test_the_main_process_of_two(tmp_path, reference, what):
    """It holds the store by which processes tell of themselves; what it has not saved when killed is done again."""
    cfg = config(tmp_path / "run", train=SHORT, checkpoint={"checkpointing_steps": 2})
    start = time.time()
    codes, ends = zip(*ended(cfg, spoiled(3, what, rank=0)), strict=True)
    assert codes == ((1 if what is raises else -signal.SIGKILL), 1), log(cfg)
    assert max(ends) - min(ends) < 4 and max(ends) - start < 30
    assert "process 0" in log(cfg)
    assert state(cfg, 3 if what is raises else 2)
    assert run(cfg, processes=2) == [0, 0], log(cfg)
    assert state(cfg, STEPS) == reference


def test_main_process_may_take_longer_than_the_time_limit(tmp_path, monkeypatch):
    """Data check, samples and checkpoints of the main process alone; a collective of that length is given up."""
    train = SHORT | {"max_train_steps": 1, "timeout_minutes": 1 / 60}
    cfg = config(tmp_path / "run", train=train, checkpoint={"checkpointing_steps": 1})

    def slow(cfg):
        import finetune.trainer

        def slowly(function):
            def later(*args, **settings):
                if os.environ["RANK"] == "0":
                    time.sleep(1.6)
                return function(*args, **settings)

            return later

        finetune.trainer.open_data = slowly(finetune.trainer.open_data)
        sample.draw, checkpoint.save = slowly(sample.draw), slowly(checkpoint.save)
        Trainer(cfg).fit()

    assert run(cfg, processes=2, body=slow) == [0, 0], log(cfg)

    def control(cfg):
        trainer = Trainer(cfg)
        if trainer.accelerator.is_main_process:
            time.sleep(1.6)
        torch.distributed.barrier()

    other = config(tmp_path / "control", train=train)
    assert 1 in run(other, processes=2, body=control)


def test_error_of_the_main_process_alone_ends_the_others(tmp_path):
    cfg = config(tmp_path / "run", train=SHORT)

    def broken(cfg):
        import finetune.trainer

        def open_data(*_, **__):
            raise DataError("nothing in there")

        if os.environ["RANK"] == "0":
            finetune.trainer.open_data = open_data
        Trainer(cfg)

    start = time.monotonic()
    assert run(cfg, processes=2, body=broken) == [4, 1], log(cfg)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("how", ["killed", "spoiled data"])
def test_loader_failure_loses_no_step(tmp_path, how):
    folder = write_images(tmp_path / "images")
    data = {"dataset_name": None, "train_data_dir": str(folder), "dataloader_num_workers": 1, "max_train_samples": None}
    settings = {"data": data, "conditioning": {"kind": "none"}, "checkpoint": {"checkpointing_steps": 10**6}}
    cfg = config(tmp_path / "run", train={"max_train_steps": 10**6, "global_batch_size": 4}, **settings)

    def trained(cfg):
        trainer = Trainer(cfg)
        step = trainer.train_step

        def then(*args):
            if trainer.step == 3:
                fail()
            return step(*args)

        trainer.train_step = then
        trainer.fit()

    def fail():
        if how == "killed":
            import multiprocessing

            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
        else:
            for file in folder.glob("*.png"):
                file.unlink()

    assert run(cfg, body=trained, seconds=60) == [1 if how == "killed" else 4], log(cfg)
    steps = [path.name for path in sorted((Path(cfg.output_dir) / "checkpoints").iterdir())]
    assert steps == [f"step-{forked.last_step(cfg):08d}"] and forked.last_step(cfg) >= 3
    if how == "killed":
        assert "a process that loads samples was killed, most likely because the machine ran out of memory" in log(cfg)
    assert f"process 0 of 1, step {forked.last_step(cfg) + 1}, rows " in log(cfg)


def test_out_of_memory_is_explained_and_loses_no_step(tmp_path):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    cfg = config(tmp_path / "run", train=SHORT, checkpoint={"checkpointing_steps": 100})
    assert run(cfg, body=spoiled(2, full, rank=0)) == [1]
    assert "gradient_checkpointing true" in log(cfg) and "train.train_batch_size" in log(cfg)
    assert "saved at step 2" in log(cfg) and state(cfg, 2)


def test_hang_in_one_process_is_shown_and_ended(tmp_path):
    cfg = config(tmp_path / "run", train=SHORT | {"timeout_minutes": 1 / 60}, checkpoint={"checkpointing_steps": 1})
    start = time.monotonic()
    assert run(cfg, body=spoiled(2, hangs, rank=0)) == [1]
    assert time.monotonic() - start < 20
    ended = r"ended after \d+ s without progress \(train.timeout_minutes\): process 0 of 1, step 3, rows \d+"
    assert re.search(ended, log(cfg))
    assert "in hangs" in log(cfg)


HELD = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def asking(asked, port, stop):
    """A `body`: waits for a store that is stopped before it is asked, or in the course of the meeting."""

    def body(_):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        lifeline = Lifeline(name="here", rank=0, processes=2, patience=0.5)
        other = Lifeline(name="here", rank=1, processes=2, patience=0.5)
        with Watchdog(0.5, lambda: "a test"):  # outside of a step, it must leave the timer alone
            if asked == "waiting":
                threading.Timer(0.5, stop).start()
            else:
                stop()
            lifeline.find_gone() if asked == "find_gone" else lifeline.meet()
        other.close()

    return body


def test_store_in_a_process_that_was_stopped(tmp_path):
    """As when torchrun itself is stopped: no call of the store returns, whether first or later in the meeting."""
    holders, trials = [], {}
    try:
        for asked in ("meet", "waiting", "find_gone"):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            holder = subprocess.Popen([sys.executable, "-c", HELD], **pipes)
            holders.append(holder)
            port, moment = holder.stdout.readline().strip(), tmp_path / asked

            def stop(holder=holder, moment=moment):
                os.kill(holder.pid, signal.SIGSTOP)  # holder is no child of this process
                moment.write_text(str(time.monotonic()))

            cfg = config(tmp_path / f"{asked}-run")
            trials[asked] = cfg, moment, start(cfg, body=asking(asked, port, stop))
        for asked, (cfg, moment, pids) in trials.items():
            assert wait(cfg, pids, seconds=20) == [1], log(cfg)
            assert time.monotonic() - float(moment.read_text()) < 1.2 * 0.5 + 5 + 4, log(cfg)
            assert "Timeout (0:00:05" in log(cfg) and f" in {asked if asked == 'find_gone' else 'meet'}" in log(cfg)
    finally:
        for holder in holders:
            holder.kill()
        holder.communicate()

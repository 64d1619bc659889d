"""A run asked to stop loses nothing, at whatever moment, and leaves nothing running."""

import os
import signal
import subprocess
import sys
import time

import pytest

from finetune.cli import main
from finetune.errors import Preempted
from finetune.signals import SIGNALS, Interrupted, preempted
from forked import log, metrics, run, state
from signal_trials import PHASES, configuration, trial
from tiny import ROOT, config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trials")


@pytest.mark.parametrize(
    ("seed", "phase", "target"),
    [*((i, phase, ("main", "group")[i % 2]) for i, phase in enumerate(PHASES)), (6, "train", "launcher")],
)
def test_signal_in_each_phase(folder, seed, phase, target):
    outcome = trial(seed, folder, phase=phase, target=target, workers=0)
    assert not outcome.problems, outcome


def test_group_signal_spares_the_loader_processes(folder):
    outcome = trial(100, folder, phase="train", target="group", workers=1)
    assert not outcome.problems and outcome.codes[0] in (75, 130), outcome


def test_drawing_is_interrupted_and_drawn_at_the_resume(tmp_path):
    slow = {"num_images": 16, "num_inference_steps": 1000, "sample_every": 2}
    cfg = configuration(tmp_path / "run", sample=slow)
    grid = tmp_path / "run" / "samples" / "step-00000002.png"
    start = time.monotonic()
    assert run(cfg, stop=(2, signal.SIGTERM)) == [75], log(cfg)
    assert not grid.exists() and metrics(cfg)[-1]["step"] == 2 and state(cfg, 2)
    assert time.monotonic() - start < 10  # 16 images in 1000 steps take longer
    assert run(configuration(tmp_path / "run")) == [0], log(cfg)
    assert grid.exists()


def test_a_command_ends_at_once_while_it_waits_outside_of_python(tmp_path):
    """A rendezvous whose other process never comes: no Python handler runs in there."""
    command = [sys.executable, "train_unet.py", "--config", "configs/train/digits.yaml"]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    child = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "run")], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **world, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    time.sleep(4)  # importing or waiting, on a slow machine: it must not matter
    child.send_signal(signal.SIGTERM)
    start = time.monotonic()
    _, errors = child.communicate(timeout=10)
    assert child.returncode == 75 and "SIGTERM: stopped; nothing was lost" in errors
    assert time.monotonic() - start < 2


def test_ways_of_heeding_a_signal():
    before = signal.getsignal(signal.SIGTERM)
    with SIGNALS.noting():
        os.kill(os.getpid(), signal.SIGTERM)
        assert SIGNALS.received == signal.SIGTERM
        with pytest.raises(Interrupted), SIGNALS.interrupting():
            pytest.fail("a signal that came before must interrupt too")
        os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
        os.kill(os.getpid(), signal.SIGINT)
        assert SIGNALS.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), SIGNALS.noting():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    with SIGNALS.noting():
        assert SIGNALS.received == 0
        with pytest.raises(Interrupted):
            with SIGNALS.interrupting():
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(1)
        os.kill(os.getpid(), signal.SIGUSR1)  # after the interruption they are only noted
    assert isinstance(error := preempted(signal.SIGINT, 3, how="x"), Preempted) and error.exit_code == 130


@pytest.mark.parametrize(
    ("entry", "argv"),
    [
        ("import runpy; runpy.run_path('train_unet.py', run_name='__main__')", ["--help"]),
        ("from finetune.cli import main; sys.exit(main())", ["config", "--help"]),
    ],
)
def test_signal_after_the_last_command_does_not_change_how_it_ended(entry, argv):
    late = "import atexit, sys, time; atexit.register(lambda: (print('LATE', flush=True), time.sleep(1)));"
    command = [sys.executable, "-c", f"{late} {entry}", *argv]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = "".join(iter(child.stdout.readline, "LATE\n"))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        child.send_signal(number)
    rest, _ = child.communicate(timeout=20)
    assert child.returncode == 0 and not rest, output + rest


def test_command_within_a_process_gives_the_signals_back(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(SystemExit):
        main(["ema", "--help"])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_second_interrupt_aborts(tmp_path):
    cfg = config(tmp_path / "run", train={"max_train_steps": 10**6})

    def impatient(cfg):
        from finetune import checkpoint
        from finetune.trainer import Trainer

        def stuck(*_, **__):
            print("SAVING", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

        checkpoint.save = stuck
        Trainer(cfg).fit()

    assert run(cfg, body=impatient, stop=(1, signal.SIGINT), seconds=30) == [130], log(cfg)
    assert "SAVING" in log(cfg) and "interrupted" in log(cfg)

"""One signal at a random moment of a whole run, to whatever a scheduler or a person may send it; and what became of it.

    outcome = trial(seed, folder)          everything random follows from the seed: a failing trial can be replayed
    assert not outcome.problems, outcome

Forked from a process in which everything is imported, as in forked.py, with the whole of `finetune train` in it.
"""

import ctypes
import functools
import os
import random
import signal
import time
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path

import forked
from finetune import checkpoint, cli, data, run, sample
from finetune.config import TrainConfig
from finetune.signals import SIGNALS, die_with_parent
from tiny import config

STEPS = 6
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
PHASES = ("start", "check", "train", "save", "sample", "export")
TARGETS = ("main", "group", "launcher")
SLOW = {"check": (data, "check"), "save": (checkpoint, "save"), "sample": (sample, "draw"),
        "export": (run, "export_run")}  # fmt: skip


@dataclass
class Outcome:
    """What a trial was, and what is wrong with how it ended (nothing, if `problems` is empty)."""

    seed: int
    phase: str
    target: str
    signal: str
    workers: int
    processes: int
    codes: list[int] = field(default_factory=list)
    stopped_at: int = 0
    seconds: float = 0.0
    """From the signal to the end of the last process."""
    problems: list[str] = field(default_factory=list)


def trial(
    seed: int, folder: Path, *, phase: str | None = None, target: str | None = None, workers: int | None = None
) -> Outcome:
    """Run, send one signal, look at what is left, run again, and compare with a run that nobody stopped."""
    draw = random.Random(seed)
    phase = phase or draw.choice(PHASES)
    target = target or draw.choice(TARGETS)
    number = signal.SIGTERM if target == "launcher" else draw.choice(list(CODES))
    alone = phase in ("start", "check", "export") or target == "launcher"
    processes = 1 if alone else draw.choice((1, 2))
    outcome = Outcome(seed, phase, target, signal.Signals(number).name, draw.choice((0, 2)), processes)
    outcome.workers = outcome.workers if workers is None else workers
    cfg = configuration(folder / f"trial-{seed}", workers=outcome.workers)
    outcome.codes, outcome.seconds = _signalled(cfg, outcome, number, draw)
    left = _processes_of(_sessions(cfg))
    if left:
        outcome.problems.append(f"left running: {left}")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    if set(outcome.codes) not in ({CODES[number]}, {0}):
        outcome.problems.append(f"exit codes {outcome.codes}")
    if outcome.seconds > 10:
        outcome.problems.append(f"it took {outcome.seconds:.1f} s to stop")
    newest = checkpoint.newest_step(Path(cfg.output_dir) / "checkpoints") or 0
    outcome.stopped_at = forked.last_step(cfg)
    if newest < outcome.stopped_at:
        outcome.problems.append(f"steps lost: saved {newest}, done {outcome.stopped_at}")
    again = configuration(folder / f"trial-{seed}")  # loader processes may change at a resume, and take long to start
    if forked.run(again, processes=processes, body=train) != [0] * processes:
        outcome.problems.append("the same command does not finish the run")
    elif forked.state(cfg, STEPS) != reference(folder, processes):
        outcome.problems.append("the resumed run ends with other bits")
    elif missing := [name for name in _expected() if not (Path(cfg.output_dir) / name).exists()]:
        outcome.problems.append(f"missing: {missing}")
    if outcome.problems:
        outcome.problems.append(forked.log(cfg)[-3000:])
    return outcome


def train(cfg: TrainConfig) -> None:
    """What `finetune train` does after it has read its arguments."""
    run.train(cfg)


def configuration(output_dir: Path, *, workers: int = 0, **sections) -> TrainConfig:
    """A run of 6 steps with checkpoints and samples at every second."""
    sample = {"num_images": 4, "num_inference_steps": 20, "sample_every": 2}
    train = {"max_train_steps": STEPS, "global_batch_size": 8}
    settings = {"sample": sample, "train": train, "data": {"dataloader_num_workers": workers}}
    return config(output_dir, **settings | sections)


@functools.cache
def reference(folder: Path, processes: int) -> dict[str, bytes]:
    """The end of a run that nobody stopped."""
    cfg = configuration(folder / f"reference-{processes}")
    assert forked.run(cfg, processes=processes, body=train) == [0] * processes, forked.log(cfg)
    return forked.state(cfg, STEPS)


def _expected() -> list[str]:
    return [f"samples/step-{step:08d}.png" for step in (2, 4, 6)] + ["pipeline/model_index.json"]


def _signalled(cfg: TrainConfig, outcome: Outcome, number: int, draw: random.Random) -> tuple[list[int], float]:
    """Start the run, wait for the moment, send the signal; the exit codes, and seconds from the signal to the end."""
    Path(cfg.output_dir).parent.mkdir(parents=True, exist_ok=True)
    marker, step = Path(f"{cfg.output_dir}.marker"), draw.randrange(1, STEPS)
    launched = outcome.target == "launcher"
    if launched:
        PR_SET_CHILD_SUBREAPER = 36
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # so that the orphan's exit code can be read here

    def body(cfg):
        os.setsid()
        forkserver._forkserver.__init__()  # that of the loader processes is to be of this session: it is started anew
        if launched:
            pid = os.fork()
            if pid:
                _write(Path(f"{cfg.output_dir}.trainer"), str(pid))
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            SIGNALS.__init__()  # as a fresh process, not as the fork of one
            die_with_parent()
            os._exit(cli.guarded(lambda _: whole(cfg), []))
        whole(cfg)

    def whole(cfg):
        _write(Path(f"{cfg.output_dir}.session-{os.getpid()}"), str(os.getsid(0)))
        if outcome.phase in SLOW:
            module, name = SLOW[outcome.phase]
            _mark(module, name, marker, after=draw.randrange(2) if outcome.phase in ("save", "sample") else 0)
        run.train(cfg)

    pids = forked.start(cfg, processes=outcome.processes, body=body)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and forked.alive(pids) and not _now(cfg, outcome, marker, step):
        time.sleep(0.005)
    time.sleep(draw.random() * 0.3)
    start, trainers = time.monotonic(), pids
    if launched:
        os.kill(pids[0], number)
        if (code := os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])) >= 0:
            return [code], 0.0  # the trainer had ended, and so had its launcher
        trainers = [int(Path(f"{cfg.output_dir}.trainer").read_text())]
    elif outcome.target == "group":
        for pid in pids:
            _tolerant(os.killpg, pid, number)
    else:
        _tolerant(os.kill, pids[0], number)
    codes = forked.wait(cfg, trainers, seconds=60)
    return codes, time.monotonic() - start


def _now(cfg: TrainConfig, outcome: Outcome, marker: Path, step: int) -> bool:
    if outcome.phase == "start":
        return len(list(Path(cfg.output_dir).parent.glob(f"{Path(cfg.output_dir).name}.session-*"))) > 0
    return forked.last_step(cfg) >= step if outcome.phase == "train" else marker.exists()


def _mark(module, name: str, marker: Path, after: int) -> None:
    """Let the function say that it was entered (the call after `after` others), and take 0.2 s longer."""
    real, calls = getattr(module, name), []

    def slow(*args, **settings):
        calls.append(1)
        if len(calls) > after:
            _write(marker, "")
            for _ in range(10):
                time.sleep(0.02)
        return real(*args, **settings)

    setattr(module, name, slow)


def _write(path: Path, text: str) -> None:
    Path(f"{path}.tmp").write_text(text)
    Path(f"{path}.tmp").rename(path)


def _tolerant(kill, pid: int, number: int) -> None:
    try:
        kill(pid, number)
    except ProcessLookupError:
        pass


def _sessions(cfg: TrainConfig) -> set[int]:
    path = Path(cfg.output_dir)
    return {int(file.read_text()) for file in path.parent.glob(f"{path.name}.session-*")}


def _processes_of(sessions: set[int]) -> list[int]:
    """The processes of these sessions that live 5 s from now at the latest (zombies do not)."""
    deadline = time.monotonic() + 5
    while True:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session, *_ = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(session) in sessions and state != "Z":
                found.append(int(stat.parent.name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)

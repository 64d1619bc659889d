"""Real training processes in half a second each: forked from this one, where everything heavy is imported already.

    codes = run(cfg)                                    one process, to the end
    codes = run(cfg, processes=2)                       two, over gloo
    codes = run(cfg, stop=(5, signal.SIGKILL))          the signal is sent as soon as step 5 stands in metrics.jsonl

The children forget an Accelerator that the parent may have made: its state says there is one process. Theirs are forks
too: the server of their loader processes (test_batching.py and test_signals.py have one that is started anew), and what
proves the export of a LoRA (test_lora_export.py has it started anew).
"""

import functools
import gc
import io
import json
import logging
import os
import socket
import sys
import time
import traceback
from multiprocessing import connection, forkserver
from pathlib import Path

import PIL.Image
import scipy.io  # noqa: F401  imported here for all children, as what `_warm` does
from accelerate.state import AcceleratorState, GradientState

import finetune.run
from finetune import cli, lora_proof
from finetune.config import TrainConfig
from finetune.plots import draw_loss
from finetune.trainer import Trainer


def run(
    cfg: TrainConfig, *, processes: int = 1, stop: tuple[int, int] | None = None, body=None, seconds: float = 120
) -> list[int]:
    """Train `cfg`; returns the exit code of each process, negative for a signal. `body(cfg)` replaces the training."""
    pids = start(cfg, processes=processes, body=body)
    return wait(cfg, pids, stop=stop, seconds=seconds)


def start(cfg: TrainConfig, *, processes: int = 1, body=None) -> list[int]:
    """Start training `cfg`; returns the process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    Path(cfg.output_dir).parent.mkdir(parents=True, exist_ok=True)
    _warm()
    sys.stdout.flush(), sys.stderr.flush()
    return [_fork(cfg, rank, processes, port, body or (lambda cfg: Trainer(cfg).fit())) for rank in range(processes)]


def wait(cfg: TrainConfig, pids: list[int], *, stop: tuple[int, int] | None = None, seconds: float = 120) -> list[int]:
    """The exit codes of processes that `start` started."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if stop and last_step(cfg) >= stop[0]:
            for pid in set(pids) - set(codes):
                os.kill(pid, stop[1])
            stop = None
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, 9)
            raise TimeoutError(f"no end after {seconds} s; {log(cfg)}")
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def alive(pids: list[int]) -> bool:
    """Whether none of the processes has ended."""
    return all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in pids)


def whole(cfg: TrainConfig) -> None:
    """A `body`: what the command line does, from the plan on the screen to the export."""
    lora_proof._ask = prove_in_a_fork
    finetune.run.train(cfg)


def prove_in_a_fork(request: dict) -> None:
    """In the place of `lora_proof._ask`: the same question to the same code, in a fork and not in a new process."""
    text = json.dumps(request)
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return
    try:
        lora_proof._answer(json.loads(text))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def log(cfg: TrainConfig) -> str:
    """What the processes printed."""
    return _log_path(cfg).read_text()


def last_step(cfg: TrainConfig) -> int:
    """The newest step in metrics.jsonl, 0 if there is none."""
    lines = metrics(cfg)
    return lines[-1]["step"] if lines else 0


def metrics(cfg: TrainConfig) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = Path(cfg.output_dir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def state(cfg: TrainConfig, step: int) -> dict[str, bytes]:
    """Every tensor file of the checkpoint of `step`, as bytes: equal if and only if all bits are."""
    folder = Path(cfg.output_dir) / "checkpoints" / f"step-{step:08d}"
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@functools.cache
def _warm() -> None:
    """Do once what each child would do for the first time: matplotlib compiles a grammar, Pillow loads its formats."""
    PIL.Image.init()
    draw_loss([{"step": step, "loss": 1 / step, "lr": 1e-3 / step} for step in (1, 2, 3)], io.BytesIO())


def _serve_loaders() -> None:
    """What `ensure_running` of the fork server does, but that the server is forked from here and has its imports."""
    server = forkserver._forkserver
    alive, held = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address := connection.arbitrary_address("AF_UNIX"))
        listener.listen()
        pid = os.fork()
        if not pid:
            try:
                os.close(held)
                forkserver.main(listener.detach(), alive, None)
            finally:
                os._exit(0)
    os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, held, pid


def _log_path(cfg: TrainConfig) -> Path:
    return Path(cfg.output_dir).with_suffix(".log")


def _fork(cfg: TrainConfig, rank: int, processes: int, port: int, body) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    gc.freeze()  # what the parent has made is not to be looked through again and again
    try:
        stream = os.open(_log_path(cfg), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1), os.dup2(stream, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        logging.getLogger().handlers.clear()  # those of pytest
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        forkserver._forkserver.__init__()  # one that a test had for loader processes is a child of the parent only
        if cfg.data.dataloader_num_workers:
            _serve_loaders()
        os.environ |= {"ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        code = cli.guarded(lambda _: body(cfg), [])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

"""One run per output_dir: two would rotate each other's checkpoints away."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import weakref
from pathlib import Path
from typing import IO

from finetune.errors import ConfigError
from finetune.provenance import command

_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def hold(output_dir: Path) -> IO[str]:
    """Lock `output_dir` until the returned file is closed or the process ends, however it ends.

    Who reads the run (`finetune sample`, `ema`, `evaluate`) needs no lock. On a network file system it holds between
    hosts only if that passes flock on, as NFS does and some others do not. Raises ConfigError that names the owner.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"output_dir {output_dir} cannot be written: {error.strerror}; choose another") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(file)
        file.close()
        raise ConfigError(
            f"output_dir {output_dir} is in use by another run ({owner}): wait for it, stop it, or choose another "
            "output_dir"
        ) from None
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}: {command()}\n")
    file.flush()
    _held.add(file)
    return file


def _owner(file: IO[str]) -> str:
    for _ in range(10):  # between its lock and its name there is a moment
        file.seek(0)
        if owner := file.read().strip():
            return owner
        time.sleep(0.05)
    return "which did not leave its name"


def _release_in_child() -> None:
    """A forked process shares the lock: loader processes that outlive a killed run would hold it on."""
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_release_in_child)

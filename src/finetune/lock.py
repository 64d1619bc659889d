"""One run per output_dir: two would rotate each other's checkpoints away."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from finetune.errors import ConfigError


def hold(output_dir: Path) -> IO[str]:
    """Lock `output_dir` until the returned file is closed or the process ends, however it ends.

    Raises ConfigError that names the process which holds it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"output_dir {output_dir} cannot be written: {error.strerror}; choose another") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ConfigError(
            f"output_dir {output_dir} is in use by another run ({file.read().strip()}): wait for it, stop it, or "
            "choose another output_dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file

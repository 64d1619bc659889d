"""A disk that dies, is full, fails or is slow at its k-th durable operation, for what Python code does to files.

    with FaultyDisk() as disk: ...            counts: disk.operations is the list of them, in order
    with FaultyDisk(at=7) as disk: ...        dies at the 7th (from 0): it and all later ones have no effect
    FaultyDisk(at=7, torn=True)               a write that is the 7th leaves its first half behind
    FaultyDisk(at=7, power=True)              besides, what was not flushed by fsync when it died is undone
    FaultyDisk(at=7, error=errno.ENOSPC)      the 7th fails with this error, later ones work (`times` of them fail)
    FaultyDisk(at=7, kill=True)               the 7th sends SIGKILL to this process
    FaultyDisk(slow=0.1)                      each operation takes so many seconds longer

Durable operations are the creation of a file or its opening for writing, each write through a descriptor, fsync,
rename, unlink, mkdir and rmdir. In the process that dies by `Died`, no `except` or `finally` of the code under test can
reach the disk any more, so what is left is what a killed process leaves; thousands of trials need no process each.
`power` takes the worst case that POSIX allows: contents and names are lost until the file, or the folder, is flushed.
Nothing is really flushed: nobody pulls the plug of the machine that tests.
"""

import builtins
import errno as errors
import io
import os
import shutil
import signal
import threading
import time
from pathlib import Path


class Died(BaseException):
    """The machine is off."""


class FaultyDisk:
    """While entered, the durable operations of this process, of all threads, go through here."""

    def __init__(self, at=None, *, torn=False, power=False, error=None, times=1, kill=False, slow=0.0):
        self.operations: list[str] = []
        self._at, self._torn, self._power, self._error, self._times = at, torn, power, error, times
        self._kill, self._slow = kill, slow
        self._dead = False
        self._lock = threading.RLock()
        self._paths: dict[int, Path] = {}  # open descriptors
        self._unflushed: list[tuple[str, Path, object]] = []  # what a loss of power undoes, in order

    def __enter__(self):
        names = ("open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir")
        self._real = {name: getattr(os, name) for name in names}
        self._real_open = io.open
        for name in self._real:
            setattr(os, name, getattr(self, f"_{name}"))
        builtins.open = io.open = self._open_file
        return self

    def __exit__(self, *_):
        for name, function in self._real.items():
            setattr(os, name, function)
        builtins.open = io.open = self._real_open
        if self._dead and self._power:
            self._lose_power()

    # -- operations ------------------------------------------------------------------------------------------------

    def _happens(self, what, path, torn=None):
        """Count an operation; die, fail or wait as this disk does."""
        with self._lock:
            if self._dead:
                raise Died
            number = len(self.operations)
            self.operations.append(f"{what} {Path(os.fspath(path)).name}")
        if self._slow:
            time.sleep(self._slow)
        if self._at is None or number < self._at:
            return
        if self._error is not None:
            if number < self._at + self._times:
                raise OSError(self._error, os.strerror(self._error), os.fspath(path))
            return
        if torn and self._torn:
            torn()
        if self._kill:
            os.kill(os.getpid(), signal.SIGKILL)
        self._dead = True
        raise Died

    def _open(self, path, flags, mode=0o777, *, dir_fd=None):
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes:
            self._happens("open", path)
        descriptor = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        self._paths[descriptor] = Path(os.fspath(path))
        if writes:
            self._unflushed.append(("create", Path(path), None))
        return descriptor

    def _open_file(self, file, mode="r", *args, **kwargs):
        if set(mode) & set("wax+") and not isinstance(file, int):
            self._happens("open", file)
        return self._real_open(file, mode, *args, **kwargs)

    def _write(self, descriptor, data):
        path = self._paths.get(descriptor, Path(f"descriptor {descriptor}"))
        half = memoryview(data)[: len(data) // 2]
        self._happens("write", path, torn=lambda: self._real["write"](descriptor, half))
        self._unflushed.append(("content", path, None))
        return self._real["write"](descriptor, data)

    def _fsync(self, descriptor):
        path = self._paths.get(descriptor, Path(f"descriptor {descriptor}"))
        self._happens("fsync", path)
        self._unflushed = [
            (what, at, to) for what, at, to in self._unflushed
            if not (at == path if what == "content" else at.parent == path)
        ]  # fmt: skip

    def _rename(self, source, target, *, src_dir_fd=None, dst_dir_fd=None):
        self._happens("rename", target)
        self._real["rename"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        self._unflushed.append(("rename", Path(source), Path(target)))

    def _unlink(self, path, *, dir_fd=None):
        self._happens("unlink", path)
        self._real["unlink"](path, dir_fd=dir_fd)

    def _rmdir(self, path, *, dir_fd=None):
        self._happens("rmdir", path)
        self._real["rmdir"](path, dir_fd=dir_fd)

    def _mkdir(self, path, mode=0o777, *, dir_fd=None):
        self._happens("mkdir", path)
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        self._unflushed.append(("create", Path(path), None))

    # -- after the end -----------------------------------------------------------------------------------------------

    def _lose_power(self):
        """Undo, from the last to the first, what was not flushed. What was renamed or deleted meanwhile is skipped."""
        for what, path, target in reversed(self._unflushed):
            if what == "rename" and target.exists() and not path.exists():
                target.rename(path)
            elif what == "content" and path.is_file():
                os.truncate(path, 0)
            elif what == "create" and path.is_dir():
                shutil.rmtree(path)
            elif what == "create" and path.exists():
                path.unlink()


FULL, BROKEN = errors.ENOSPC, errors.EIO

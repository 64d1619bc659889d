"""Checkpoints that are whole or absent: safetensors and JSON, a manifest with checksums, and a rename as the commit.

Own code instead of Accelerate's save_state: that one writes in place, pickles, has no checksums, deletes the old
checkpoint before the new one exists, and does not restore the order of samples. What is kept of the checkpoints is
decided in retention.py, when they are written in saving.py.

    checkpoints/step-00001000/    <part>.safetensors ..., state.json, manifest.json
    checkpoints/.tmp-step-*       being written; never read
    checkpoints/*.trash           being deleted        *.corrupt   quarantined
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from finetune.durable import crc_of, fsync, need_space, safetensors, write
from finetune.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found to be whole."""

    path: Path
    state: dict[str, Any]
    """The JSON part: counters and facts of the run."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of `part` ("model", "optimizer", "ema_0.9999", ...), on the CPU."""
        with self._reading(part) as file:
            return load_file(file)

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of `part`, by its name; nothing else of the file is read.

        Raises CheckpointError if the checkpoint has no such part.
        """
        if not (self.path / f"{part}.safetensors").is_file():
            has = ", ".join(sorted(file.stem for file in self.path.glob("*.safetensors")))
            raise CheckpointError(f"{self.path} has no {part}; it has {has}: it is of another kind of run")
        with self._reading(part) as path, safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping

    @contextlib.contextmanager
    def _reading(self, part: str) -> Iterator[Path]:
        file = self.path / f"{part}.safetensors"
        try:
            yield file
        except SafetensorError as error:
            raise CheckpointError(f"{file} is no safetensors file, and nothing else is read: {error}") from error


def save(root: Path, *, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write checkpoint `root/step-<state["step"]>` and read it back. Returns its folder; others are not touched.

    The folder appears under its name only when every byte of it is on the disk. If it fails (OSError, such as a full
    disk), nothing half-written is left. A whole one of the same step is left as it is.
    """
    target = root / f"step-{state['step']:08d}"
    if target.exists():
        if problem(target) is None:
            return target  # the same step of the same run, hence the same weights
        quarantine(target)
    if not root.is_dir():
        root.mkdir(parents=True)
        fsync(root.parent)
    need_space(root, sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values()))
    temporary = root / f".tmp-{target.name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        files = {f"{part}.safetensors": safetensors(tensors) for part, tensors in parts.items()}
        files["state.json"] = iter([json.dumps(state, indent=1).encode()])
        written = {name: list(write(temporary / name, chunks)) for name, chunks in files.items()}
        body = {"format": FORMAT, "step": state["step"], "files": written}
        write(temporary / "manifest.json", [json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode()])
        fsync(temporary)
        temporary.rename(target)  # the commit
        fsync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if found := problem(target):
        quarantine(target)
        raise OSError(f"{target} does not read back as it was written: {found}")
    return target


def latest(root: Path, *, set_aside: bool = True) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, or None if there has been none.

    set_aside: rename broken ones to *.corrupt; only for the run that they belong to. Raises CheckpointError if
    checkpoints stand there but none is whole: a fresh start must not pass for a resume.
    """
    problems = []
    for path in reversed(folders(root)):
        found = _readable_problem(path)
        if found is None:
            return _open(path)
        problems.append(f"{path}: {found}")
        if set_aside:
            quarantine(path)
        does = "renamed to *.corrupt, using the one before it" if set_aside else "using the one before it"
        log.warning("checkpoint %s is broken (%s): %s", path, found, does)
    problems += [f"{path}: quarantined earlier" for path in root.glob("step-*.corrupt") if not problems]
    if problems:
        raise CheckpointError(
            "no checkpoint is whole:\n  " + "\n  ".join(problems) + f"\nTo start anew, move {root} away or choose "
            "another output_dir."
        )
    return None


def newest_step(root: Path) -> int | None:
    """The step of the newest checkpoint under `root`, whole or not; None if there is none."""
    steps = folders(root)
    return step_of(steps[-1]) if steps else None


def load(path: Path, *, what: str = "resume_from_checkpoint") -> Checkpoint:
    """The checkpoint at `path`. Raises CheckpointError if it is not one or is not whole; nothing else is tried.

    what: where the path was given, or what else it is, for the message.
    """
    if not path.is_dir():
        raise CheckpointError(f"{what}: {path} is no folder; give one such as .../step-00001000")
    if found := _readable_problem(path):
        raise CheckpointError(f"{what}: {path} is not a whole checkpoint: {found}")
    return _open(path)


def folders(root: Path) -> list[Path]:
    """Folders named like a checkpoint, oldest first; everything else is ignored."""
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def problem(path: Path, *, contents: bool = True) -> str | None:
    """Why the folder is not a whole checkpoint, or None. contents: compare checksums too, which reads all of it.

    Raises CheckpointError for one of another version of this toolkit, and OSError where the storage gives no answer:
    neither is broken, and must not be set aside.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        checksum = manifest.pop("checksum")
        if checksum != _checksum(manifest):
            return "manifest.json does not match its own checksum"
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has the format {manifest['format']} of another version of finetune; this one reads {FORMAT}. "
                "Go on with the version that run.json names, or choose another output_dir"
            )
        if step_of(path) != manifest["step"]:
            return f"it holds step {manifest['step']}"
        for name, (size, crc) in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if contents and crc_of(file) != crc:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    return None


def _readable_problem(path: Path) -> str | None:
    """As `problem`; raises CheckpointError if it cannot be told."""
    try:
        return problem(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): see to the storage or the permissions, and start again; or rename it "
            "to go on from the one before"
        ) from error


def quarantine(path: Path) -> None:
    """Rename a broken checkpoint to *.corrupt; one that was set aside before under this name goes."""
    target = path.with_name(path.name + ".corrupt")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _open(path: Path) -> Checkpoint:
    return Checkpoint(path, json.loads((path / "state.json").read_text()))


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())

"""Publish an exported model on the Hugging Face Hub: ask before training, push after it, never lose or leak anything.

Every conversation with the Hub runs in a child process (`hub_worker`). The client library waits for ever for a server
that falls silent, in threads that cannot be ended and that keep the interpreter from exiting; a process can be killed
when its time is up. The token reaches the child through its environment, never through its arguments.
"""

import hashlib
import json
import logging
import os
import random
import re
import shlex
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, PushPending
from finetune.hub_worker import fault
from finetune.redaction import KEYS, secret_values

LOGGER = logging.getLogger(__name__)

ROOT_FILES = ("README.md", "LICENSE", "config.yaml", "*.json", "*.safetensors", "*.png")
COMPONENT_FILES = ("*.json", "*.safetensors", "*.txt")
SAMPLE_FILES = ("*.png",)

MOST_FILES = 249
"""Of 250 files on, the Hub's own clients make several commits, between which a reader sees half a model."""

LONGEST_WAIT = 60.0
"""Seconds between two tries, at most; also what is kept back of a long budget for the last try."""


class _Refused(Exception):
    """The Hub, or what it would need, says no; trying again changes nothing."""


class _Unreachable(Exception):
    """Only transient faults, but the budget is spent."""


def probe(repo_id: str, *, private: bool = True, budget: float = 60.0, first_wait: float = 1.0) -> str | None:
    """Make sure, before anything heavy is done, that `push` will be allowed to write to `repo_id`.

    Looks for a login, asks the Hub whose it is, creates the repository if need be ("name" means "user/name"), and
    asks for write permission, because a read-only token passes everything else when the repository exists.

    budget: seconds that an outage may take; first_wait: seconds before the second try, doubled each time.
    Returns the full repository id, or None (and a warning) if the Hub could not be reached: training must not be lost
    for an outage, and `push` does all of this again.
    Raises ConfigError if pushing cannot work.
    """
    try:
        answer = _ask({"action": "probe", "repo_id": repo_id, "private": private}, budget, first_wait)
    except _Refused as error:
        raise ConfigError(f"push_to_hub to {repo_id!r} cannot work: {error}") from None
    except _Unreachable as error:
        LOGGER.warning("could not check the repository %s before training (%s); going on without", repo_id, error)
        return None
    if private and not answer["private"]:
        LOGGER.warning("%s exists and is public: what is pushed there can be seen by everyone", answer["repo_id"])
    return answer["repo_id"]


def check(folder: Path) -> list[str]:
    """Return the names of the files in `folder` to publish, sorted; refuse the folder if anything is out of place.

    An allow-list decides: card, config, safetensors, JSON, PNG at the top; JSON, safetensors and tokenizer text in
    the folders that model_index.json names as components; PNG in `samples/`. Every other file is an error (dotfiles,
    links, pickles, checkpoints, logs): nothing is dropped in silence. Then every file (of safetensors: the header) is
    searched for tokens, keys, values of secret-looking environment variables, and paths of this machine.

    Raises PushPending that names each file, and what kind of thing was found, never its value.
    """
    if not folder.is_dir():
        raise PushPending(f"Nothing to push: {folder} is not a folder. Export the model first.")
    index = folder / "model_index.json"
    entries = json.loads(index.read_text()) if index.is_file() else {}
    components = {name for name, value in entries.items() if isinstance(value, list)}
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }
    patterns = _secret_patterns(folder)
    problems = []
    for name, path in paths.items():
        if path.is_symlink() or not path.is_file() or not _publishable(name, components):
            problems.append(f"{name}: not a kind of file that is published")
        else:
            content = _searchable(path)
            problems += [f"{name}: contains {kind}" for kind, pattern in patterns.items() if pattern.search(content)]
    if not 1 <= len(paths) <= MOST_FILES:
        problems.append(f"{len(paths)} files: one commit holds 1 to {MOST_FILES}")
    if problems:
        raise PushPending(_pending(folder, f"nothing was sent, because of {'; '.join(problems)}.", "Once corrected:"))
    return list(paths)


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    message: str = "Upload model",
    budget: float | None = None,
    first_wait: float = 1.0,
) -> str:
    """Make the Hub hold exactly the files of `folder` (RUN_DIR/pipeline), in one atomic commit; return the commit URL.

    Idempotent: if the head of `main` already has the files (an earlier answer was lost, or a second call), there is
    no second commit. Afterwards the remote listing is compared with the local checksums. Other files of the
    repository are left alone and named in a warning.

    budget: seconds after which it gives up, whatever the network does; None: half an hour and a second per megabyte.
    first_wait: seconds before the second try, doubled each time, with jitter; the server's Retry-After is honoured as
    far as the budget goes.
    Raises PushPending (the model stays in `folder`; the message holds the command that finishes the push).
    """
    files = {name: _digests(folder / name) for name in check(folder)}
    megabytes = sum(size for size, _, _ in files.values()) / 1e6
    budget = 1800 + megabytes if budget is None else budget
    LOGGER.info("pushing %d files, %.1f MB, to %s", len(files), megabytes, repo_id)
    request = {"action": "push", "repo_id": repo_id, "private": private, "message": message, "files": files}
    try:
        answer = _ask({**request, "folder": str(folder.resolve())}, budget, first_wait)
    except _Refused as error:
        raise PushPending(_pending(folder, f"{repo_id}: {error}", "Afterwards:", repo_id)) from None
    except _Unreachable as error:
        raise PushPending(_pending(folder, f"{repo_id}: {error}", "Later:", repo_id)) from None
    if answer["others"]:
        LOGGER.warning("%s also holds files that are not part of this model: %s", repo_id, ", ".join(answer["others"]))
    return answer["url"]


def _pending(folder: Path, reason: str, remedy: str, repo_id: str | None = None) -> str:
    words = ["finetune", "push", str(folder.parent), *(["--hub_model_id", repo_id] if repo_id else [])]
    command = shlex.join(words)
    return f"The model is saved in {folder}, but not on the Hub: {reason} {remedy} {command}"


def _publishable(name: str, components: set[str]) -> bool:
    *folders, file = name.split("/")
    if any(part.startswith(".") for part in (*folders, file)):
        return False
    if not folders:
        allowed = ROOT_FILES
    elif folders == ["samples"]:
        allowed = SAMPLE_FILES
    else:
        allowed = COMPONENT_FILES if len(folders) == 1 and folders[0] in components else ()
    return any(fnmatchcase(file, pattern) for pattern in allowed)


def _secret_patterns(folder: Path) -> dict[str, re.Pattern[bytes]]:
    """Kind of finding -> what to search for. No user or host name: as words they occur in honest text too often."""
    values = secret_values()
    if len(token := _token() or "") >= 16:
        values["the token of your login"] = token
    patterns = KEYS | {kind: re.compile(re.escape(os.fsencode(value))) for kind, value in values.items()}
    for kind, path in {"your home directory": Path.home(), "the output directory": folder.resolve().parent}.items():
        # "/root" alone is a word of tokenizers and code; "/root/x" or "/home/me" is a place on this machine.
        end = rb"/" if len(path.parts) == 2 else rb"(?![\w.-])"
        if len(path.parts) > 1:
            patterns[f"the path of {kind}"] = re.compile(rb"(?<![\w.-])" + re.escape(os.fsencode(path)) + end)
    return patterns


def _searchable(path: Path) -> bytes:
    """All bytes of a file; of safetensors the JSON header, as tensors hold no text (format: u64 length, header)."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000))


def _digests(path: Path) -> tuple[int, str, str]:
    """(size, SHA-256, git blob id): what the Hub lists for large (LFS) and for small files."""
    size = path.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return size, sha256.hexdigest(), blob.hexdigest()


def _token() -> str | None:
    from huggingface_hub import get_token  # not at module level: 0.2 s that --help and config errors need not pay

    return get_token()


def _ask(request: dict[str, Any], budget: float, first_wait: float) -> dict[str, Any]:
    """Run `request` in child processes until one succeeds; raise _Refused at once, _Unreachable within `budget` s."""
    deadline = time.monotonic() + budget
    reserve = min(LONGEST_WAIT, budget / 3)
    wait, without_xet = first_wait, False
    while True:
        answer = _attempt(request, deadline - time.monotonic(), without_xet)
        if "fault" not in answer:
            return answer
        trouble = answer["fault"]
        if not trouble["transient"]:
            raise _Refused(trouble["message"])
        left = deadline - time.monotonic()
        if left <= reserve:
            raise _Unreachable(f"{trouble['message']} Gave up after {budget:g} s.")
        pause = max(wait * random.uniform(0.5, 1.5), trouble["retry_after"])
        pause = min(pause, left - reserve)
        LOGGER.warning("the Hub: %s Next try in %.1f s, %.0f s left.", trouble["message"], pause, left)
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT)
        # An outage of the Xet storage takes its client minutes to report; plain LFS uploads need other servers, and
        # less memory, should the process have been killed for that.
        without_xet = without_xet or trouble["xet"]


def _attempt(request: dict[str, Any], seconds: float, without_xet: bool) -> dict[str, Any]:
    """One try in a child process that is killed after `seconds`; its answer, or {"fault": ...}."""
    token = _token()  # read at every try: a login renewed meanwhile counts. The child could not ask a notebook's vault.
    if token is None:
        return fault("no Hugging Face login was found. Run `hf auth login`, or set HF_TOKEN.", transient=False)
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "HF_TOKEN": token, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    if without_xet:
        environment["HF_HUB_DISABLE_XET"] = "1"
    command = [sys.executable, "-m", "finetune.hub_worker"]
    text = json.dumps({**request, "seconds": seconds})
    try:
        child = subprocess.run(
            command, input=text, env=environment, stdout=subprocess.PIPE, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return fault(f"no answer within {seconds:.0f} s.", transient=True)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    killed = child.returncode < 0
    return fault(f"the uploading process ended with code {child.returncode}.", transient=killed, xet=killed)

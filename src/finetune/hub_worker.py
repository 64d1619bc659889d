"""One conversation with the Hugging Face Hub, in a process of its own that `hub` can kill: stdin JSON -> stdout JSON.

The request is {"action": "probe" or "push", "repo_id", "private", "seconds", ...}; the answer is what the action gives,
or {"fault": ...} (see `fault`). The token comes from the environment (HF_TOKEN) and appears in nothing that is written.
"""

import faulthandler
import json
import logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError
from finetune.redaction import without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LONGEST_SILENCE = 120.0
"""Seconds without a byte from the server after which one request counts as lost."""

XET_SILENCE = 300.0
"""The same for the Xet storage, its client's own default: it counts from the start of a request, sending included."""

REMEDY = {
    400: "Correct what the Hub complains about.",
    401: "Log in again with `hf auth login`, or set HF_TOKEN to a valid token with write access.",
    403: "Use a token that may write to this repository (https://huggingface.co/settings/tokens), or another name.",
    404: "Check the spelling of the repository name, and that your token may see it.",
    412: "Somebody else changed the repository at the same moment; look at its latest commit first.",
}


def fault(message: str, *, transient: bool, retry_after: float = 0.0, xet: bool = False) -> dict[str, Any]:
    """The answer of a try that failed: may another succeed (transient), not before when (seconds), was it Xet."""
    return {"fault": {"message": message, "transient": transient, "retry_after": retry_after, "xet": xet}}


def main() -> None:
    """Answer one request from stdin with one line of JSON on stdout."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils._http import default_client_factory

    request = json.load(sys.stdin)
    token = os.environ["HF_TOKEN"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent decides what it means
    # Should the parent be killed, nobody else would end a child that waits for a silent server.
    faulthandler.dump_traceback_later(request["seconds"] + 5, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115

    share = max(1.0, request["seconds"] / 6)  # so that a short budget has room for three lost requests and a good one
    silence = min(LONGEST_SILENCE, share)

    def hurry(sent: Any) -> None:
        timeouts = sent.extensions["timeout"]
        sent.extensions["timeout"] = {name: silence if value is None else value for name, value in timeouts.items()}

    def impatient_client() -> Any:
        client = default_client_factory()
        client.event_hooks["request"].append(hurry)  # not client.timeout: listings are asked for with "no timeout"
        return client

    # Or an outage of Xet, which its client tries six times, would use up the budget before plain uploads take over.
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{1000 * min(XET_SILENCE, share):.0f}ms")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")

    def redacted(record: logging.LogRecord) -> bool:
        record.msg, record.args = _redact(record.getMessage(), token), ()
        return True

    huggingface_hub.set_client_factory(impatient_client)
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(redacted)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        answer = {"probe": _probe, "push": _push}[request["action"]](huggingface_hub.HfApi(token=token), request)
    except Exception as error:  # whatever it is, it must reach the parent, and without the token
        answer = _diagnose(error, token)
    print(json.dumps(answer), flush=True)
    os._exit(0)  # not through the interpreter's end, which would join threads that still wait for a silent server


def _probe(api: "HfApi", request: dict[str, Any]) -> dict[str, Any]:
    """Who am I, does the repository exist, may I write: the full repository id, and whether it is private."""
    user = api.whoami()
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConfigError(f"pushing needs a token that may write, and the role of yours is {role!r}. {REMEDY[403]}")
    name = request["repo_id"]
    repo = api.create_repo(name if "/" in name else f"{user['name']}/{name}", private=request["private"], exist_ok=True)
    api.auth_check(repo.repo_id, write=True)
    return {"repo_id": repo.repo_id, "private": api.model_info(repo.repo_id).private}


def _push(api: "HfApi", request: dict[str, Any]) -> dict[str, Any]:
    """Commit the files unless the head has them. `parent_commit` closes the gap between looking and committing: a
    commit of an earlier try that was still under way then leads to a 412 instead of a second commit."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    files, folder = request["files"], Path(request["folder"])
    repo_id = api.create_repo(request["repo_id"], private=request["private"], exist_ok=True).repo_id
    oid = api.model_info(repo_id).sha
    wrong, others = _compare(api, repo_id, oid, files)
    if wrong:
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
        try:
            oid = api.create_commit(repo_id, operations, commit_message=request["message"], parent_commit=oid).oid
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            oid = api.model_info(repo_id).sha
            if _compare(api, repo_id, oid, files)[0]:
                raise
        wrong, others = _compare(api, repo_id, oid, files)
    if wrong:
        raise ConfigError(f"after the commit {oid} the Hub does not list the bytes that were sent: {', '.join(wrong)}.")
    return {"url": f"{api.endpoint}/{repo_id}/commit/{oid}", "others": others}


def _compare(api: "HfApi", repo_id: str, oid: str | None, files: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(names in `files` that the commit lacks or holds with other bytes, names that only the commit has)."""
    from huggingface_hub import RepoFile

    tree = api.list_repo_tree(repo_id, recursive=True, revision=oid) if oid else ()
    remote = {
        item.path: [item.size, "sha256", item.lfs.sha256] if item.lfs else [item.size, "blob", item.blob_id]
        for item in tree
        if isinstance(item, RepoFile)
    }
    local = {name: ([size, "sha256", sha256], [size, "blob", blob]) for name, (size, sha256, blob) in files.items()}
    wrong = [name for name, either in local.items() if remote.get(name) not in either]
    return wrong, sorted(set(remote) - set(files) - {".gitattributes"})


def _diagnose(error: Exception, token: str) -> dict[str, Any]:
    """Tell a fault that passes (408, 429, 5xx, a broken or silent connection) from one that stays."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    response = next((e.response for e in chain if isinstance(e, HfHubHTTPError)), None)
    words = _redact(" ".join(f"{type(error).__name__}: {error}".split()), token)[:600].rstrip(".") + "."
    if response is not None:
        status, delay = response.status_code, response.headers.get("retry-after", "")
        transient = status in (408, 429) or status >= 500
        words = f"HTTP {status}: {words}" + ("" if transient else f" {REMEDY.get(status, '')}".rstrip())
        return fault(words, transient=transient, retry_after=float(delay) if delay.isdigit() else 0.0)
    # By name, as the HTTP library of the client differs between its versions (httpx, httpx2).
    broken = any(kind.__name__ == "TransportError" for e in chain for kind in type(e).__mro__)
    # A proxy's error page where JSON is expected is an outage too; the Xet client raises the bare ConnectionError.
    broken = broken or any(isinstance(e, ConnectionError | TimeoutError | json.JSONDecodeError) for e in chain)
    # Whatever it was that went wrong there, also an answer that the client of Xet does not understand.
    xet = any(type(e) is ConnectionError for e in chain) or any(
        frame.name == "_upload_xet_files" for frame in traceback.extract_tb(error.__traceback__)
    )
    offline = any(isinstance(e, OfflineModeIsEnabled) for e in chain)
    return fault(words, transient=(broken or xet) and not offline, xet=xet)


def _redact(text: str, token: str) -> str:
    """`text` without tokens and without URL queries, which for storage hosts are signatures."""
    text = without_secrets(text.replace(token, "[token]"))
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)


if __name__ == "__main__":
    main()

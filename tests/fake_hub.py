"""A Hugging Face Hub on loopback: enough of its protocol for the real client to create, push, list and pull a model.

Three servers, as with the real one: the Hub itself, a storage host that takes and gives large files by signed URL, and
the Xet storage, which takes a token of its own; neither of these may ever see the user's. State lives in memory. Faults
are injected by rule (`FakeHub.fail`), every request is recorded. Large files come by Xet, or by plain Git LFS from a
client with HF_HUB_DISABLE_XET=1; downloads are always plain.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub

from xet_server import XetStorage

WRITE_TOKEN = "hf_oauth_" + "writeCanary".ljust(28, "W")
READ_TOKEN = "hf_" + "readCanary".ljust(34, "R")
XET_TOKEN = "xet-canary-of-a-short-life"
SIGNATURE = "X-Amz-Signature=canarysignature"


@dataclass
class Repo:
    """A model repository: each commit is its id and the whole tree, path -> (bytes, is LFS)."""

    private: bool
    commits: list[tuple[str, dict[str, tuple[bytes, bool]]]] = field(default_factory=list)

    def commit(self, tree: dict[str, tuple[bytes, bool]]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits.append((oid, tree))
        return oid

    def tree(self, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Request:
    """One recorded request; host is "hub", "storage" or "xet"."""

    host: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Rule:
    """Do `what` to the next `times` requests of this method whose path matches: answer with a status code, "drop" the
    connection, or stay "silent". after: first do what was asked, so that only the answer is lost."""

    path: str
    method: str
    what: int | str
    times: int
    after: bool
    headers: dict[str, str]


class Reply(Exception):
    """An answer other than 200, raised from wherever it becomes clear."""

    def __init__(self, status: int, message: str = "", **headers: str) -> None:
        self.status, self.body = status, json.dumps({"error": message}).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class FakeHub:
    """Context manager: `with FakeHub() as hub:` serves at `hub.endpoint` until the end of the block."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.chunks = XetStorage()
        self.requests: list[Request] = []
        self.rules: list[Rule] = []
        self.corrupt: str | None = None
        """Path of a file of which the first byte is flipped whenever it is committed."""
        self.closing = threading.Event()
        self.lock = threading.RLock()
        self.servers = {host: self._server(host) for host in ("hub", "storage", "xet")}
        ports = [server.server_address[1] for server in self.servers.values()]
        self.endpoint, self.storage, self.xet = (f"http://127.0.0.1:{port}" for port in ports)

    def _server(self, host: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def __enter__(self) -> "FakeHub":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What leads a process to this Hub with a token that may write, its caches under `home`."""
        known = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": WRITE_TOKEN, "HF_HOME": str(home)}
        return known | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def lead(self, home: Path, set_to: Callable[[Any, str, Any], None]) -> None:
        """Lead this process here as well, which is offline else and read its environment long ago."""
        constants = huggingface_hub.constants
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.endpoint)
        set_to(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        set_to(constants, "ENDPOINT", self.endpoint)
        set_to(constants, "HF_HUB_OFFLINE", False)
        set_to(huggingface_hub.hf_api.api, "endpoint", self.endpoint)
        set_to(constants, "HF_HUB_CACHE", str(home / "hub"))
        set_to(constants, "HF_TOKEN_PATH", str(home / "token"))

    def fail(
        self, path: str, what: int | str, *, method: str = ".*", times: int = 1, after: bool = False, **headers: str
    ) -> None:
        """Add a `Rule`; header names are written with underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.rules.append(Rule(path, method, what, times, after, named))

    def take_rule(self, request: Request) -> Rule | None:
        with self.lock:
            self.requests.append(request)
            for rule in self.rules:
                if rule.times and re.search(rule.path, request.path) and re.fullmatch(rule.method, request.method):
                    rule.times -= 1
                    return rule
        return None

    def add_repo(self, name: str, *, private: bool = True) -> Repo:
        """Create a repository as the real Hub does: with one commit that holds .gitattributes."""
        repo = self.repos[name] = Repo(private)
        repo.commit({".gitattributes": (b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        return repo

    def files(self, name: str) -> dict[str, bytes]:
        """What the head of a repository holds, without .gitattributes."""
        tree = self.repos[name].commits[-1][1]
        return {path: data for path, (data, _) in tree.items() if path != ".gitattributes"}

    def posts(self, part: str) -> int:
        """Number of requests so far that change something and have `part` in their path."""
        return sum(part in request.path and request.method in ("POST", "PUT") for request in self.requests)

    # ------------------------------------------------------------------------------------------------ the protocol

    def answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """Do what a request asks; raise `Reply` for anything but success."""
        url = urlsplit(request.path)
        path = unquote(url.path)
        if request.host == "storage":
            return self._storage(request, path)
        if request.host == "xet":
            return self._xet(request, path)
        header = request.headers.get("authorization", "")
        role = {f"Bearer {WRITE_TOKEN}": "write", f"Bearer {READ_TOKEN}": "read", "": None}.get(header, "unknown")
        if role == "unknown":
            raise Reply(401, "Invalid credentials", X_Error_Message="Invalid credentials in Authorization header")
        for method, pattern, action in ROUTES:
            if (match := re.fullmatch(pattern, path)) and re.fullmatch(method, request.method):
                with self.lock:
                    result = action(self, request, role, **match.groupdict())
                return result if isinstance(result, tuple) else (200, {}, json.dumps(result).encode())
        raise Reply(404, f"no route for {request.method} {path}")

    def visible(self, name: str, role: str | None, *, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and (role is None or not name.startswith("user/"))):
            raise Reply(404 if role else 401, "Repository not found", X_Error_Code="RepoNotFound")
        if write and (role != "write" or not name.startswith("user/")):
            raise Reply(403, "no write access", X_Error_Message="You have read access but not write access")
        return repo

    def whoami(self, request: Request, role: str | None) -> dict:
        if role is None:
            raise Reply(401, "Invalid credentials")
        return {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}

    def create(self, request: Request, role: str | None) -> dict:
        wish = json.loads(request.body)
        name = f"{wish.get('organization') or 'user'}/{wish['name']}"
        if role != "write" or not name.startswith("user/"):
            raise Reply(403, "no write access", X_Error_Message="You don't have the rights to create a model here")
        reply = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repos:
            return 409, {}, json.dumps(reply | {"error": "You already created this model repo"}).encode()
        self.add_repo(name, private=wish.get("visibility") == "private" or wish.get("private", False))
        return reply

    def auth_check(self, request: Request, role: str | None, repo: str, write: str | None) -> dict:
        self.visible(repo, role, write=write is not None)
        return {}

    def validate_yaml(self, request: Request, role: str | None) -> dict:
        if "licence-nobody-knows" in json.loads(request.body)["content"]:
            return 400, {}, json.dumps({"errors": [{"message": '"license" must be one of [...]'}]}).encode()
        return {"errors": [], "warnings": []}

    def model(self, request: Request, role: str | None, repo: str, revision: str | None = None) -> dict:
        state = self.visible(repo, role)
        oid, tree = state.tree(revision or "main") or self._no_revision()
        siblings = [{"rfilename": path} for path in tree]
        return {"id": repo, "modelId": repo, "private": state.private, "sha": oid, "siblings": siblings, "tags": []}

    def _no_revision(self) -> None:
        raise Reply(404, "Invalid rev id", X_Error_Code="RevisionNotFound")

    def preupload(self, request: Request, role: str | None, repo: str, revision: str) -> dict:
        self.visible(repo, role, write=True)
        wanted = json.loads(request.body)["files"]
        return {"files": [{"path": f["path"], "shouldIgnore": False, "uploadMode": _mode(f)} for f in wanted]}

    def xet_token(self, request: Request, role: str | None, repo: str, revision: str) -> tuple:
        self.visible(repo, role, write=True)
        end = int(time.time()) + 900
        reply = {"casUrl": self.xet, "accessToken": XET_TOKEN, "exp": end}
        headers = {"X-Xet-Cas-Url": self.xet, "X-Xet-Access-Token": XET_TOKEN, "X-Xet-Token-Expiration": str(end)}
        return 200, headers, json.dumps(reply).encode()

    def lfs_batch(self, request: Request, role: str | None, repo: str) -> dict:
        self.visible(repo, role, write=True)
        objects = []
        for item in json.loads(request.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.storage}/{item['oid']}?{SIGNATURE}"},
                "verify": {"href": f"{self.endpoint}/{repo}.git/info/lfs/objects/verify"},
            }
            objects.append(item if item["oid"] in self.objects else item | {"actions": actions})
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self, request: Request, role: str | None, repo: str) -> dict:
        wish = json.loads(request.body)
        if len(self.objects.get(wish["oid"], b"")) != wish["size"]:
            raise Reply(404, "object is not there")
        return {}

    def commit(self, request: Request, role: str | None, repo: str, revision: str) -> dict:
        state = self.visible(repo, role, write=True)
        lines = [json.loads(line) for line in request.body.splitlines()]
        head, tree = state.commits[-1]
        if lines[0]["value"].get("parentCommit", head) != head:
            raise Reply(412, "The expected parent commit is not the head of the branch")
        tree = dict(tree)
        for line in lines[1:]:
            value, large = line["value"], line["key"] == "lfsFile"
            if large and value["oid"] not in self.objects:
                raise Reply(400, f"the content of {value['path']} was never sent")
            data = self.objects[value["oid"]] if large else base64.b64decode(value["content"])
            if value["path"] == self.corrupt:
                data = bytes([data[0] ^ 1]) + data[1:]
            tree[value["path"]] = (data, large)
        oid = state.commit(tree)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"}

    def tree(self, request: Request, role: str | None, repo: str, revision: str) -> list[dict]:
        _, tree = self.visible(repo, role).tree(revision) or self._no_revision()
        return [_listed(path, *entry) for path, entry in tree.items()]

    def paths_info(self, request: Request, role: str | None, repo: str, revision: str) -> list[dict]:
        form = parse_qs(request.body.decode())
        wanted = json.loads(request.body)["paths"] if request.body.startswith(b"{") else form["paths"]
        return [entry for entry in self.tree(request, role, repo, revision) if entry["path"] in wanted]

    def resolve(self, request: Request, role: str | None, repo: str, revision: str, path: str) -> tuple:
        oid, tree = self.visible(repo, role).tree(revision) or self._no_revision()
        if path not in tree:
            raise Reply(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        data, large = tree[path]
        listed = _listed(path, data, large)
        if not large:
            return 200, {"X-Repo-Commit": oid, "ETag": f'"{listed["oid"]}"'}, data
        self.objects[sha := listed["lfs"]["oid"]] = data
        headers = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
        return 302, {"X-Repo-Commit": oid, "Location": f"{self.storage}/{sha}?{SIGNATURE}", **headers}, b""

    def _storage(self, request: Request, path: str) -> tuple[int, dict[str, str], bytes]:
        oid = path.strip("/")
        if "authorization" in request.headers or SIGNATURE not in request.path:
            raise Reply(400, "storage takes a signed URL and no token")
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != oid:
                raise Reply(400, "checksum mismatch")
            self.objects[oid] = request.body
            return 200, {"ETag": f'"{oid}"'}, b""
        data = self.objects[oid]
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            return 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]
        return 200, {"ETag": f'"{oid}"'}, data

    def _xet(self, request: Request, path: str) -> tuple[int, dict[str, str], bytes]:
        if request.headers.get("authorization") != f"Bearer {XET_TOKEN}":
            raise Reply(401, "the Xet storage takes the token that the Hub made for it, and no other")
        try:
            with self.lock:
                if request.method == "POST" and (match := re.fullmatch(r"/v1/xorbs/default/(\w+)", path)):
                    self.chunks.add_xorb(match[1], request.body)
                    return 200, {}, b'{"was_inserted": true}'
                if request.method == "POST" and path in ("/v1/shards", "/v2/shards"):
                    self.objects |= self.chunks.add_shard(request.body)
                    return 200, {}, b'{"result": 1}' if path == "/v1/shards" else b'{"type": "result"}\n'
        except (ValueError, IndexError) as error:
            raise Reply(400, str(error)) from None
        raise Reply(404, "not here: neither a chunk that others have, nor grants")


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", FakeHub.whoami),
    ("POST", r"/api/repos/create", FakeHub.create),
    ("POST", r"/api/validate-yaml", FakeHub.validate_yaml),
    ("GET", rf"/api/models/{REPO}/auth-check(?P<write>/write)?", FakeHub.auth_check),
    ("GET", rf"/api/models/{REPO}", FakeHub.model),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", FakeHub.model),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", FakeHub.preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", FakeHub.commit),
    ("GET", rf"/api/models/{REPO}/xet-write-token/{REVISION}", FakeHub.xet_token),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}", FakeHub.tree),
    ("POST", rf"/api/models/{REPO}/paths-info/{REVISION}", FakeHub.paths_info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", FakeHub.lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", FakeHub.lfs_verify),
    ("GET|HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", FakeHub.resolve),
]


def _mode(file: dict) -> str:
    return "lfs" if file["path"].endswith((".safetensors", ".png")) or file["size"] > 10_000_000 else "regular"


def _listed(path: str, data: bytes, large: bool) -> dict:
    """A row of the tree listing; the id of an LFS file is that of its pointer, as in git."""
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    blob = pointer if large else data
    row = {
        "type": "file",
        "path": path,
        "size": len(data),
        "oid": hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest(),
    }
    return row | ({"lfs": {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}} if large else {})


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, applies the fault that is due, writes the answer."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub
    host: str

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.host, self.command, self.path, headers, self._body())
        rule = self.hub.take_rule(request)
        self.close_connection = rule is not None
        try:
            status, extra, body = self.hub.answer(request) if rule is None or rule.after else (200, {}, b"")
        except Reply as reply:
            status, extra, body = reply.status, reply.headers, reply.body
        if rule and rule.what == "silent":
            self.hub.closing.wait()
        if rule and rule.what in ("drop", "silent"):
            return
        if rule:  # HTML, as the proxies in front of the real Hub send it
            status, extra, body = rule.what, rule.headers, b"<html>injected</html>"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Request-Id": "1", **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, *_: object) -> None:
        """Keep quiet; requests are recorded."""

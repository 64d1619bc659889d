"""The Hub: the real client against a loopback server, in fair weather and in foul; nothing lost, doubled or leaked."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fake_hub import READ_TOKEN, SIGNATURE, WRITE_TOKEN, FakeHub
from finetune.errors import ConfigError, PushPending
from finetune.hub import check, probe, push
from xet_server import GROUPED_LZ4, LZ4, NO_COMPRESSION, read_xorb

COMMIT, PUT = "/commit/main", r"^/[0-9a-f]{64}\?"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        further = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms", "HOME": "/home/canary"}
        for name, value in (server.environment(tmp_path / "hf") | further).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def folder(tmp_path):
    """An export as a run leaves it, with a weight file of tensors that no text scan must look at."""
    root = tmp_path / "run" / "pipeline"
    header = json.dumps({"w": {"dtype": "U8", "shape": [4000], "data_offsets": [0, 4000]}}).encode()
    files = {
        "model_index.json": b'{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}',
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\nSee https://example.org/home/canary for more.\n",
        "config.yaml": b"seed: 1\n",
        "run.json": b"{}",
        "samples/step-00000010.png": b"\x89PNG\r\n\x1a\nno real picture",
        "unet/config.json": b'{"in_channels": 3}',
        "unet/diffusion_pytorch_model.safetensors": len(header).to_bytes(8, "little") + header + bytes(range(250)) * 16,
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def publish(folder: Path, *, budget: float = 20.0, repo_id: str = "user/model") -> str:
    return push(folder, repo_id, budget=budget, first_wait=0.05)


# ------------------------------------------------------------------------------------------------------ fair weather


@pytest.mark.parametrize("path", ["xet", "plain"])
def test_push_publishes_exactly_the_folder_privately_and_it_can_be_pulled_back(
    hub, folder, tmp_path, capfd, monkeypatch, path
):
    monkeypatch.setenv("HF_HUB_DISABLE_XET", str(int(path == "plain")))
    assert probe("model") == "user/model"
    url = publish(folder)
    repo = hub.repos["user/model"]
    assert repo.private and len(repo.commits) == 2, "one commit of ours after the one that created the repository"
    assert url == f"{hub.endpoint}/user/model/commit/{repo.commits[-1][0]}"
    assert hub.files("user/model") == contents(folder)

    script = "import huggingface_hub; print(huggingface_hub.snapshot_download('user/model', ignore_patterns='.git*'))"
    pulled = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert contents(Path(pulled)) == contents(folder)

    assert publish(folder) == url and len(repo.commits) == 2, "a second push of the same files changes nothing"
    (folder / "run.json").write_text('{"steps": 2}')
    assert publish(folder) != url and hub.files("user/model") == contents(folder)
    assert bool(hub.posts("/v1/xorbs/")) == (path == "xet") != bool(hub.posts("objects/batch"))
    assert_token_only_in_authorization(hub, capfd)


def assert_token_only_in_authorization(hub, capfd):
    """No token in a request but in the Authorization header to the Hub itself, and none in what is printed."""
    out, err = capfd.readouterr()
    assert WRITE_TOKEN not in out + err and SIGNATURE not in out + err
    assert any("authorization" in r.headers for r in hub.requests)
    for request in hub.requests:
        headers = {n: v for n, v in request.headers.items() if (request.host, n) != ("hub", "authorization")}
        assert WRITE_TOKEN not in f"{request.path} {headers}" and WRITE_TOKEN.encode() not in request.body


def test_the_files_that_xet_packs_in_every_way_arrive_whole(hub, folder, monkeypatch):
    """Random bytes (stored), text (LZ4), float32 of similar size (grouped by byte, then LZ4), in many chunks."""
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    generator = np.random.default_rng(0)
    smooth = generator.standard_normal(100_000).astype(np.float32) * 1e-3
    for name, data in {"a": generator.bytes(300_000), "b": b"abcd1234" * 40_000, "c": smooth.tobytes()}.items():
        (folder / f"{name}.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + data)
    publish(folder)
    assert hub.files("user/model") == contents(folder)
    (xorb,) = [r.body for r in hub.requests if "/v1/xorbs/" in r.path]
    schemes, at = set(), 0
    while at < len(xorb):
        schemes.add(xorb[at + 4])
        at += 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
    assert schemes == {NO_COMPRESSION, LZ4, GROUPED_LZ4}
    with pytest.raises((ValueError, IndexError)):  # negative control
        read_xorb(xorb[:-9])


def test_an_existing_repository_keeps_its_other_files_and_a_warning_names_them(hub, folder, caplog):
    hub.add_repo("user/model", private=False).commit({"old.bin": (b"1", False)})
    assert probe("user/model") == "user/model" and "is public" in caplog.text
    publish(folder)
    assert hub.files("user/model") == contents(folder) | {"old.bin": b"1"} and "old.bin" in caplog.text


def test_public_only_when_asked(hub):
    assert probe("open", private=False) == "user/open" and not hub.repos["user/open"].private


# --------------------------------------------------------------------------------------------------- refused at once


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (None, "model", "hf auth login"),
        ("hf_" + "x" * 34, "model", "hf auth login"),
        (READ_TOKEN, "user/model", "may write.*'read'"),
        (WRITE_TOKEN, "other/model", "another name"),
        (WRITE_TOKEN, "no spaces please", "no spaces please"),
    ],
    ids=["no login", "wrong token", "read token", "foreign namespace", "bad name"],
)
def test_probe_refuses_what_could_never_be_pushed(hub, monkeypatch, token, repo_id, words):
    import huggingface_hub.constants

    hub.add_repo("user/model")
    hub.add_repo("other/model", private=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=words) as caught:
        probe(repo_id)
    assert time.monotonic() - start < 5 and (token or "hf_") not in str(caught.value)


def test_probe_sees_a_token_that_may_read_but_not_write_even_if_its_role_does_not_tell(hub):
    hub.add_repo("user/model")
    hub.fail("auth-check/write", 403)
    with pytest.raises(ConfigError, match="403"):
        probe("user/model")


def test_offline_mode_is_a_contradiction_not_an_outage(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        probe("model")


@pytest.mark.parametrize("status", [403, 412])
def test_a_refused_commit_is_not_tried_again(hub, folder, status):
    hub.fail(COMMIT, status, times=9)
    with pytest.raises(PushPending, match=f"{status}.* finetune push {folder.parent} --hub_model_id \\S+$"):
        publish(folder)
    assert hub.posts(COMMIT) == 1


def test_a_token_that_an_answer_repeats_is_not_printed(hub, folder, capfd):
    hub.fail(COMMIT, 403, X_Error_Message=f"{WRITE_TOKEN} and {READ_TOKEN} may not write")
    with pytest.raises(PushPending, match=r"\[token\] and \[token\] may not write") as caught:
        publish(folder)
    assert WRITE_TOKEN not in str(caught.value) and READ_TOKEN not in str(caught.value)
    assert_token_only_in_authorization(hub, capfd)


def test_an_invalid_card_is_refused_before_any_upload(hub, folder):
    (folder / "README.md").write_text("---\nlicense: licence-nobody-knows\n---\n")
    with pytest.raises(PushPending, match="license.* finetune push"):
        publish(folder)
    assert not any(request.host == "storage" for request in hub.requests)


def test_bytes_that_the_hub_lists_otherwise_than_sent_are_found(hub, folder):
    for hub.corrupt in ("unet/diffusion_pytorch_model.safetensors", "run.json"):
        with pytest.raises(PushPending, match=f"does not list the bytes that were sent: {hub.corrupt}"):
            publish(folder)
    hub.corrupt = None
    publish(folder)
    assert hub.files("user/model") == contents(folder)


# -------------------------------------------------------------------------------------------------------- ridden out


@pytest.mark.parametrize(
    ("path", "what"), [("validate-yaml", 503), (COMMIT, 408), ("/tree/", "drop"), ("/tree/", "silent")]
)
def test_a_passing_fault_is_ridden_out(hub, folder, path, what):
    """The rest of them: tests/test_push_matrix.py."""
    hub.fail(path, what)
    publish(folder, budget=8)
    assert hub.files("user/model") == contents(folder) and len(hub.repos["user/model"].commits) == 2
    assert hub.rules[0].times == 0


def test_everything_fails_once_and_nothing_is_lost_or_printed(hub, folder, capfd, caplog):
    for path in ("repos/create", "preupload", "objects/batch", PUT, COMMIT, "/tree/"):
        hub.fail(path, 503)
    with caplog.at_level(logging.DEBUG):
        publish(folder)
    assert hub.files("user/model") == contents(folder) and len(hub.repos["user/model"].commits) == 2
    assert WRITE_TOKEN not in caplog.text and "503" in caplog.text
    assert_token_only_in_authorization(hub, capfd)


@pytest.mark.parametrize("what", ["drop", 504, "silent", 412])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, folder, what):
    """412: an earlier try reached its end between our look at the head and our commit."""
    hub.fail(COMMIT, what, after=True)
    publish(folder, budget=8)
    assert hub.posts(COMMIT) == 1 and len(hub.repos["user/model"].commits) == 2
    assert hub.files("user/model") == contents(folder)


def test_retry_after_is_waited_for_but_never_beyond_the_budget(hub, folder):
    hub.fail(COMMIT, 429, Retry_After="1")
    start = time.monotonic()
    publish(folder)
    assert time.monotonic() - start > 1
    (folder / "run.json").write_text('{"steps": 3}')
    hub.fail(COMMIT, 429, Retry_After="3600")
    start = time.monotonic()
    publish(folder, budget=6)
    assert 3 < time.monotonic() - start < 7, "one last try, while there is still time for it"


def test_a_request_that_is_never_answered_is_given_up_and_tried_again(hub, folder):
    hub.fail(COMMIT, "silent")
    publish(folder, budget=8)
    assert hub.files("user/model") == contents(folder)


@pytest.mark.parametrize("path", ["/v1/xorbs/", "/shards"])
def test_an_answer_that_the_xet_client_does_not_understand_leads_to_plain_uploads(hub, folder, monkeypatch, path):
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    hub.fail(path, 200, times=99)  # the page of a proxy
    publish(folder)
    assert hub.posts(path) and hub.posts("objects/batch") == 1 and hub.files("user/model") == contents(folder)


def test_a_client_that_the_system_kills_while_it_uploads_by_xet_is_followed_by_one_that_does_not(
    hub, folder, monkeypatch
):
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    hub.fail("/v1/xorbs/", "silent")

    def killer():
        while not hub.posts("/v1/xorbs/"):
            time.sleep(0.02)
        for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
            for child in path.read_text().split():
                if b"finetune.hub_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

    threading.Thread(target=killer, daemon=True).start()
    start = time.monotonic()
    publish(folder)
    assert time.monotonic() - start < 5 and hub.posts("objects/batch") == 1
    assert hub.files("user/model") == contents(folder)


def test_probe_does_not_hold_up_training_for_an_outage(hub, caplog):
    hub.fail("whoami", 503)
    assert probe("model", first_wait=0.05) == "user/model"
    hub.fail("", "silent", times=99)
    start = time.monotonic()
    assert probe("model", budget=2, first_wait=0.05) is None
    assert time.monotonic() - start < 3 and "going on without" in caplog.text


# ----------------------------------------------------------------------------------------------------- out of budget


@pytest.mark.parametrize(("path", "what"), [("", "drop"), ("", "silent")])
def test_an_outage_ends_within_the_budget_and_a_later_push_finishes(hub, folder, path, what):
    hub.fail(path, what, times=10_000)
    start = time.monotonic()
    with pytest.raises(PushPending, match=f"finetune push {folder.parent} --hub_model_id \\S+$") as caught:
        publish(folder, budget=2)
    assert time.monotonic() - start < 3.5 and caught.value.exit_code == 5
    assert what == "silent" or len(hub.rules) == 1
    hub.rules.clear()
    publish(folder)
    assert hub.files("user/model") == contents(folder) and len(hub.repos["user/model"].commits) == 2


# ------------------------------------------------------------------------------------------- what is never published


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.bin", "unet/model.pt", "random_states_0.pkl", "logs/events.out.tfevents.1", ".env", "unet/.x.json",
        "checkpoints/step-00000010/model.safetensors", "checkpoints/state.json", "notes.txt", "samples/prompts.json",
    ],
)  # fmt: skip
def test_a_file_off_the_allow_list_stops_the_push(hub, folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(PushPending, match=f"{name}: not a kind of file that is published"):
        publish(folder)
    assert not hub.requests


def test_links_and_empty_folders_stop_the_push(hub, folder, tmp_path):
    (folder / "linked.json").symlink_to(folder / "run.json")
    with pytest.raises(PushPending, match="linked.json"):
        publish(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PushPending, match="0 files"):
        publish(tmp_path / "empty")
    with pytest.raises(PushPending, match="not a folder"):
        publish(tmp_path / "missing")


PLANTED = {
    "the token of your login": WRITE_TOKEN,
    "a Hugging Face token": "hf_" + "z" * 34,
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "an AWS access key": "AKIA" + "A1" * 8,
    "the value of $WANDB_API_KEY": "canary-canary-canary",
    "the path of your home directory": 'data: "/home/canary"',
    "the path of the output directory": None,
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("where", ["README.md", "unet/diffusion_pytorch_model.safetensors"])
def test_a_secret_stops_the_push_and_is_not_repeated(hub, folder, monkeypatch, capfd, kind, where):
    monkeypatch.setenv("WANDB_API_KEY", "canary-canary-canary")
    secret = PLANTED[kind] or f"output_dir: {folder.parent}\n"
    text = f"an innocent line\n{secret}\n".encode()
    if where.endswith(".safetensors"):
        text = len(text).to_bytes(8, "little") + text + bytes(100)
    (folder / where).write_bytes(text)
    with pytest.raises(PushPending) as caught:
        publish(folder)
    assert f"{where}: contains {kind}" in str(caught.value)
    assert not hub.requests
    out, err = capfd.readouterr()
    if kind not in ("the path of the output directory",):
        assert secret not in out + err + str(caught.value)


@pytest.mark.parametrize(
    ("home", "text"),
    [
        ("/root", '{"/root": 1, "root": 2}'),
        ("/home/canary", "https://example.org/home/canary /home/canary2 /home/canary-bird"),
        ("/", "/usr/bin"),
        ("/home/canary", "hf_transfer hf_xet_high_performance 0123456789abcdef0123456789abcdef01234567"),
    ],
)
def test_honest_text_is_not_taken_for_a_secret(hub, folder, monkeypatch, home, text):
    monkeypatch.setenv("HOME", home)
    (folder / "run.json").write_text(text)
    assert check(folder) == sorted(contents(folder))


def test_tensors_are_not_searched(hub, folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] + b"/home/canary/x".ljust(100))
    check(folder)


def test_the_token_is_in_no_command_line(hub, folder):
    """Look at every process of ours while the Hub keeps the push waiting."""
    hub.fail(COMMIT, "silent")
    script = "import sys; from pathlib import Path; from finetune.hub import push; push(Path(sys.argv[1]), 'model')"
    source = str(Path(__file__).parents[1] / "src")
    child = subprocess.Popen([sys.executable, "-c", script, str(folder)], env={**os.environ, "PYTHONPATH": source})
    try:
        while not hub.posts(COMMIT):
            assert child.poll() is None
            time.sleep(0.05)
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    finally:
        child.kill()
        child.wait()
    assert any(b"finetune.hub_worker" in line for line in lines)
    assert not any(WRITE_TOKEN.encode() in line for line in lines)

"""What is published of a run: enough to repeat it, and nothing of the machine or its user."""

import dataclasses
import getpass
import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from finetune.config import TrainConfig
from finetune.config_io import dump, load_text
from finetune.provenance import is_local, public_name, published_config, published_run, redact, run_facts

torch.set_num_threads(1)
TOKEN = "hf_" + "CANARY" * 6


def make(**sections) -> TrainConfig:
    return TypeAdapter(TrainConfig).validate_python({"output_dir": "runs/x", "data": {"resolution": 16}} | sections)


def local(root: Path) -> TrainConfig:
    """Every setting that can hold a local path holds one below `root`."""
    return make(
        output_dir=str(root / "runs" / "mine"),
        resume_from_checkpoint=str(root / "old" / "step-00000001"),
        data={"train_data_dir": str(root / "my photos"), "resolution": 16},
        space={"kind": "latent", "vae": str(root / "vae")},
        conditioning={"kind": "text", "text_encoder": str(root / "encoder"), "tokenizer": str(root / "words")},
        model={"kind": "pretrained", "pretrained_model_name_or_path": str(root / "base")},
        sample={"prompts": ["a cat"]},
    )


def test_facts_are_json_and_name_nobody(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/tools/bin/train_unet.py", "--config", f"{os.getcwd()}/a b.yaml", TOKEN])
    facts = run_facts(make())
    text = json.dumps(facts)
    assert facts["command"] == "train_unet.py --config './a b.yaml' [token]"
    assert set(facts) == {"finetune", "command", "versions", "environment", "commits", "config"}
    assert facts["versions"]["torch"] == torch.__version__ and facts["environment"]["num_processes"] == 1
    assert facts["config"] == dataclasses.asdict(make())
    assert not [secret for secret in (TOKEN, os.getcwd(), str(Path.home()) + "/") if secret in text]
    for name in (getpass.getuser(), socket.gethostname()):
        assert len(name) <= 3 or not re.search(rf"\b{re.escape(name)}\b", text)


def test_redact(monkeypatch, tmp_path):
    home, here = tmp_path / "home" / "alice", tmp_path / "home" / "alice" / "project"
    here.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    assert redact(f"x {here}/a.png {home}/b {home}s/c") == f"x ./a.png ~/b {home}s/c"
    assert redact(f"key={TOKEN}, a-token-of-another-form!") == "key=[token], [token]!"
    assert redact("hf_hub and half_life stay") == "hf_hub and half_life stay"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("owner/name", "owner/name"),
        ("name", "name"),
        ("/data/alice/vae", "vae"),
        ("/data/alice/vae/", "vae"),
        ("../up/vae", "vae"),
        ("~/models/vae", "vae"),
        ("C:\\Users\\alice\\vae", "vae"),
        ("/cache/hub/models--owner--name/snapshots/0123abc/vae", "owner/name"),
        ("deep/er/path", "path"),
    ],
)
def test_public_name(name, shown):
    assert public_name(name) == shown


def test_a_path_that_exists_is_local_even_if_it_looks_like_an_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_local("owner/name")
    monkeypatch.chdir(tmp_path)
    assert is_local("owner/name") and public_name("owner/name") == "name"


def test_published_config_shows_no_path_and_loads_again(tmp_path):
    root = tmp_path / "secret place"
    public = published_config(local(root))
    assert public.data.train_data_dir == "my photos" and public.output_dir == "mine"
    assert (public.space.vae, public.conditioning.tokenizer) == ("vae", "words")
    assert "secret place" in dump(local(root)) and "secret place" not in dump(public)  # the first: negative control
    assert load_text(dump(public)) == public


def test_published_config_of_hub_ids_is_the_config():
    data = {"dataset_name": "owner/data", "resolution": 16}
    cfg = make(output_dir="x", data=data, space={"kind": "latent", "vae": "owner/vae"})
    assert published_config(cfg) == cfg


def test_published_run(tmp_path):
    root = tmp_path / "secret place"
    cfg = local(root)
    run = {
        "command": f"train_unet.py --config {tmp_path}/a.yaml --vae {root}/vae --rate 1/2 --site https://a.b/c/d",
        "data": {"source": str(root / "my photos"), "classes": {"km/h": 3, "yes/no/maybe": 1}, "rows": 4},
        "config": dataclasses.asdict(cfg),
        "note": f"{TOKEN} C:\\Users\\alice\\x.txt",
    }
    public = published_run(run, cfg)
    assert public["command"] == "train_unet.py --config a.yaml --vae vae --rate 1/2 --site https://a.b/c/d"
    assert public["data"] == {"source": "my photos", "classes": {"km/h": 3, "yes/no/maybe": 1}, "rows": 4}
    assert public["note"] == "[token] x.txt"
    assert "secret place" not in json.dumps(public) and str(tmp_path) not in json.dumps(public)
    assert published_run(public, cfg) == public


def test_the_output_dir_dot_changes_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert published_run({"note": "v1.0 ./a"}, make(output_dir="."))["note"] == "v1.0 ./a"

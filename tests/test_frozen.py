"""Frozen models on the disk: one name for one content, wherever it lies; hollow until they compute."""

import hashlib
import os
import shutil

import datasets
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from finetune.errors import ConfigError
from finetune.frozen import Frozen
from tiny_models import parts  # noqa: F401  (a fixture)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "home")


def vae(name, **place) -> Frozen:
    return Frozen(cls=AutoencoderKL, name=str(name), setting="space.vae", **place)


def test_a_copy_is_the_same_model_and_other_weights_are_another(parts, tmp_path):  # noqa: F811
    here = vae(parts / "vae").identity()
    shutil.copytree(parts / "vae", tmp_path / "pipeline" / "vae")
    assert vae(tmp_path / "pipeline", subfolder="vae").identity() == here
    file = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    (file.parent / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not what is loaded")
    assert vae(file.parent).identity() == here
    weights = load_file(file)
    weights["quant_conv.bias"][0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert vae(file.parent).identity() != here
    shutil.copy(parts / "vae" / file.name, file)
    config = file.parent / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.7', '"scaling_factor": 0.8'))
    assert vae(file.parent).identity() != here


def test_of_the_hub_it_is_that_of_its_files(parts, tmp_path, monkeypatch):  # noqa: F811
    """As the Hub's cache keeps them: names in a snapshot that lead to files named by their content."""
    cache = tmp_path / "hub"
    snapshot, blobs = (cache / "models--some--model" / name for name in (f"snapshots/{COMMIT}/vae", "blobs"))
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in (parts / "vae").iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    of_hub = vae("some/model", revision=COMMIT, subfolder="vae")
    assert of_hub.identity() == vae(parts / "vae").identity()
    assert of_hub.hollow().config.scaling_factor == 0.7
    with pytest.raises(ConfigError, match=r"space.vae: (no AutoencoderKL|other/model cannot be loaded)"):
        vae("other/model", revision=COMMIT).identity()


def test_weights_are_read_through_once_and_again_when_they_changed(parts, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(parts / "vae", tmp_path / "vae")
    first, digest, read = vae(tmp_path / "vae").identity(), hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, how: read.append(stream.name) or digest(stream, how))
    assert vae(tmp_path / "vae").identity() == first and not read
    os.utime(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", (1, 1))
    assert vae(tmp_path / "vae").identity() == first and len(read) == 1


@pytest.mark.parametrize("kind", ["vae", "text_encoder"])
def test_hollow_until_filled_then_as_loaded(parts, kind, caplog):  # noqa: F811
    cls = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}[kind]
    frozen = Frozen(cls=cls, name=str(parts / kind), setting="here")
    before = torch.get_rng_state()
    hollow = frozen.hollow()
    assert torch.equal(before, torch.get_rng_state()), "no draw of anybody's is touched"
    assert all(p.is_meta for p in hollow.parameters()) and not hollow.training
    caplog.set_level("INFO")
    frozen.fill(hollow, why="for this test")
    assert "is loaded (for this test)" in caplog.text
    real = frozen.load()
    assert not any(p.requires_grad for p in hollow.parameters())
    inputs = torch.randn(1, 3, 16, 16) if kind == "vae" else torch.tensor([[52, 3, 5, 53]])
    with torch.no_grad():
        out, expected = (m.encode(inputs)[0].mean if kind == "vae" else m(inputs)[0] for m in (hollow, real))
    assert torch.equal(out, expected)
    caplog.clear()
    frozen.put_aside(hollow)
    frozen.fill(hollow, why="again")
    assert not caplog.text, "what was put aside is not read again"


def test_a_folder_without_the_model_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"space.vae: no AutoencoderKL \(config.json\)"):
        vae(tmp_path).identity()

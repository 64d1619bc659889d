"""What makes two starts the same run."""

from types import SimpleNamespace

import pytest

import tiny
from finetune import checkpoint
from finetune.errors import CheckpointError
from finetune.identity import checkpoint_to_resume, identity


def test_a_checkpoint_from_before_a_setting_existed_was_trained_with_its_default(tmp_path, monkeypatch):
    cfg = tiny.config(tmp_path / "run")
    now = identity(cfg, global_batch=8, fingerprint="f")
    new = {"conditioning.null", "conditioning.trainable"}
    old = {name: value for name, value in now.items() if name not in new}
    found = SimpleNamespace(state={"identity": old}, step=2, path="step-2")
    monkeypatch.setattr(checkpoint, "latest", lambda root: found)
    assert new <= now.keys() and checkpoint_to_resume(cfg, now=now, steps=9) is found
    zero = tiny.config(tmp_path / "run", conditioning={"null": "zero"})
    with pytest.raises(CheckpointError, match="conditioning.null: None -> zero"):
        checkpoint_to_resume(zero, now=identity(zero, global_batch=8, fingerprint="f"), steps=9)
    other = old | {"model.layers_per_block": 7}
    monkeypatch.setattr(checkpoint, "latest", lambda root: SimpleNamespace(state={"identity": other}, step=2, path="s"))
    with pytest.raises(CheckpointError, match="model.layers_per_block: 7 -> 1"):
        checkpoint_to_resume(cfg, now=now, steps=9)

"""What stays of the checkpoints, and that the newest whole one always does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import forked
import tiny
from finetune import checkpoint, retention
from finetune.config import Checkpoint
from finetune.errors import ConfigError
from finetune.saving import Saver
from test_checkpoint import parts_of

KEEP_2 = Checkpoint(checkpointing_steps=1)


def saved(tmp_path, cfg, losses):
    """Save at steps 1, 2, ... with the loss that was logged at each; returns the steps that stay."""
    saver = Saver(tmp_path, cfg)
    for step, loss in enumerate(losses, 1):
        saver.note({"loss": loss, "note": "text"})
        saver.save(parts_of(float(step)), {"step": step}, required=True)
    return steps(tmp_path)


def steps(tmp_path):
    return [checkpoint.step_of(path) for path in checkpoint.folders(tmp_path / "checkpoints")]


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({}, [9, 10]),
        ({"checkpoints_total_limit": 4}, [7, 8, 9, 10]),
        ({"milestone_steps": 3}, [3, 6, 9, 10]),
        ({"best_metric": "loss"}, [4, 9, 10]),
        ({"best_metric": "loss", "milestone_steps": 5}, [4, 5, 9, 10]),
    ],
    ids=str,
)
def test_newest_milestones_and_best_stay(tmp_path, settings, stay):
    nan, inf = float("nan"), float("inf")
    assert saved(tmp_path, replace(KEEP_2, **settings), [nan, 5, 4, 1, 1, 3, 2, 7, 6, -inf]) == stay
    root = tmp_path / "checkpoints"
    if "best_metric" in settings:
        assert retention.best(root, "loss").name == "step-00000004", "the first of equals"
        assert checkpoint.load(root / "step-00000004").state["best_metric"] == {"loss": 1}
    assert retention.best(root, "accuracy") is None


def test_a_metric_that_is_not_there_is_refused_when_the_first_line_is_logged(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint.best_metric: 'los' is no number .*; choose from loss"):
        saved(tmp_path, replace(KEEP_2, best_metric="los"), [3, 2, 1])
    cfg = tiny.config(tmp_path / "run", checkpoint={"checkpointing_steps": 1, "best_metric": "lss"})
    assert forked.run(cfg) == [2] and "choose from epoch, samples_seen, loss, " in forked.log(cfg)


def test_the_best_is_known_to_a_resume_that_has_logged_nothing_yet(tmp_path):
    checkpointing = {"checkpointing_steps": 1, "checkpoints_total_limit": 9, "best_metric": "loss"}
    straight, stopped = (
        tiny.config(tmp_path / name, checkpoint=checkpointing, tracking={"log_every": 4}) for name in ("one", "two")
    )
    assert forked.run(straight) == [0], forked.log(straight)
    there, here = (Path(cfg.output_dir) / "checkpoints" for cfg in (straight, stopped))
    shutil.copytree(there / "step-00000004", here / "step-00000004")  # the last at which a line was logged
    assert forked.run(stopped) == [0], forked.log(stopped)

    def kept(root, step):
        return checkpoint.load(root / f"step-{step:08d}").state["best_metric"]

    assert kept(there, 3) == {}
    assert kept(here, 5) == kept(there, 5) == kept(there, 4) != kept(there, 8)
    assert kept(here, 8) == kept(there, 8)


def test_what_cannot_be_judged_is_left_alone(tmp_path):
    """Damage in an older checkpoint, or one of another version, does not end a run whose newest is whole."""
    assert saved(tmp_path, replace(KEEP_2, checkpoints_total_limit=4), [4, 3, 2, 1]) == [1, 2, 3, 4]
    older = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    older.write_bytes(b"\xff" + older.read_bytes()[1:])
    manifest = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    body = json.loads(manifest.read_text()) | {"format": 1}
    del body["checksum"]
    manifest.write_text(json.dumps({**body, "checksum": checkpoint._checksum(body)}))
    retention.tidy(tmp_path / "checkpoints", KEEP_2)
    assert steps(tmp_path) == [1, 3, 4]
    assert retention.best(tmp_path / "checkpoints", "loss") is None


def test_milestones_are_steps_that_are_saved():
    with pytest.raises(ValueError, match="250 is no multiple of checkpointing_steps 100, hence never saved: use such"):
        Checkpoint(checkpointing_steps=100, milestone_steps=250)


def test_broken_ones_do_not_count_and_the_newest_whole_one_stays(tmp_path):
    assert saved(tmp_path, replace(KEEP_2, checkpoints_total_limit=5), [1, 2, 3, 4, 5]) == [1, 2, 3, 4, 5]
    root = tmp_path / "checkpoints"
    for step in (2, 4, 5):
        (root / f"step-{step:08d}" / "manifest.json").unlink()
    retention.tidy(root, KEEP_2)
    assert steps(tmp_path) == [1, 3, 4, 5], "what is newer than the newest whole one is not for tidy to judge"
    assert checkpoint.latest(root).step == 3
    (root / "step-00000003" / "manifest.json").unlink()
    (root / "step-00000001" / "manifest.json").unlink()
    retention.tidy(root, KEEP_2)
    assert steps(tmp_path) == [1, 3], "without a whole one nothing goes"


def test_leftovers_are_swept_and_strangers_are_not(tmp_path):
    assert saved(tmp_path, KEEP_2, [1]) == [1]
    root = tmp_path / "checkpoints"
    ours = (".tmp-step-00000010-host-1-abcd", ".tmp-step-00000010-1", "step-00000001.trash")
    for name in (*ours, "step-00000009.corrupt"):
        (root / name).mkdir()
        (root / name / "model.safetensors").touch()
    (root / "mine").mkdir()
    Saver(tmp_path, KEEP_2).tidy()
    assert sorted(p.name for p in root.iterdir()) == ["mine", "step-00000001", "step-00000009.corrupt"]


def test_a_deletion_that_fails_is_a_warning_and_done_later(tmp_path, monkeypatch, caplog):
    def busy(path, *_, **__):
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        assert saved(tmp_path, KEEP_2, [1, 2, 3]) == [2, 3]
    assert "step-00000001.trash could not be deleted" in caplog.text and "busy" in caplog.text
    Saver(tmp_path, KEEP_2).tidy()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_the_disk_holds_three_checkpoints_at_most(tmp_path, monkeypatch):
    """50 saves, measured at each write and each deletion."""
    root, peak = tmp_path / "checkpoints", 0
    real_write, real_rename = checkpoint.write, checkpoint.Path.rename

    def size():
        return sum(file.stat().st_size for file in root.rglob("*") if file.is_file())

    def measured(real):
        def call(*args):
            nonlocal peak
            result = real(*args)
            peak = max(peak, size())
            return result

        return call

    monkeypatch.setattr(checkpoint, "write", measured(real_write))
    monkeypatch.setattr(checkpoint.Path, "rename", measured(real_rename))
    saver, one = Saver(tmp_path, KEEP_2), None
    for step in range(1, 51):
        saver.save(parts_of(float(step)), {"step": step}, required=False)
        one = one or size()
        assert size() <= 2.05 * one
    assert 2.9 * one < peak <= 3.2 * one

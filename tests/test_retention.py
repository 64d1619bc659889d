"""What stays of the checkpoints, and that the newest whole one always does."""

import json
import shutil
from dataclasses import replace

import pytest

from finetune import checkpoint, retention
from finetune.config import Checkpoint
from finetune.saving import Saver
from test_checkpoint import parts_of

KEEP_2 = Checkpoint(checkpointing_steps=1)


def saved(tmp_path, cfg, losses):
    """Save at steps 1, 2, ... with the loss of metrics.jsonl at each; returns the steps that stay."""
    saver = Saver(tmp_path, cfg)
    for step, loss in enumerate(losses, 1):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss, "note": "text"}) + "\n")
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


def test_a_metric_that_is_not_there_is_said(tmp_path, caplog):
    assert saved(tmp_path, replace(KEEP_2, best_metric="los"), [3, 2, 1]) == [2, 3]
    assert "checkpoint.best_metric los: the last line of metrics.jsonl has only step, loss" in caplog.text


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

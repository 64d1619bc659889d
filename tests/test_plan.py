"""The first screen says what the run will do, in numbers that the run then keeps."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from finetune.meter import Meter
from finetune.plan import (
    averages_line,
    changed_line,
    checkpoints_line,
    classes_line,
    count,
    data_line,
    memory_line,
    plan_text,
    push_line,
    snapshots_line,
    start_line,
    table,
)
from finetune.resume import Resumed
from finetune.trainer import Trainer
from tiny import config

torch.set_num_threads(1)
FACTS = {
    "rows": 1200, "left_out": 3, "upscaled": 7,
    "width": {"min": 30, "median": 64, "max": 640}, "height": {"min": 20, "median": 64, "max": 480},
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    return Trainer(config(tmp_path_factory.mktemp("plan") / "run"))


def test_plan_of_a_small_run(trainer):
    text = plan_text(trainer)
    rows = dict(re.fullmatch(r"  (\w+) +(.*)", line).groups() for line in text.splitlines())
    assert len(text.splitlines()) <= 20 and max(map(len, text.splitlines())) <= 160
    assert "20 images" in rows["data"] and rows["classes"].startswith("10: ")
    assert rows["space"] == "pixel, x0 3x8x8" and rows["conditioning"].startswith("class_label, dropped for 0.1")
    assert rows["batch"].startswith("8 images = 8 per micro-step x 1 accumulated x 1 process")
    assert rows["steps"] == "9 of the optimizer = 72 images = 3.6 epochs"
    assert rows["start"] == "at step 0" and rows["push"] == "no"
    assert "decay 0.9, 0.5" in rows["averages"] and rows["device"].startswith("1 x ")
    columns = {len(re.match(r"  \w+ +", line)[0]) for line in text.splitlines()}
    assert len(columns) == 1, "values are aligned"


def test_a_resumed_run_says_so(trainer):
    found = SimpleNamespace(step=4000)
    assert start_line(Resumed(found, [], "bit for bit")) == "resumes at step 4,000, bit for bit"
    changed = ["  sample.num_images: 2 -> 3", "  tracking.log_every: 1 -> 5"]
    line = changed_line(Resumed(found, changed, "bit for bit"))
    assert line == "sample.num_images: 2 -> 3, tracking.log_every: 1 -> 5"
    assert changed_line(None) == "" and "changed" not in plan_text(trainer)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_projected_memory_is_what_is_held(tmp_path, kind):
    trainer = Trainer(config(tmp_path / "run", optimizer={"kind": kind}))
    meter = Meter(trainer.accelerator, trainer.modules.objective)
    trainer.optimizer.zero_grad = lambda: None
    trainer.train_step(iter(trainer.loader()), meter)
    state = [each for values in trainer.optimizer.state.values() for each in values.values() if torch.is_tensor(each)]
    averages = [tensor for average in trainer.ema.averages.values() for tensor in average.values()]
    weights = list(trainer.parameters.values())
    held = {"weights": weights, "gradients": [p.grad for p in weights], "optimizer": state, "averages": averages}
    line = memory_line(trainer.modules, trainer.cfg)
    for name, tensors in held.items():
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9
        assert float(re.search(rf"{name} ([\d.e-]+)", line)[1]) == pytest.approx(size, rel=0.02), name
    half = memory_line(trainer.modules, trainer.cfg, sharded_over=2)
    assert float(half.split()[0]) == pytest.approx(float(line.split()[0]) / 2, rel=0.02)
    guide = torch.nn.Linear(1000, 1000)  # frozen models lie whole on each device
    whole = memory_line(dataclasses.replace(trainer.modules, guide=guide), trainer.cfg, sharded_over=2)
    added = sum(p.numel() * p.element_size() for p in guide.parameters()) / 1e9
    assert float(whole.split()[0]) == pytest.approx(float(half.split()[0]) + added, rel=0.02)


def test_projected_size_is_the_size_that_is_written(trainer):
    # AdamW has no state before its first step.
    trainer.train_step(iter(trainer.loader()), Meter(trainer.accelerator, trainer.modules.objective))
    trainer.save(required=True)
    [folder] = (trainer.output_dir / "checkpoints").glob("step-*")
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    projected = float(re.search(r"2 x ([\d.,]+) MB", checkpoints_line(trainer.modules, trainer.cfg))[1])
    assert projected == pytest.approx(written, rel=0.15)  # headers are a tenth of files this small


def test_averages_by_relative_width_and_their_snapshots(trainer, tmp_path):
    assert snapshots_line(trainer.modules, trainer.cfg, 9) == ""
    ema = {"ema_max_decay": [], "relative_widths": [0.05, 0.1], "snapshot_every": 4}
    cfg = config(tmp_path, ema=ema)
    assert averages_line(cfg) == "relative width 0.05, 0.1; samples and export use the first"
    both = config(tmp_path, ema={**ema, "ema_max_decay": [0.9]})
    assert averages_line(both).startswith("decay 0.9 (power warm-up), relative width 0.05")
    size = 2 * 4 * sum(p.numel() for p in trainer.modules.unet.parameters()) / 1e6
    expected = f"of the averages every 4 steps, all kept: 3 x {size:.1f} MB"
    assert snapshots_line(trainer.modules, cfg, 9) == expected


def test_data_and_classes(tmp_path):
    cfg = config(tmp_path, data={"dataset_name": "photos"})
    assert data_line(FACTS, cfg) == "photos: 1,200 images, 3 left out, 30x20 to 640x480 -> 8x8, 7 upscaled"
    captions = {"captions": {"count": 1300, "empty": 2}}
    assert data_line(FACTS | captions, cfg).endswith("1,300 captions (2 empty)")
    assert classes_line(FACTS) == ""
    assert classes_line({"classes": {f"c{i}": i for i in range(9)}}, most=2) == "9: c0 (0), c1 (1), ..."


def test_words():
    assert [count(n) for n in (0, 41_000, 859_520_964, 2_567_463_684)] == ["0", "41 k", "860 M", "2.57 G"]


def test_table_shows_no_control_characters_and_no_empty_rows():
    assert table({"a": "1", "long": "2\x1b[31m\n3", "none": ""}) == "  a     1\n  long  2 [31m 3"


def test_push(tmp_path):
    assert push_line(config(tmp_path, hub={"push": True}), "digits") == "digits (private) when training is done"
    public = config(tmp_path, hub={"push": True, "hub_model_id": "me/x", "private": False})
    assert push_line(public, "digits").startswith("me/x (public)")

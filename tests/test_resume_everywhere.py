"""A run of three epochs resumed after every one of its steps ends with the same bits; a broken resume never does."""

import json
import shutil
from pathlib import Path

import pytest

from finetune import order, seeding, training_state
from finetune.ema import Ema
from finetune.trainer import Trainer
from forked import log, metrics, run, state
from tiny import config

STEPS = 9  # of 8 images, over 20 rows: epochs end after 2.5, 5 and 7.5 steps
EVERY_STEP = {"checkpointing_steps": 1, "checkpoints_total_limit": 100}


def small(output_dir, *, accumulation=2, workers=0):
    train = {"max_train_steps": STEPS, "global_batch_size": 8, "gradient_accumulation_steps": accumulation}
    return config(output_dir, train=train, data={"dataloader_num_workers": workers}, checkpoint=EVERY_STEP)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that was never stopped, with a checkpoint of each of its steps."""
    cfg = small(tmp_path_factory.mktemp("straight") / "run")
    assert run(cfg) == [0], log(cfg)
    return cfg


def stopped_at(step, straight, cfg):
    """Make the folder of `cfg` that of the straight run, as a kill right after the checkpoint of `step` leaves it."""
    there, here = Path(straight.output_dir), Path(cfg.output_dir)
    name = f"step-{step:08d}"
    shutil.copytree(there / "checkpoints" / name, here / "checkpoints" / name)
    shutil.copy(there / "metrics.jsonl", here)  # with the lines of steps that are done again
    return cfg


def numbers(cfg):
    return [(line["step"], line["loss"], line["lr"], line["samples_seen"]) for line in metrics(cfg)]


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resumed_after_any_step(tmp_path, straight, step):
    """With other numbers of loader processes than before: 0 -> 0, 1, 2, 4 in turn."""
    workers = {3: 1, 5: 2, 7: 4}.get(step, 0)
    cfg = stopped_at(step, straight, small(tmp_path / "run", workers=workers))
    assert run(cfg) == [0], log(cfg)
    assert state(cfg, STEPS) == state(straight, STEPS)
    assert numbers(cfg) == numbers(straight)


def test_no_checkpoint_is_inside_an_accumulation_window(straight):
    for folder in (Path(straight.output_dir) / "checkpoints").glob("step-*"):
        kept = json.loads((folder / "state.json").read_text())
        assert kept["samples_seen"] == 8 * kept["step"]


def broken(piece):
    """A body that resumes with one piece of the state or of the randomness not as it should be."""

    def body(cfg):
        if piece == "order":
            permutation = order.permutation
            order.permutation = lambda seed, *what: permutation(seed + 1, *what)
        if piece == "noise":
            key = seeding.key
            seeding.key = lambda seed, purpose, *what: key(seed, purpose + "!" * (purpose == "noise"), *what)
        if piece == "optimizer":
            training_state.load_optimizer = lambda *_: None
        if piece == "averages":
            Ema.load = lambda *_: None
        trainer = Trainer(cfg)
        if piece == "learning rate":
            schedule = trainer.learning_rate
            trainer.learning_rate = lambda step: schedule(step + 1)
        trainer.fit()

    return body


@pytest.mark.parametrize("piece", ["order", "noise", "optimizer", "averages", "learning rate", "nothing"])
def test_negative_control_a_broken_resume_is_seen(tmp_path, straight, piece):
    cfg = stopped_at(4, straight, small(tmp_path / "run"))
    assert run(cfg, body=broken(piece)) == [0], log(cfg)
    assert (state(cfg, STEPS) == state(straight, STEPS)) == (piece == "nothing")

"""Real training in buckets: the same on any number of processes, exact when resumed, and as the plan said."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import buckets
from finetune.checkpoint import latest
from finetune.trainer import Trainer
from forked import log, metrics, run, state, whole
from tiny import config as tiny_config
from tiny_models import CONDITION, make_parts

STEPS, ROWS = 8, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of many proportions, of noise; and in parts/ a VAE of factor 4."""
    path = tmp_path_factory.mktemp("buckets")
    (path / "data").mkdir()
    make_parts(path / "parts")
    draw = np.random.RandomState(3)
    for number in range(ROWS):
        height, width = draw.randint(14, 40, 2)
        Image.fromarray(draw.randint(0, 256, (height, width, 3), np.uint8)).save(path / "data" / f"{number:02}.png")
    return path


def config(output_dir, folder: Path, *, latent=False, data=None, train=None, **sections):
    """A run with micro-conditioning on the sizes. Pixels: sides of 8 to 32 in steps of 2; latents: 32 to 128 of 16."""
    rules = {"dataset_name": None, "train_data_dir": str(folder / "data"), "max_train_samples": None, "buckets": "auto"}
    space = {"kind": "latent", "vae": str(folder / "parts" / "vae")} if latent else {"kind": "pixel"}
    return tiny_config(
        output_dir,
        data=rules | {"resolution": 64 if latent else 16, "bucket_step": 16 if latent else 2} | (data or {}),
        train={"max_train_steps": STEPS, "gradient_accumulation_steps": 2} | (train or {}),
        model={**CONDITION, "dropout": 0.0},
        space=space,
        conditioning={"kind": "several", "size": {"condition_dropout": 0.1}},
        checkpoint={"checkpointing_steps": 1, "checkpoints_total_limit": 100},
        **sections,
    )


def losses(cfg) -> list[float]:
    found = {line["step"]: line["loss"] for line in metrics(cfg)}  # steps that are done again are logged again
    return [found[step] for step in sorted(found)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, folder):
    """The run of one process that was never stopped, exported."""
    cfg = config(tmp_path_factory.mktemp("straight") / "run", folder)
    assert run(cfg, body=whole) == [0], log(cfg)
    return cfg


def test_the_run_says_what_it_does(straight):
    facts = json.loads((Path(straight.output_dir) / "run.json").read_text())["data"]
    found = facts["buckets"]
    assert sum(found["images"].values()) == facts["rows"] == ROWS and found["step"] == 2 and len(found["images"]) > 5
    assert 0 < found["cropped"]["mean"] < found["cropped"]["max"] and facts["upscaled"] == found["upscaled"]
    text = log(straight)
    (line,) = [line for line in text.splitlines() if line.startswith("  buckets ")]
    assert f" {len(found['images'])} from " in line and "less than a batch" in line and len(line) <= 160
    assert all(np.isfinite(losses(straight))) and len(losses(straight)) == STEPS
    card = (Path(straight.output_dir) / "pipeline" / "README.md").read_text()
    assert f"{len(found['images'])} shapes of about 16×16" in card


def test_two_processes_do_the_same_steps(tmp_path, folder, straight):
    cfg = config(tmp_path / "run", folder)
    assert run(cfg, processes=2) == [0, 0], log(cfg)
    assert losses(cfg) == pytest.approx(losses(straight), rel=1e-5)


def test_killed_and_resumed_bit_for_bit(tmp_path, folder, straight):
    cfg = config(tmp_path / "run", folder)
    assert run(cfg, stop=(3, signal.SIGKILL)) == [-9]
    assert run(cfg) == [0], log(cfg)
    assert state(cfg, STEPS) == state(straight, STEPS) and losses(cfg) == losses(straight)


@pytest.mark.parametrize("piece", ["nothing", "order"])
def test_resumed_by_two_processes(tmp_path, folder, straight, piece):
    cfg = config(tmp_path / "run", folder)
    there, name = Path(straight.output_dir) / "checkpoints", f"step-{5:08d}"
    shutil.copytree(there / name, Path(cfg.output_dir) / "checkpoints" / name)

    def body(cfg):
        if piece == "order":
            permutation = buckets.permutation
            buckets.permutation = lambda seed, *what: permutation(seed + 1, *what)
        Trainer(cfg).fit()

    assert run(cfg, processes=2, body=body) == [0, 0], log(cfg)
    assert (losses(cfg) == pytest.approx(losses(straight)[5:], rel=1e-5)) == (piece == "nothing")


def test_a_row_that_turns_unusable_leaves_the_others_in_their_steps(tmp_path, folder):
    """The sizes of then are in the checkpoint, so that no row moves to another bucket, and no bucket away."""
    shutil.copytree(folder / "data", tmp_path / "data")
    cfg = config(tmp_path / "run", tmp_path, data={"on_error": "skip"}, train={"max_train_steps": 3})
    assert run(cfg) == [0], log(cfg)
    before = [place for places in _rows(cfg, steps=6) for place in places]
    (tmp_path / "data" / "07.png").write_bytes(b"")
    longer = config(
        tmp_path / "run", tmp_path, data={"on_error": "skip"}, train={"max_train_steps": 6}, allow_change=["train"]
    )
    trainer = Trainer(longer)
    assert trainer.step == 3 and [place for places in _rows(longer, steps=6) for place in places] == before
    trainer.fit()
    kept = latest(Path(cfg.output_dir) / "checkpoints").tensors("data")
    assert kept["sizes"][7].min() > 0 and trainer.data.buckets.of_row[7] >= 0


def _rows(cfg, steps: int) -> list:
    """(position, time, row) of the micro-batches of so many steps from the beginning."""
    trainer = Trainer(cfg)
    trainer.state.batches = 0
    sampler = iter(trainer.loader().batch_sampler)
    return [next(sampler) for _ in range(steps * trainer.accumulation)]


def test_epochs_are_counted_in_steps_of_whole_batches(tmp_path, folder):
    cfg = config(tmp_path / "run", folder, train={"max_train_steps": None, "num_train_epochs": 3})
    trainer = Trainer(cfg)
    assert trainer.steps == sum(-(-len(rows) * 3 // 8) for rows in trainer.data.buckets.rows) > 3 * ROWS / 8


def test_latents_that_are_not_square(tmp_path, folder):
    cfg = config(tmp_path / "run", folder, latent=True, train={"max_train_steps": 3})
    assert run(cfg) == [0], log(cfg)
    assert len(losses(cfg)) == 3 and all(np.isfinite(losses(cfg)))
    shapes = Trainer(cfg).data.buckets.shapes
    assert len(shapes) > 1 and not (shapes % 16).any() and (shapes[:, 0] != shapes[:, 1]).any()

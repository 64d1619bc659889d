"""The pictures of a run: the same whoever draws them, and what a process that fails costs."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from finetune import sample
from finetune.previews import decoding_alone
from finetune.space import LatentSpace, PixelSpace
from finetune.trainer import Trainer
from forked import last_step, log, run
from tiny import config

SHORT = {"max_train_steps": 2, "global_batch_size": 8}
MANY = {"num_images": 20, "num_inference_steps": 2, "sample_every": 1}  # in batches of 16 and 4


def picture(cfg, step):
    return np.asarray(Image.open(Path(cfg.output_dir) / "samples" / f"step-{step:08d}.png"))


def drawn_by_whom(cfg):
    """A `body`: train, and print which process drew which images."""
    real = sample.draw

    def told(*args, rank, **settings):
        found = real(*args, rank=rank, **settings)
        print(f"process {rank} drew {sorted(found)}")
        return found

    sample.draw = told
    Trainer(cfg).fit()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same weights after each step, by one process and by two: a learning rate of nearly nothing."""
    folder = tmp_path_factory.mktemp("previews")
    settings = {"train": SHORT, "sample": MANY, "model": {"dropout": 0.0}, "optimizer": {"learning_rate": 1e-30}}
    runs = [config(folder / f"run{processes}", **settings) for processes in (1, 2)]
    for processes, cfg in enumerate(runs, 1):
        assert run(cfg, processes=processes, body=drawn_by_whom) == [0] * processes, log(cfg)
    return runs


def test_two_processes_draw_the_picture_of_one(pair):
    one, two = pair
    assert f"process 0 drew {[*range(20)]}" in log(one)
    assert f"process 0 drew {[*range(16)]}" in log(two) and f"process 1 drew {[16, 17, 18, 19]}" in log(two)
    for step in (1, 2):
        assert np.array_equal(picture(one, step), picture(two, step))


def test_a_grid_before_the_first_step_is_that_of_the_model_as_it_was(pair, tmp_path):
    """The learning rate is nearly nothing, so that each later grid is the same; and only where it is asked for."""
    sample = {**MANY, "sample_every": None, "at_start": True}
    settings = {"train": SHORT, "model": {"dropout": 0.0}, "optimizer": {"learning_rate": 1e-30}}
    cfg = config(tmp_path / "run", sample=sample, **settings)
    assert run(cfg) == [0], log(cfg)
    assert np.array_equal(picture(cfg, 0), picture(pair[0], 2))
    names = [sorted(path.name[5:13] for path in (Path(c.output_dir) / "samples").glob("*.png")) for c in (cfg, pair[0])]
    assert names == [["00000000", "00000002"], ["00000001", "00000002"]]


def test_negative_control_other_seeds_are_another_picture(pair, tmp_path):
    other = config(tmp_path / "run", train=SHORT, sample=MANY | {"sample_seed": 1}, model={"dropout": 0.0},
                   optimizer={"learning_rate": 1e-30})  # fmt: skip
    assert run(other) == [0], log(other)
    assert not np.array_equal(picture(other, 2), picture(pair[0], 2))


@pytest.mark.parametrize(("error", "codes"), [(OSError("no such device"), [0, 0]), (ValueError("a bug"), [1, 1])])
def test_what_the_failure_of_one_process_costs(tmp_path, error, codes):
    """The picture alone if it is a matter of the disk; the run if it is not, and each process says whose it was."""
    cfg = config(tmp_path / "run", train=SHORT, sample=MANY)

    def body(cfg):
        real = sample.draw

        def failing(*args, **settings):
            if os.environ["RANK"] == "1" and trainer.step == 1:
                raise error
            return real(*args, **settings)

        sample.draw = failing
        trainer = Trainer(cfg)
        trainer.fit()

    assert run(cfg, processes=2, body=body) == codes, log(cfg)
    names = sorted(path.name for path in (tmp_path / "run" / "samples").glob("*.png"))
    if codes == [0, 0]:
        assert names == ["step-00000002.png"]
        assert "no samples at step 1 (a process could not draw its share)" in log(cfg)
    else:
        assert names == [] and last_step(cfg) == 1 and "process 1 ended: ValueError: a bug" in log(cfg)


@torch.no_grad()
def test_text_encoders_are_away_while_the_vae_decodes():
    done = []

    class Text:
        def put_aside(self):
            done.append("away")

        def load(self, why):
            done.append("back")

    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    vae.decoder.conv_out.register_forward_hook(lambda *_: done.append("decodes"))
    space = LatentSpace(vae, size=8)
    modules = SimpleNamespace(space=space, frozen=[space, Text()])
    with decoding_alone(modules):
        space.decode(torch.zeros(1, 4, 8, 8))
    assert done == ["away", "decodes", "back"]
    space.decode(torch.zeros(1, 4, 8, 8))
    assert done[3:] == ["decodes"], "negative control"
    with decoding_alone(SimpleNamespace(space=PixelSpace(channels=3, size=8), frozen=[])):
        pass

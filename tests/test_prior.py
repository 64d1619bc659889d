"""Prior preservation: which samples are class images and what they count; that each is drawn once, whatever happens."""

import json
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  imported here for the forked children
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

import tiny_models
from finetune.batching import collate, make_loader
from finetune.class_images import with_class_images
from finetune.config import TrainConfig
from finetune.config_cache import Cache
from finetune.config_data import Data
from finetune.config_prior import Prior
from finetune.config_validation import Validation
from finetune.data import open_data
from finetune.errors import ConfigError, DataError
from finetune.order import InTurns, RowOrder
from finetune.prior import _runs, missing_images
from finetune.provenance import published_config
from finetune.trainer import Trainer
from forked import log, metrics, run, state, whole
from tiny_models import parts  # noqa: F401  a fixture

PROMPT = "a dog"


def pictures(folder, numbers):
    """Pictures of one grey each, by which a sample is told."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", (16, 16), (number,) * 3).save(folder / f"{number:03d}.png")
    return str(folder)


@pytest.fixture(scope="module")
def base(parts, tmp_path_factory):  # noqa: F811
    """A text-conditional UNet to start from."""
    folder = tmp_path_factory.mktemp("base")
    unet, _, _ = tiny_models.build(tiny_models.config(parts, "pixel", "text", "unet2d_condition"))
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def cfg(parts, base, tmp_path):  # noqa: F811
    """Three images of a subject; class images are to be drawn."""
    text = {"text_encoder": str(parts / "text_encoder"), "tokenizer": str(parts / "tokenizer")}
    settings = {
        "output_dir": str(tmp_path / "run"),
        "data": {
            "train_data_dir": pictures(tmp_path / "subject", [10, 20, 30]), "instance_prompt": "a sks dog",
            "resolution": 16, "dataloader_num_workers": 0, "random_flip": True,
        },
        "conditioning": {"kind": "text", **text},
        "model": {"kind": "pretrained", "pretrained_model_name_or_path": str(base)},
        "train": {"max_train_steps": 4, "global_batch_size": 4},
        "optimizer": {"lr_warmup_steps": 0, "lr_scheduler": "constant"},
        "checkpoint": {"checkpointing_steps": 2},
        "tracking": {"log_every": 1, "report_to": "none"},
        "sample": {"num_images": 1, "num_inference_steps": 2, "prompts": [PROMPT], "guidance_scale": 1.0},
        "prior": {
            "class_prompt": PROMPT, "class_data_dir": str(tmp_path / "class"), "num_class_images": 5,
            "num_inference_steps": 2, "sample_batch_size": 2, "weight": 0.25,
        },
    }  # fmt: skip
    return TypeAdapter(TrainConfig).validate_python(settings)


def class_images(cfg):
    return {path.name: path.read_bytes() for path in Path(cfg.prior.class_data_dir).iterdir()}


# -- samples -----------------------------------------------------------------------------------------------------------


def test_two_orders_in_turns():
    first, second = RowOrder(np.array([3, 5, 8]), seed=0), RowOrder(np.arange(100, 104), seed=1)
    order = InTurns(first, second)
    rows = [order.place(position)[1] for position in range(6 * 4)]
    assert len(order) == 6
    assert rows[::2] == [first.row_at(epoch, index) for epoch in range(4) for index in range(3)]
    assert rows[1::2] == [second.row_at(epoch, index) for epoch in range(3) for index in range(4)]
    assert rows[1:6:2] != [second.row_at(0, 0)] * 3, "negative control"


def test_every_other_sample_is_a_class_image_with_its_caption_and_weight(cfg):
    pictures(Path(cfg.prior.class_data_dir), range(100, 107))
    data = with_class_images(cfg, open_data(cfg, progress=False))
    assert len(data) == 6 and data.facts["class_images"] == 5
    split = {"accumulation": 1, "micro_batch": 2, "pin_memory": False}

    def greys(start, rank, world_size, steps):
        batches = iter(make_loader(data, cfg, start=start, rank=rank, world_size=world_size, **split))
        for _ in range(steps):
            batch = next(batches)
            grey = ((batch.pixel_values[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
            yield from zip(batch.positions.tolist(), grey, batch.captions, batch.loss_weight.tolist(), strict=True)

    alone = list(greys(0, 0, 1, 30))
    for position, grey, caption, weight in alone:
        assert (grey >= 100, caption, weight) == ((True, PROMPT, 0.25) if position % 2 else (False, "a sks dog", 1.0))
    assert Counter(grey for _, grey, _, _ in alone) == {
        **dict.fromkeys([10, 20, 30], 10), **dict.fromkeys(range(100, 105), 6)
    }  # fmt: skip
    two = [*greys(0, 0, 2, 15), *greys(0, 1, 2, 15)]
    assert sorted(two) == alone and list(greys(20, 0, 1, 10)) == alone[40:]


def test_without_prior_nothing_is_weighted(cfg):
    data = open_data(replace(cfg, prior=None), progress=False)
    assert with_class_images(replace(cfg, prior=None), data) is data
    places = [(0, 0, int(data.rows[0]))]
    assert collate(list(zip(places, data.samples(data.rows[:1], [0]), strict=True))).loss_weight is None


def test_class_images_are_part_of_what_a_resume_compares(cfg):
    folder = Path(cfg.prior.class_data_dir)
    pictures(folder, range(100, 105))
    data = with_class_images(cfg, open_data(cfg, progress=False))
    pictures(folder, [104])
    assert with_class_images(cfg, open_data(cfg, progress=False)).content == data.content, "the same bytes"
    Image.new("RGB", (16, 16), "red").save(folder / "104.png")
    other = with_class_images(cfg, open_data(cfg, progress=False))
    assert other.content != data.content and other.fingerprint == data.fingerprint
    assert data.name(int(data.rows[-1])) == "104.png"
    prompt = replace(cfg, prior=replace(cfg.prior, class_prompt="a cat"))
    assert with_class_images(prompt, open_data(prompt, progress=False)).content != other.content


def test_masks_are_of_the_subject_and_class_images_count_whole(cfg):
    lines, folder = [], Path(cfg.data.train_data_dir)
    (folder / "masks").mkdir()
    for name in ("010.png", "020.png", "030.png"):
        half = np.zeros((16, 16), np.uint8)
        half[:, :8] = 255
        Image.fromarray(half).save(folder / "masks" / name)
        lines.append(json.dumps({"file_name": name, "mask": f"masks/{name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    pictures(Path(cfg.prior.class_data_dir), range(100, 105))
    cfg = replace(cfg, data=replace(cfg.data, mask_column="mask"))
    data = with_class_images(cfg, open_data(cfg, progress=False))
    made = data.samples(data.rows, [0] * len(data.rows))
    assert [float(sample.mask.mean()) for sample in made] == [0.5] * 3 + [1.0] * 5


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_each_class_image_is_drawn_once_whatever_the_processes_and_whatever_stopped_them(cfg, tmp_path):
    assert run(cfg, body=whole) == [0], log(cfg)
    drawn = class_images(cfg)
    assert sorted(drawn) == [f"class-{number:05d}.png" for number in range(5)]
    assert len(set(drawn.values())) == 5, "each has a seed of its own"
    assert "lacks 5 class images" in log(cfg) and "5 class images, every other sample" in log(cfg)

    folder = Path(cfg.prior.class_data_dir)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "class-00001.png").unlink(), (folder / "class-00003.png").unlink()
    (folder / ".class-00003.1.tmp").write_bytes(b"half a pic")  # what a kill leaves
    two = replace(cfg, output_dir=str(tmp_path / "two"))
    assert run(two, processes=2) == [0, 0], log(two)
    again = {name: content for name, content in class_images(cfg).items() if not name.startswith(".")}
    assert again == drawn, "image i is that of seed i, by whichever process and beside whichever others"
    kept = {name: time for name, time in times.items() if name not in ("class-00001.png", "class-00003.png")}
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    one = [line["loss"] for line in metrics(cfg)]
    assert [line["loss"] for line in metrics(two)] == pytest.approx(one, rel=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(cfg, tmp_path):
    through = replace(cfg, train=replace(cfg.train, max_train_steps=6))
    assert run(through) == [0], log(through)
    stopped = replace(through, output_dir=str(tmp_path / "stopped"))
    assert run(stopped, stop=(2, signal.SIGTERM)) == [75], log(stopped)
    assert run(stopped) == [0] and state(stopped, 6) == state(through, 6), log(stopped)


def test_what_is_wrong_with_the_data_is_told_before_anything_is_drawn(cfg, tmp_path):
    wrong = replace(cfg, data=replace(cfg.data, train_data_dir=str(tmp_path / "nowhere")))
    with pytest.raises((ConfigError, DataError), match="nowhere"):
        Trainer(wrong)
    assert not Path(cfg.prior.class_data_dir).exists()


def test_class_images_are_drawn_with_a_cache_and_are_not_measured(cfg):
    """By a text encoder that has its weights although embeddings are cached; the images of the subject are measured."""
    pictures(Path(cfg.data.train_data_dir), range(40, 52))
    folder = str(Path(cfg.output_dir).parent / "cache")
    cached = replace(cfg, cache=Cache(text=True, folder=folder), validation=Validation(held_out=0.4))
    trainer = Trainer(cached)
    assert len(class_images(cfg)) == 5 and "made" in trainer.cached
    assert all((rows < trainer.data.class_images_from).all() for rows in trainer.validation.rows)


def test_own_images_count_and_those_of_another_prompt_are_refused(tmp_path):
    folder = Path(pictures(tmp_path / "class", range(3)))
    assert missing_images(folder, 5, PROMPT) == [0, 1] and missing_images(folder, 3, PROMPT) == []
    assert missing_images(tmp_path / "none", 2, PROMPT) == [0, 1]
    assert _runs([0, 1, 2, 4, 5, 9], 2) == [[0, 1], [2], [4, 5], [9]]
    Image.new("RGB", (8, 8)).save(folder / "class-00001.png")
    with pytest.raises(ConfigError, match="class-00001.png, drawn from the prompt None, but prior.class_pr"):
        missing_images(folder, 5, PROMPT)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_subject_and_weighted_that_of_the_class(cfg):
    """By hand from the trainer's own loss per sample; and against a run in which every image counts 1."""
    pictures(Path(cfg.prior.class_data_dir), range(100, 105))

    def first(weight):
        trainer = Trainer(replace(cfg, prior=replace(cfg.prior, weight=weight)))
        batch = next(iter(trainer.loader()))
        with torch.no_grad():
            terms = trainer._loss(batch, 0)[0].terms
        return batch, terms

    batch, terms = first(0.25)
    of_class = batch.rows >= 3
    assert of_class.tolist() == [False, True, False, True]
    loss = (terms.per_sample * terms.weight).mean()
    by_hand = (terms.per_sample[~of_class].mean() + 0.25 * terms.per_sample[of_class].mean()) / 2
    torch.testing.assert_close(loss, by_hand)
    _, plain = first(1.0)
    assert torch.equal(plain.per_sample, terms.per_sample) and not torch.isclose((plain.per_sample).mean(), loss)


def test_what_does_not_go_together(cfg):
    def problem(**sections):
        with pytest.raises(ValueError) as error:
            replace(cfg, **sections)
        return str(error.value)

    drawn = replace(cfg, prior=None)  # negative control: each of these is a config without prior
    streamed = Data(resolution=16, dataset_name="a/b", streaming=True)
    assert "not for streaming" in problem(data=streamed) and replace(drawn, data=streamed)
    unet = TypeAdapter(TrainConfig).validate_python({
        "output_dir": "o", "data": {"resolution": 16}, "conditioning": {"kind": "none"}, "model": {"kind": "unet2d"}
    })  # fmt: skip
    prior = Prior(class_prompt=PROMPT, class_data_dir="c")
    with pytest.raises(ValueError, match="begins with noise: remove prior, or use model.kind pretrained"):
        replace(unet, prior=prior)
    with pytest.raises(ValueError, match="data.instance_prompt: there is no condition text"):
        replace(unet, data=Data(resolution=16, instance_prompt="x"))
    with pytest.raises(ValueError, match="both give the captions"):
        Data(resolution=16, instance_prompt="x", caption_column="words")


def test_the_folder_of_class_images_is_not_published(cfg):
    assert published_config(cfg).prior.class_data_dir == "class"

"""The held-out loss: which images are held out, what is measured of them, and what is concluded from it."""

import hashlib
import io
import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import DDPMScheduler
from PIL import Image as Pillow
from pydantic import TypeAdapter

import finetune.run
from finetune import evaluate
from finetune.config import Validation
from finetune.config_objective import Objective
from finetune.data import open_data
from finetune.errors import DataError
from finetune.objective import build_objective
from finetune.seeding import PositionRandom, key
from finetune.trainer import Trainer
from finetune.validation import HeldOut, StratifiedLevels, _with_levels_of_its_own, standard_error
from forked import log, metrics, run, state, whole
from tiny import config as tiny

SHARE = 0.3
HELD_OUT = {"held_out": SHARE, "every": 2, "max_images": 6, "levels": 3}


def config(output_dir, **sections):
    """The tiny run on a data set from Python."""
    sections["data"] = {"dataset_name": None, "max_train_samples": None} | sections.get("data", {})
    return tiny(output_dir, **sections)


def png(rng, low=0, high=256):
    """The bytes of an 8x8 picture of random values."""
    file = io.BytesIO()
    Pillow.fromarray(rng.integers(low, high, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(contents, labels=None):
    """A data set of these pictures."""
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": labels or [0] * len(contents)}
    return Dataset.from_dict(rows, features=Features({"image": Image(decode=False), "label": ClassLabel(3)}))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [png(rng) for _ in range(300)]


def opened(contents, labels=None, share=SHARE, **data):
    cfg = config(Path("unused"), data=data)
    cfg = replace(cfg, validation=Validation(held_out=share))
    return open_data(cfg, dataset=table(contents, labels), progress=False)


def signed(content: bytes) -> int:
    """What draws for an image are keyed by."""
    return int.from_bytes(hashlib.blake2b(content).digest()[:8], "little", signed=True)


def image_number(content: bytes) -> int:
    """What decides whether an image is held out."""
    return signed(content) % 2**64


def held_out(contents, *arguments, **settings):
    """The pictures that are held out, after a look at whether each row is on one side."""
    data = opened(contents, *arguments, **settings)
    assert sorted([*data.rows, *data.held_out.rows]) == list(range(len(contents)))
    assert len(data) + len(data.held_out) == len(contents)
    return {contents[row] for row in data.held_out.rows}


# -- the split ---------------------------------------------------------------------------------------------------------


def test_the_split_hangs_on_the_bytes_of_an_image_alone(pictures):
    chosen = held_out(pictures)
    assert chosen == {content for content in pictures if image_number(content) < SHARE * 2**64}
    assert abs(len(chosen) - SHARE * 300) < 4 * math.sqrt(300 * SHARE * (1 - SHARE))
    more = [png(np.random.default_rng(1)) for _ in range(50)]
    assert held_out(more + pictures[::-1]) & set(pictures) == chosen, "others come, and the order changes"
    assert held_out(pictures, [row % 3 for row in range(300)]) == chosen, "other labels"
    assert held_out(pictures, share=0.5) > chosen, "a larger share takes more"
    twice = [*pictures, *pictures[:99]]
    data = opened(twice, [0] * 300 + [1] * 99)
    trained = {twice[row] for row in data.rows}
    assert trained.isdisjoint(held_out(twice)) and held_out(twice) == chosen, "copies stay together"


def test_a_split_goes_with_a_number_of_crops(pictures):
    data = opened(pictures, random_flip=True, variants=2)
    assert data.rules.variants == 2 and data.held_out.rules.variants is None


def test_negative_control_a_split_by_the_whole_row_or_its_number_moves_images(pictures):
    def sides(data, numbers):
        return set(np.flatnonzero(numbers.view(np.uint64) < SHARE * 2.0**64))

    plain, labelled = (opened(pictures, labels, share=0) for labels in (None, [1] * 300))
    assert sides(plain, plain.digests) != sides(labelled, labelled.digests)
    assert sides(plain, plain.image_numbers) == sides(labelled, labelled.image_numbers)


def test_what_is_held_out_is_not_trained_on_and_counts_as_content(pictures):
    data, alone = opened(pictures), opened(pictures, share=0)
    assert alone.held_out is None and alone.content != data.content != opened(pictures, share=0.5).content
    order = data.order(global_batch=4)
    epoch = [order.row_at(0, index) for index in range(len(order))]
    assert len(epoch) == len(data) and not set(epoch) & set(data.held_out.rows)
    changed = list(pictures)
    row = int(data.held_out.rows[0])
    rng = np.random.default_rng(2)
    changed[row] = next(made for made in iter(lambda: png(rng), None) if image_number(made) < SHARE * 2**64)
    other = opened(changed)
    assert other.fingerprint == data.fingerprint and other.content != data.content
    assert data.held_out.rules.center_crop and not data.held_out.rules.random_flip and data.rules.random_flip


@pytest.mark.parametrize(("share", "what"), [(0.001, "0 different images held out"), (0.9999, "to train on")])
def test_a_side_that_is_empty_is_refused(pictures, share, what):
    with pytest.raises(DataError, match=f"validation.held_out {share} leaves .*{what}.* another share"):
        opened(pictures, share=share)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"validation": {"every": 5}}, "validation.every: nothing is held out: set validation.held_out to a share"),
        ({"validation": {"stop_on_overfit": True}}, "validation.stop_on_overfit: nothing is held out"),
        ({"checkpoint": {"best_metric": "validation_loss"}}, "validation_loss is measured on images held out: set"),
        ({"validation": {"held_out": 0.1}, "data": {"streaming": True}}, "which data.streaming does not read"),
        ({"validation": {"held_out": 1.0}}, "less than 1"),
    ],
)
def test_a_setting_that_would_do_nothing_or_cannot_is_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        tiny(Path("unused"), **sections)


# -- the measure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "share_of"),
    [
        ({"kind": "ddpm"}, lambda level: (level.double() + 0.5) / 1000),
        ({"kind": "edm"}, lambda sigma: torch.special.ndtr((sigma.log() + 1.2) / 1.2)),
        ({"kind": "flow", "levels": {"kind": "uniform"}}, lambda time: 1 - time),
        ({"kind": "flow", "levels": {"kind": "logit_normal"}}, lambda time: torch.special.ndtr(torch.logit(time))),
    ],
    ids=["ddpm", "edm", "flow", "logit-normal"],
)
def test_levels_lie_one_in_each_share_of_what_is_trained(settings, share_of):
    objective = build_objective(TypeAdapter(Objective).validate_python(settings), clip_sample=True)
    covered = np.zeros(4)
    for image in range(50):
        level, weight = objective.levels.sample(StratifiedLevels(0, image, 8, "cpu"))
        shares = np.floor(8 * share_of(level).numpy())
        assert shares.tolist() == list(range(8)) and (weight == 1).all()
        covered += np.histogram(8 * share_of(level).numpy() % 1, 4, (0, 1))[0]
        assert torch.equal(level, objective.levels.sample(StratifiedLevels(0, image, 8, "cpu"))[0])
    assert covered.min() > 70, "anywhere in the share: 100 of 400 are expected in each quarter of it"
    free, _ = objective.levels.sample(PositionRandom(0, torch.arange(8)))  # negative control
    assert np.floor(8 * share_of(free).numpy()).tolist() != list(range(8))


def test_levels_that_training_draws_by_past_losses_are_uniform_in_the_measure():
    settings = {"kind": "ddpm", "num_train_timesteps": 8, "variance": {"kind": "learned_range", "vb_loss": "kl"},
                "levels": {"kind": "loss_second_moment", "history_per_term": 1}}  # fmt: skip
    objective = build_objective(TypeAdapter(Objective).validate_python(settings), clip_sample=True)
    objective.levels.update(torch.arange(8), torch.tensor([100.0, *[1.0] * 7]))
    random = StratifiedLevels(0, 1, 8, "cpu")
    level, weight = _with_levels_of_its_own(objective).levels.sample(random)
    assert level.tolist() == list(range(8)) and (weight == 1).all()
    assert objective.levels.sample(random)[0].tolist() != level.tolist()  # negative control


def test_other_draws_of_the_measure_are_plain():
    random, plain = StratifiedLevels(0, 5, 200, "cpu"), PositionRandom(0, torch.arange(200))
    assert random.uniform("other").diff().min() < 0 < random.uniform("level").diff().min()
    assert random.integers("other", 10).diff().min() < 0 <= random.integers("level", 10).diff().min()
    assert random.normal("noise", (2,)).shape == plain.normal("noise", (2,)).shape


def test_the_loss_is_the_one_computed_by_hand(tmp_path, pictures):
    """From diffusers' own scheduler and the pixels as they are: nothing cropped, mirrored or dropped."""
    cfg = config(tmp_path / "run", validation=HELD_OUT)
    labels = [row % 3 for row in range(300)]
    trainer = Trainer(cfg, dataset=table(pictures, labels))
    scheduler = DDPMScheduler()
    order = sorted(range(300), key=lambda row: image_number(pictures[row]))
    first = sum(image_number(pictures[row]) < SHARE * 2**64 for row in order)
    line = trainer.validation.measure(trainer)
    for name, rows in (("validation", order[:6]), ("train_validation", order[first : first + 6])):
        losses = []
        for row in rows:
            pixels = np.asarray(Pillow.open(io.BytesIO(pictures[row]))).transpose(2, 0, 1)
            x0 = torch.tensor(pixels / 127.5 - 1, dtype=torch.float32)
            for j in range(3):
                position = torch.tensor([key(0, "validation", signed(pictures[row]), j) >> 1])
                random = PositionRandom(0, position)
                t = (1000 * (j + random.uniform("level")) / 3).long()
                noise = random.normal("noise", (3, 8, 8))
                with torch.no_grad():
                    x_t = scheduler.add_noise(x0[None], noise, t)
                    output = trainer.modules.unet.eval()(x_t, t, class_labels=torch.tensor([labels[row]])).sample
                losses.append(float((output - noise).square().mean()))
        each = np.reshape(losses, (6, 3)).mean(1)
        assert line[f"{name}_loss"] == pytest.approx(each.mean(), rel=1e-6)
        assert line[f"{name}_stderr"] == pytest.approx(each.std(ddof=1) / math.sqrt(6), rel=1e-5)
    trainer.modules.unet.train()


def test_standard_error_is_that_of_the_bootstrap():
    values = torch.from_numpy(np.random.default_rng(0).gamma(2.0, size=40))
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    resampled = values.numpy()[np.random.default_rng(1).integers(0, 40, (20000, 40))].mean(1)
    assert standard_error(values) * math.sqrt(39 / 40) == pytest.approx(resampled.std(), rel=0.03)


def test_one_row_of_each_image_is_measured(tmp_path, pictures):
    cfg = config(tmp_path / "run", validation={"held_out": SHARE, "max_images": 500})
    data = opened([*pictures, *pictures])
    both = HeldOut(data, cfg.validation).rows
    assert [len(rows) for rows in both] == [len(data.held_out) / 2] * 2 and not set(both[0]) & set(both[1])
    assert max(map(max, both)) < 300, "the first of the two"


def test_other_data_are_evaluated_whole_and_its_own_by_what_was_trained_on():
    cfg = config(Path("unused"), data={"train_data_dir": "photos"}, validation=HELD_OUT,
                 checkpoint={"best_metric": "validation_loss"})  # fmt: skip
    assert evaluate._on(cfg, None, None).validation == cfg.validation
    for data, split in (("others", None), (None, "test")):
        assert evaluate._on(cfg, data, split).validation.held_out == 0


# -- in a run ----------------------------------------------------------------------------------------------------------


def on(dataset):
    return lambda cfg: Trainer(cfg, dataset=dataset).fit()


def measured(cfg):
    return [line for line in metrics(cfg) if "validation_loss" in line]


def losses(cfg):
    return [line["loss"] for line in metrics(cfg) if "loss" in line]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, pictures):
    """A run that nothing happens to, with dropout, averages and mirrored images."""
    cfg = config(tmp_path_factory.mktemp("validation") / "run", validation=HELD_OUT)
    assert run(cfg, body=on(table(pictures))) == [0], log(cfg)
    return cfg


def test_measuring_leaves_the_training_alone(tmp_path, pictures, unbroken):
    def unmeasured(cfg):
        HeldOut.measure = lambda self, trainer: {}
        Trainer(cfg, dataset=table(pictures)).fit()

    without = config(tmp_path / "run", validation=HELD_OUT)
    assert run(without, body=unmeasured) == [0], log(without)
    assert losses(without) == losses(unbroken) and not measured(without)
    kept = state(unbroken, 9)
    kept.pop("validation.safetensors")
    assert state(without, 9) == kept

    def disturbed(cfg):  # negative control
        real = HeldOut.measure
        HeldOut.measure = lambda self, trainer: (real(self, trainer), trainer.modules.unet.eval())[0]
        Trainer(cfg, dataset=table(pictures)).fit()

    other = config(tmp_path / "disturbed", validation=HELD_OUT)
    assert run(other, body=disturbed) == [0], log(other)
    assert losses(other) != losses(unbroken)


def test_lines_of_a_run(unbroken):
    lines = measured(unbroken)
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 9]
    names = {f"{side}_{what}" for side in ("validation", "train_validation") for what in ("loss", "stderr")}
    assert names <= set(lines[0]) and "validation_rise" not in lines[0]
    lowest = math.inf
    for line in lines:
        if lowest < math.inf:
            assert line["validation_rise"] == pytest.approx(line["validation_loss"] - lowest)
            assert line["validation_rise_stderr"] < line["validation_stderr"], "paired"
        lowest = min(lowest, line["validation_loss"])
    facts = json.loads((Path(unbroken.output_dir) / "run.json").read_text())["data"]
    assert facts["rows"] == 300 and 60 < facts["held_out"] < 120


def test_two_processes_measure_what_one_does(tmp_path, pictures):
    """7 images of each side, which two processes cannot share evenly."""
    settings = {"validation": {**HELD_OUT, "max_images": 7}, "optimizer": {"learning_rate": 1e-30}}
    settings |= {"train": {"max_train_steps": 2, "global_batch_size": 8}, "model": {"dropout": 0.0}}
    cfgs = [config(tmp_path / f"run{processes}", **settings) for processes in (1, 2)]
    for processes, cfg in enumerate(cfgs, 1):
        assert run(cfg, processes=processes, body=on(table(pictures))) == [0] * processes, log(cfg)
    one, two = map(measured, cfgs)
    assert len(one) == 2
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("where", ["between steps", "while it measures"])
def test_a_resumed_run_measures_and_judges_the_same(tmp_path, pictures, unbroken, where):
    cfg = config(tmp_path / "run", validation=HELD_OUT)

    def slow(cfg):
        real = HeldOut.loss

        def slowly(self, trainer, *rest):
            if trainer.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
            return real(self, trainer, *rest)

        HeldOut.loss = slowly
        Trainer(cfg, dataset=table(pictures)).fit()

    interrupted = {"body": slow} if where == "while it measures" else {"stop": (5, signal.SIGTERM)}
    assert run(cfg, **{"body": on(table(pictures)), **interrupted}) == [75], log(cfg)
    if where == "while it measures":
        assert measured(cfg)[-1]["step"] == 2 and "saved at step 4" in log(cfg)
    assert run(cfg, body=on(table(pictures))) == [0], log(cfg)
    assert measured(cfg) == measured(unbroken) and losses(cfg) == losses(unbroken)
    assert state(cfg, 9) == state(unbroken, 9) and "validation.safetensors" in state(cfg, 9)


def test_a_signal_to_one_of_two_processes_while_they_measure_saves_and_ends_both(tmp_path, pictures):
    cfg = config(tmp_path / "run", validation=HELD_OUT, train={"max_train_steps": 3, "global_batch_size": 8})

    def signalled(cfg):
        real = HeldOut.loss

        def loss(self, trainer, *rest):
            if trainer.step == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
            return real(self, trainer, *rest)

        HeldOut.loss = loss
        Trainer(cfg, dataset=table(pictures)).fit()

    assert run(cfg, processes=2, body=signalled) == [75, 75], log(cfg)
    assert [line["step"] for line in measured(cfg)] == [0] and "saved at step 2" in log(cfg)
    assert run(cfg, processes=2, body=on(table(pictures))) == [0, 0], log(cfg)
    assert [line["step"] for line in measured(cfg)] == [0, 2, 3]


def test_a_start_that_was_killed_before_a_checkpoint_measures_step_0_once(tmp_path, pictures):
    cfg = config(tmp_path / "run", validation=HELD_OUT, checkpoint={"checkpointing_steps": 100})
    assert run(cfg, body=on(table(pictures)), stop=(2, signal.SIGKILL)) == [-signal.SIGKILL]
    assert run(cfg, body=on(table(pictures))) == [0], log(cfg)
    assert [line["step"] for line in measured(cfg)] == [0, 2, 4, 6, 8, 9]


def test_other_levels_are_asked_for_and_not_compared_with(tmp_path, pictures):
    cfg = config(tmp_path / "run", validation=HELD_OUT, checkpoint={"checkpointing_steps": 4})
    assert run(cfg, body=on(table(pictures)), stop=(5, signal.SIGTERM)) == [75]
    other = config(tmp_path / "run", validation=HELD_OUT | {"levels": 2})
    assert run(other, body=on(table(pictures))) == [2] and "validation.levels: 3 -> 2" in log(cfg)
    assert run(replace(other, allow_change=("validation.levels",)), body=on(table(pictures))) == [0], log(cfg)
    assert log(cfg).count("of other images or levels than before") == 1
    assert ["validation_rise" in line for line in measured(cfg)] == [False, True, True, False, True, True]
    changed = config(tmp_path / "run", validation=HELD_OUT | {"held_out": 0.4})
    assert run(changed, body=on(table(pictures))) == [2] and "validation.held_out: 0.3 -> 0.4" in log(cfg)


def test_images_that_turn_unusable_cost_themselves_alone(tmp_path, pictures):
    """data.on_error skip, one of each side: the order of training stays, and the broken image is not measured."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, content in enumerate(pictures[:40]):
        (folder / f"{number:02}.png").write_bytes(content)
    data = {"train_data_dir": str(folder), "on_error": "skip"}
    cfg = config(tmp_path / "run", data=data, validation=HELD_OUT, conditioning={"kind": "none"})
    assert run(cfg, stop=(5, signal.SIGTERM)) == [75], log(cfg)
    lowest = sorted(range(40), key=lambda number: image_number(pictures[number]))
    for number in (lowest[0], lowest[-1]):
        (folder / f"{number:02}.png").write_bytes(b"")
    assert run(cfg) == [0], log(cfg)
    assert "of other images or levels than before" in log(cfg)
    assert [line["step"] for line in metrics(cfg) if "loss" in line] == [*range(1, 10)]
    whole_again = config(tmp_path / "other", data=data, validation=HELD_OUT, conditioning={"kind": "none"})
    for number in (lowest[0], lowest[-1]):
        (folder / f"{number:02}.png").write_bytes(pictures[number])
    assert run(whole_again) == [0], log(whole_again)
    broken, fine = losses(cfg), losses(whole_again)
    assert broken[:5] == fine[:5] and np.allclose(broken, fine, rtol=0.5), "at most single samples were replaced"


# -- what is concluded -------------------------------------------------------------------------------------------------


def judged(pictures, sequence, **settings):
    """What is said of measurements of 4 held-out images each, and the judge."""
    cfg = Validation(held_out=SHARE, **settings)
    judge, said = HeldOut(opened(pictures), cfg), []
    for step, values in enumerate(sequence):
        now = torch.tensor(values, dtype=torch.float64)
        said.append(judge._judged({"validation": now, "train_validation": now}, step))
    return judge, said


SPREAD = np.array([1.0, 5.0, 9.0, 13.0])  # images differ a hundred times more than one does from itself
NOISE = np.array([0.01, -0.01, 0.02, -0.02])


def test_a_clear_rise_of_some_length_is_overfitting(pictures, caplog):
    rising = [SPREAD, SPREAD - 0.5, SPREAD + NOISE, SPREAD + 0.1 + NOISE, SPREAD + 0.2 - NOISE, SPREAD + 0.3]
    judge, said = judged(pictures, rising, patience=3, stop_on_overfit=True)
    assert judge.ends and caplog.text.count("overfitting: at step 4") == 1
    assert "above that of step 1, 6.5, by more than 2 standard errors" in caplog.text
    assert said[2]["validation_rise"] == pytest.approx(0.5) and said[2]["validation_rise_stderr"] < 0.02
    assert said[2]["validation_stderr"] > 2, "the means alone would tell nothing"
    assert not judged(pictures, rising[:4], patience=3, stop_on_overfit=True)[0].ends, "not long enough"
    assert not judged(pictures, rising, patience=3)[0].ends, "not asked for"


def test_negative_control_noise_or_a_rise_that_is_made_up_for_is_not(pictures, caplog):
    unclear = [SPREAD, *(SPREAD + 0.005 + NOISE * sign for sign in (1, -1, 1, -1))]
    interrupted = [SPREAD, SPREAD + 1, SPREAD + 1, SPREAD - 1, SPREAD + 1, SPREAD + 1, SPREAD - 0.9 + NOISE * 20]
    for sequence in (unclear, interrupted, [SPREAD * 0.9**i for i in range(6)]):
        judge, _ = judged(pictures, sequence, patience=3, stop_on_overfit=True)
        assert not judge.ends and not caplog.text


def test_a_loss_that_is_not_finite_is_told_and_not_compared(pictures, caplog):
    judge, said = judged(pictures, [SPREAD, SPREAD * math.nan, SPREAD + 1], patience=1, stop_on_overfit=True)
    assert said[1]["validation_loss"] is None and "step 1 is not finite" in caplog.text
    assert said[2]["validation_rise"] == 1 and judge.ends


def sided(trained, held):
    """A data set of 40 pictures of two ranges of values, by the side that they will be on."""
    rng, made = np.random.default_rng(0), {True: [], False: []}
    while min(map(len, made.values())) < 20:
        for low, high in {trained, held}:
            content = png(rng, low, high)
            side = image_number(content) < 0.5 * 2**64
            if (low, high) == (held if side else trained):
                made[side].append(content)
    return table([*made[True][:20], *made[False][:20]])


OVERFIT = {
    "conditioning": {"kind": "none"},
    "objective": {"kind": "ddpm", "prediction_type": "sample"},
    "optimizer": {"learning_rate": 2e-3, "lr_warmup_steps": 0},
    "ema": {"use_ema": False, "ema_max_decay": [0.9]},
    "train": {"max_train_steps": 40, "global_batch_size": 8},
    "validation": {"held_out": 0.5, "every": 2, "max_images": 8, "patience": 2, "stop_on_overfit": True},
    "checkpoint": {"checkpointing_steps": 2, "best_metric": "validation_loss"},
}


def test_a_run_that_learns_what_does_not_hold_elsewhere_ends(tmp_path):
    """Bright pictures are trained on, dark ones held out; it ends as after a last step, and stays ended."""
    cfg = config(tmp_path / "run", **OVERFIT)
    dataset = sided((200, 256), (0, 56))

    def body(cfg):
        finetune.run.train(cfg, dataset=dataset)

    assert run(cfg, body=body) == [0], log(cfg)
    lines = measured(cfg)
    last = lines[-1]["step"]
    assert last < 40 and "the training ends here (validation.stop_on_overfit)" in log(cfg)
    assert lines[-1]["train_validation_loss"] < lines[0]["train_validation_loss"]
    assert lines[-1]["validation_loss"] > min(line["validation_loss"] for line in lines)
    kept = {int(path.name[5:]): json.loads((path / "state.json").read_text())
            for path in (tmp_path / "run" / "checkpoints").glob("step-*")}  # fmt: skip
    assert last in kept and (tmp_path / "run" / "samples" / f"step-{last:08d}.png").is_file()
    best = min((line for line in lines if line["step"]), key=lambda line: line["validation_loss"])
    assert kept[best["step"]]["best_metric"] == {"validation_loss": best["validation_loss"]}
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    before = metrics(cfg)
    assert run(cfg, body=body) == [0] and metrics(cfg) == before, "the same command again trains no further"


def test_negative_control_a_run_that_learns_what_holds_elsewhere_goes_on(tmp_path):
    cfg = config(tmp_path / "run", **OVERFIT | {"train": {"max_train_steps": 8, "global_batch_size": 8}})
    dataset = sided((200, 256), (200, 256))
    assert run(cfg, body=on(dataset)) == [0], log(cfg)
    assert measured(cfg)[-1]["step"] == 8 and "overfitting" not in log(cfg)


def test_the_plan_says_what_it_costs(tmp_path):
    data = {"max_train_samples": 60}
    cfg = tiny(tmp_path / "run", data=data, validation=HELD_OUT, train={"max_train_steps": 1, "global_batch_size": 8})
    assert run(cfg, body=whole) == [0], log(cfg)
    assert "6 of them and 6 others measured every 2 steps in 36 evaluations of the network" in log(cfg)

"""A run that was killed and started again ends with the same bits; nothing that must not matter matters."""

import re
import signal
from dataclasses import replace

import pytest
from PIL import Image

from finetune.config import Train
from finetune.optimization import learning_rate
from finetune.trainer import Trainer
from forked import last_step, log, metrics, run, state, whole
from tiny import config

STEPS = 9  # 72 samples of 20 rows: the run stops in the middle of its fourth epoch


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(processes, accumulation, workers=0) -> the final state of an uninterrupted run."""
    known = {}

    def uninterrupted(processes=1, accumulation=1):
        if (processes, accumulation) not in known:
            cfg = config(
                tmp_path_factory.mktemp("reference") / "run",
                train={"gradient_accumulation_steps": accumulation, "max_train_steps": STEPS, "global_batch_size": 8},
            )
            assert run(cfg, processes=processes) == [0] * processes, log(cfg)
            known[processes, accumulation] = state(cfg, STEPS), metrics(cfg)
        return known[processes, accumulation]

    return uninterrupted


@pytest.mark.parametrize(("accumulation", "processes", "workers"), [(1, 1, 0), (4, 1, 2), (4, 2, 0), (1, 2, 2)])
def test_killed_and_resumed_is_bit_equal(tmp_path, reference, workers, processes, accumulation):
    train = {"gradient_accumulation_steps": accumulation, "max_train_steps": STEPS, "global_batch_size": 8}
    cfg = config(tmp_path / "run", train=train, data={"dataloader_num_workers": workers})
    codes = run(cfg, processes=processes, stop=(5, signal.SIGKILL))
    assert codes == [-signal.SIGKILL] * processes
    assert 5 <= last_step(cfg) < STEPS
    assert run(cfg, processes=processes) == [0] * processes, log(cfg)
    expected, lines = reference(processes, accumulation)
    assert state(cfg, STEPS) == expected
    assert [(line["step"], line["loss"], line["lr"]) for line in metrics(cfg)] == [
        (line["step"], line["loss"], line["lr"]) for line in lines
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("processes", [1, 2])
def test_signal_saves_and_the_same_command_resumes(tmp_path, reference, number, code, processes):
    cfg = config(tmp_path / "run", checkpoint={"checkpointing_steps": 1000})
    assert run(cfg, processes=processes, stop=(3, number)) == [code] * processes, log(cfg)
    stopped = last_step(cfg)
    assert 3 <= stopped < STEPS
    assert f"{number.name}: saved at step {stopped}" in log(cfg)
    assert state(cfg, stopped)
    assert run(cfg, processes=processes) == [0] * processes, log(cfg)
    assert state(cfg, STEPS) == reference(processes)[0]


@pytest.mark.parametrize(
    ("processes", "accumulation", "micro"), [(1, 2, None), (1, 4, None), (2, 1, None), (2, 2, None), (1, 4, 2)]
)
def test_split_of_the_batch_does_not_matter(tmp_path, reference, processes, accumulation, micro):
    """Same samples, noise and learning rates; losses within float32 of each other (dropout is per process: off)."""
    model = {"dropout": 0.0}
    plain = config(tmp_path / "plain", model=model)
    batch = {"train_batch_size": micro} if micro else {"global_batch_size": 8}
    train = Train(max_train_steps=STEPS, gradient_accumulation_steps=accumulation, **batch)
    split = replace(config(tmp_path / "split", model=model), train=train)
    assert run(plain) == [0], log(plain)
    assert run(split, processes=processes) == [0] * processes, log(split)
    for a, b in zip(metrics(plain), metrics(split), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert (a["lr"], a["samples_seen"]) == (b["lr"], b["samples_seen"])


def test_world_size_may_change_at_a_resume(tmp_path):
    model = {"dropout": 0.0}
    plain, elastic = config(tmp_path / "plain", model=model), config(tmp_path / "elastic", model=model)
    assert run(plain) == [0], log(plain)
    for processes, stop in [(1, 2), (2, 4), (1, 6), (2, None)]:
        run(elastic, processes=processes, stop=stop and (stop, signal.SIGTERM))
    assert [line["step"] for line in metrics(elastic)] == list(range(1, STEPS + 1))
    for a, b in zip(metrics(plain), metrics(elastic), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"sample": {"num_images": 2, "num_inference_steps": 2, "sample_every": 2}},
        {"tracking": {"log_every": 3, "report_to": "tensorboard"}},
        {"checkpoint": {"checkpointing_steps": 1}},
    ],
    ids=["sampling", "logging", "saving"],
)
def test_watching_does_not_matter(tmp_path, reference, change):
    cfg = config(tmp_path / "run", **change)
    assert run(cfg) == [0], log(cfg)
    assert state(cfg, STEPS) == reference()[0]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"optimizer": {"learning_rate": 1.01e-3, "lr_warmup_steps": 2}},
        {"data": {"max_train_samples": 19}},
        {"objective": {"kind": "ddpm", "noise_offset": 0.01}},
        {"model": {"dropout": 0.11}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_negative_control_what_matters_is_seen(tmp_path, reference, change):
    cfg = config(tmp_path / "run", **change)
    assert run(cfg) == [0], log(cfg)
    assert state(cfg, STEPS) != reference()[0]


def test_other_settings_are_another_run_unless_they_are_allowed(tmp_path):
    cfg = config(tmp_path / "run", train={"max_train_steps": 2, "global_batch_size": 8})
    assert run(cfg) == [0], log(cfg)
    changed = config(tmp_path / "run", seed=5, model={"layers_per_block": 2})
    assert run(changed) == [2]
    assert "belongs to another run" in log(cfg)
    assert "  model.layers_per_block: 1 -> 2\n  seed: 0 -> 5\nbesides, what is allowed only by allow" in log(cfg)
    shorter = config(tmp_path / "run", train={"max_train_steps": 1, "global_batch_size": 8}, allow_change=["train"])
    assert run(shorter) == [2]
    assert "is past the end of the run, which has 1 steps: raise train.max_train_steps" in log(cfg)

    other = {"optimizer": {"learning_rate": 5e-4, "lr_warmup_steps": 2}, "sample": {"num_images": 3}}
    assert run(config(tmp_path / "run", **other)) == [2]
    assert "--allow_change optimizer.learning_rate train.max_train_steps;" in log(cfg)
    assert last_step(cfg) == 2 and (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir(), "nothing is lost"
    allowed = config(tmp_path / "run", **other, allow_change=["optimizer", "train.max_train_steps"])
    assert run(allowed, body=whole) == [0], log(cfg)
    assert "resumes at step 2, as a changed run (optimizer.learning_rate, train.max_train_steps)" in log(cfg)
    assert "sample.num_images: 2 -> 3" in log(cfg)
    lines = metrics(allowed)
    assert lines[-1]["step"] == STEPS
    schedule = learning_rate(allowed.optimizer, STEPS)
    assert [line["lr"] for line in lines[2:]] == [schedule(step) for step in range(2, STEPS)], "the one asked for"


@pytest.mark.parametrize(
    ("name", "words"),
    [("learning_rat", "did you mean optimizer.learning_rate?"), ("seed", "seed cannot"), ("space", "space cannot")],
)
def test_what_cannot_be_allowed_is_refused_before_training(tmp_path, name, words):
    cfg = config(tmp_path / "run", allow_change=[name])
    assert run(cfg) == [2] and words in log(cfg)


def test_the_promise_is_said_with_its_reason(tmp_path):
    cfg = config(tmp_path / "run")
    assert run(cfg, body=whole, stop=(3, signal.SIGTERM)) == [75], log(cfg)
    assert run(cfg, body=whole, stop=(5, signal.SIGTERM)) == [75], log(cfg)
    assert re.search(r"resumes at step \d, bit for bit\n", log(cfg))
    split = config(tmp_path / "run", train={"gradient_accumulation_steps": 2, "global_batch_size": 8})
    assert run(split, body=whole) == [0], log(cfg)
    assert "but other masks of dropout (accumulation 1 -> 2; micro_batch 8 -> 4)" in log(cfg)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    cfg = config(tmp_path / "run")

    def twice(cfg):
        from finetune import lock
        from finetune.run import train

        with lock.hold(tmp_path / "run"):
            train(cfg)

    assert run(cfg, body=twice) == [2]
    assert "is in use by another run" in log(cfg)


def test_moments_keep_the_memory_format_of_their_weights(tmp_path):
    """A fused step walks raw memory: moments restored in another layout than their weight's would be mixed up."""
    train = {"max_train_steps": 6, "global_batch_size": 8, "channels_last": True}
    straight, stopped = config(tmp_path / "straight", train=train), config(tmp_path / "stopped", train=train)
    assert run(straight) == [0], log(straight)
    assert run(stopped, stop=(3, signal.SIGKILL)) == [-signal.SIGKILL]
    assert run(stopped) == [0], log(stopped)
    assert state(stopped, 6) == state(straight, 6)


def test_going_back_is_never_mixed_with_what_came_after(tmp_path):
    cfg = config(tmp_path / "run", train={"max_train_steps": 4, "global_batch_size": 8})
    assert run(cfg) == [0], log(cfg)
    older = tmp_path / "run" / "checkpoints" / "step-00000002"
    back = replace(cfg, resume_from_checkpoint=str(older))
    assert run(back) == [1]
    assert "holds a newer step 4" in log(cfg)
    other = config(tmp_path / "other", resume_from_checkpoint=str(older), train={"max_train_steps": 4})
    assert run(other) == [0], log(other)
    assert state(other, 4) == state(cfg, 4)


def test_signal_during_the_last_samples_is_heeded(tmp_path):
    slow = {"num_images": 16, "num_inference_steps": 1000}
    cfg = config(tmp_path / "run", train={"max_train_steps": 2, "global_batch_size": 8}, sample=slow)
    assert run(cfg, stop=(2, signal.SIGTERM)) == [75], log(cfg)
    assert "saved at step 2" in log(cfg)


def test_loader_process_that_fails_ends_the_run(tmp_path):
    """With the error's own exit code, at once, although loader processes ignore a first SIGTERM."""
    folder = write_images(tmp_path / "images")
    data = {"dataset_name": None, "train_data_dir": str(folder), "dataloader_num_workers": 1, "max_train_samples": None}
    cfg = config(tmp_path / "run", data=data, conditioning={"kind": "none"}, train={"max_train_steps": 3000})

    def spoiled(cfg):
        trainer = Trainer(cfg)
        for file in folder.glob("*.png"):
            file.unlink()
        trainer.fit()

    assert run(cfg, body=spoiled, seconds=60) == [4], log(cfg)


def write_images(folder):
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8), (25 * i, 0, 0)).save(folder / f"{i}.png")
    return folder

"""The loop: what it counts, what it writes, and what it does with a step that went wrong."""

import json
import math
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from finetune.meter import Meter
from finetune.objective import LossTerms, build_objective
from finetune.tracking import Tracker
from finetune.trainer import Trainer
from forked import last_step, log, metrics, run, state
from tiny import config


class Poisoned:
    """The objective of a config, with a NaN loss in the steps named (counted in batches drawn), on one process."""

    def __init__(self, cfg, at, rank=0):
        self._inner, self._at, self._rank, self._batch = build_objective(cfg.objective, clip_sample=True), at, rank, -1

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def loss(self, network, x0, random):
        self._batch += 1
        terms = self._inner.loss(network, x0, random)
        hit = self._batch in self._at and int(os.environ.get("RANK", 0)) == self._rank
        return replace(terms, per_sample=terms.per_sample * math.nan) if hit else terms


def poisoned(at, rank=0):
    return lambda cfg: Trainer(cfg, objective=Poisoned(cfg, at, rank)).fit()


def test_files_and_numbers_of_a_run(tmp_path):
    cfg = config(tmp_path / "run", sample={"num_images": 2, "num_inference_steps": 2, "sample_every": 4})
    assert run(cfg) == [0], log(cfg)
    files = {p.relative_to(cfg.output_dir).as_posix() for p in Path(cfg.output_dir).rglob("*") if p.is_file()}
    expected = {"config.yaml", "run.json", "metrics.jsonl"}
    expected |= {f"samples/step-{step:08d}.png" for step in (4, 8, 9)}
    parts = [f"{part}.safetensors" for part in ("model", "optimizer", "ema_0.9", "ema_0.5", "data")]
    for step in (8, 9):
        expected |= {f"checkpoints/step-{step:08d}/{name}" for name in (*parts, "state.json", "manifest.json")}
    assert files == expected
    lines = metrics(cfg)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["samples_seen"] for line in lines] == [8 * step for step in range(1, 10)]
    names = {"epoch", "samples_seen", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "peak_memory_mb"}
    assert names <= set(lines[0])
    assert lines[0]["lr"] == 0 and lines[2]["lr"] == 1e-3  # two steps of warm-up
    for line in lines:  # the quarters hold the same losses as the whole
        assert min(q for i in range(4) if (q := line[f"loss_q{i}"]) is not None) <= line["loss"]
    facts = json.loads((Path(cfg.output_dir) / "run.json").read_text())
    assert facts["data_fingerprint"] and facts["versions"]["torch"] == torch.__version__


def test_speed_is_that_of_steps_alone(tmp_path, monkeypatch):
    """What lies between them, such as saving, does not count; waiting for samples does."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    meter = Meter(Accelerator(cpu=True), build_objective(config(tmp_path).objective, clip_sample=True))
    terms = LossTerms(per_sample=torch.ones(4), weight=torch.ones(4), level=torch.zeros(4), terms={})
    batches = meter.waiting(iter(lambda: passes(1.0) or 0, None))
    for _ in range(2):
        next(batches)
        passes(3.0)
        meter.add(terms)
        meter.commit(1.0)
        passes(50.0)
    speed = meter.read()
    assert speed["images_per_second"] == pytest.approx(8 / 8) and speed["data_wait"] == pytest.approx(2 / 8)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk without space is Linux's /dev/full")
def test_a_full_disk_costs_pictures_but_not_the_training(tmp_path):
    sample = {"num_images": 2, "num_inference_steps": 2, "sample_every": 4}
    for last, codes in ((9, [0]), (4, [1])):  # the last picture is a part of the export
        cfg = config(tmp_path / f"run{last}", sample=sample, train={"max_train_steps": last})
        samples = Path(cfg.output_dir) / "samples"
        samples.mkdir(parents=True)
        (samples / "step-00000004.tmp").symlink_to("/dev/full")
        assert run(cfg) == codes, log(cfg)
        assert "No space left on device" in log(cfg) and last_step(cfg) == last
    assert (tmp_path / "run9" / "samples" / "step-00000009.png").stat().st_size > 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk without space is Linux's /dev/full")
def test_a_full_disk_costs_lines_of_metrics_but_not_the_training(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    tracker = Tracker(Accelerator(cpu=True), config(tmp_path / "run"), resumed_step=0)
    lines = tmp_path / "run" / "metrics.jsonl"
    lines.symlink_to("/dev/full")
    tracker.log({"loss": 1.0}, step=1)
    assert "no line of metrics.jsonl at step 1" in caplog.text and "No space left" in caplog.text
    lines.unlink()
    tracker.log({"loss": 2.0}, step=2)
    assert json.loads(lines.read_text()) == {"step": 2, "loss": 2.0}
    assert "metrics.jsonl is written again from step 2" in caplog.text


def test_a_line_of_metrics_is_whole_or_absent(tmp_path, monkeypatch):
    """The disk takes a part of a line, then nothing, then has space again."""
    tracker = Tracker(Accelerator(cpu=True), config(tmp_path / "run"), resumed_step=0)
    (tmp_path / "run").mkdir()
    tracker.log({"loss": 1.0}, step=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, limit[1]))  # bytes: in the middle of the second line
        tracker.log({"loss": 2.0}, step=2)
        tracker.log({"loss": 3.0}, step=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    tracker.log({"loss": 4.0}, step=4)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(tmp_path / "run", tracking={"log_every": 3, "report_to": "tensorboard"})
    assert run(cfg) == [0], log(cfg)
    (file,) = (Path(cfg.output_dir) / "logs" / "finetune").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    logged = [(e.step, e.value) for e in events.Scalars("loss")]
    assert logged == [(line["step"], pytest.approx(line["loss"])) for line in metrics(cfg)]


def test_tensorboard_shows_no_step_twice_after_a_kill(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = {"report_to": "tensorboard"}
    cfg = config(tmp_path / "run", tracking=tracking, checkpoint={"checkpointing_steps": 4})
    assert run(cfg, stop=(6, signal.SIGKILL)) == [-signal.SIGKILL]
    assert run(cfg) == [0], log(cfg)
    folder = Path(cfg.output_dir) / "logs" / "finetune"
    written = [e.step for file in folder.glob("events*") for e in EventAccumulator(str(file)).Reload().Scalars("loss")]
    shown = [e.step for e in EventAccumulator(str(folder)).Reload().Scalars("loss")]
    assert len(written) > len(set(written)), "steps were done again"
    assert shown == list(range(1, 10))


def test_tracker_that_is_not_there_is_refused_before_training(tmp_path):
    for name, message in [("aim", "aim is not installed"), ("tensorbord", "Accelerate knows no tracker 'tensorbord'")]:
        cfg = config(tmp_path / name, tracking={"report_to": name})
        assert run(cfg) == [2]
        assert message in log(cfg)
        assert not (tmp_path / name / "checkpoints").exists()


@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 1)])
def test_nonfinite_step_changes_nothing_but_counters(tmp_path, processes, rank):
    """The run goes on with the next samples; weights, averages, LR and step are those before the bad batch."""
    cfg = config(tmp_path / "run", train={"max_train_steps": 6, "global_batch_size": 8})
    assert run(cfg, processes=processes, body=poisoned({3, 4}, rank)) == [0] * processes, log(cfg)
    lines = metrics(cfg)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["samples_seen"] for line in lines] == [8, 16, 24, 48, 56, 64]
    assert lines[-1]["nonfinite_steps"] == 2
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert "step 3 skipped on all processes: non-finite loss" in log(cfg)
    clean = config(tmp_path / "clean", train={"max_train_steps": 6, "global_batch_size": 8})
    assert run(clean, processes=processes) == [0] * processes
    assert [line["loss"] for line in lines[:3]] == [line["loss"] for line in metrics(clean)[:3]]
    assert [line["lr"] for line in lines] == [line["lr"] for line in metrics(clean)]
    assert state(cfg, 6) != state(clean, 6)


def test_too_many_nonfinite_steps_end_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    train = {"max_train_steps": 6, "global_batch_size": 8, "max_nonfinite_steps": 3}
    cfg = config(tmp_path / "run", train=train)
    assert run(cfg, body=poisoned(set(range(4, 99)))) == [3]
    assert "3 times in a row at step 4" in log(cfg)
    assert last_step(cfg) == 4
    import safetensors.torch

    saved = safetensors.torch.load(state(cfg, 4)["model.safetensors"])
    assert all(t.isfinite().all() for t in saved.values())
    assert run(cfg) == [0], log(cfg)  # the cause removed, the same command goes on


def test_bfloat16_trains_float32_weights(tmp_path):
    cfg = config(tmp_path / "run", train={"max_train_steps": 4, "global_batch_size": 8, "mixed_precision": "bf16"})
    plain = config(tmp_path / "plain", train={"max_train_steps": 4, "global_batch_size": 8})
    assert run(cfg) == [0] and run(plain) == [0], log(cfg)
    import safetensors.torch

    for name, content in state(cfg, 4).items():
        dtype = torch.int64 if name == "data.safetensors" else torch.float32
        assert {t.dtype for t in safetensors.torch.load(content).values()} == {dtype}, name
    losses, reference = [line["loss"] for line in metrics(cfg)], [line["loss"] for line in metrics(plain)]
    assert losses == pytest.approx(reference, rel=0.02)
    assert losses != reference


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "channels_last"])
def test_levers_leave_the_losses_alone(tmp_path, setting):
    train = {"max_train_steps": 4, "global_batch_size": 8}
    plain = config(tmp_path / "plain", train=train, model={"dropout": 0.0})
    with_it = config(tmp_path / "with", train={**train, setting: True}, model={"dropout": 0.0})
    assert run(plain) == [0] and run(with_it) == [0], log(with_it)
    assert [line["loss"] for line in metrics(with_it)] == pytest.approx([x["loss"] for x in metrics(plain)], rel=1e-4)


def test_gradient_clipping_bounds_the_update(tmp_path):
    train = {"max_train_steps": 3, "global_batch_size": 8, "max_grad_norm": 1e-6}
    optimizer = {"learning_rate": 1e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0, "adam_epsilon": 1.0}
    cfg = config(tmp_path / "run", train=train, optimizer=optimizer)
    free = config(tmp_path / "free", train={**train, "max_grad_norm": 0}, optimizer=optimizer)

    def moved(cfg):
        trainer = Trainer(cfg)
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        trainer.fit()
        change = max((p - before[name]).abs().max() for name, p in trainer.parameters.items())
        print(f"moved {float(change):.3e}")

    assert run(cfg, body=moved) == [0] and run(free, body=moved) == [0], log(cfg)

    def largest(cfg):
        return float(log(cfg).rsplit("moved ", 1)[1].split()[0])

    assert largest(cfg) < 1e-7 < largest(free)
    assert all(line["grad_norm"] > 1e-3 for line in metrics(cfg))  # logged before clipping


def test_fp16_without_a_gpu_is_refused_not_ignored(tmp_path):
    cfg = config(tmp_path / "run", train={"mixed_precision": "fp16"})
    assert run(cfg) == [2]
    assert "fp16 needs a GPU, and there is none here: use bf16 or no" in log(cfg)

"""Numbers that are not finite, wherever they come from: nothing moves but the counters, and nothing of it is kept."""

import math
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

import finetune.stepping
from finetune import run as whole
from finetune.errors import NonFiniteError
from finetune.meter import Meter
from finetune.trainer import Trainer
from forked import log, metrics, run, state
from test_trainer import Poisoned
from tiny import ROOT, config

SHORT = {"max_train_steps": 4, "global_batch_size": 8, "max_nonfinite_steps": 3}


def flat(trainer):
    """Everything that a step may change, as numbers; without the counters of batches and skips."""
    parts = trainer.state.parts()
    found = {f"{part}/{name}": t.detach().clone() for part, tensors in parts.items() for name, t in tensors.items()}
    return found, trainer.step, trainer.ema.updates


def same(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


def steps(trainer, n):
    batches, meter = iter(trainer.loader()), Meter(trainer.accelerator, trainer.modules.objective)
    return [trainer.train_step(batches, meter) for _ in range(n)]


def poison_gradient(trainer, at, value=math.nan, rank=0):
    """The gradient of one process becomes `value` in the backward passes named."""
    first, calls = next(iter(trainer.parameters.values())), []

    def hook(grad):
        calls.append(1)
        hit = len(calls) - 1 in at and trainer.accelerator.process_index == rank
        return torch.full_like(grad, value) if hit else grad

    first.register_hook(hook)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 1)])
def test_gradient_of_one_process(tmp_path, processes, rank, value):
    cfg = config(tmp_path / "run", train=SHORT, model={"dropout": 0.0})

    def body(cfg):
        trainer = Trainer(cfg)
        poison_gradient(trainer, {1}, value, rank)
        assert steps(trainer, 1) == [True]
        before = flat(trainer)
        assert steps(trainer, 1) == [False] and same(before, flat(trainer))
        assert (trainer.state.batches, trainer.state.nonfinite_steps, trainer.state.nonfinite_in_a_row) == (2, 1, 1)
        assert steps(trainer, 1) == [True] and not same(before, flat(trainer))
        assert all(t.isfinite().all() for t in flat(trainer)[0].values())

    assert run(cfg, processes=processes, body=body) == [0] * processes, log(cfg)


def test_negative_control_without_the_check_the_weights_are_lost(tmp_path):
    cfg = config(tmp_path / "run", train=SHORT)

    def body(cfg):
        finetune.stepping.step_if_finite = lambda optimizer, _: optimizer.step()
        trainer = Trainer(cfg)
        poison_gradient(trainer, {1})
        steps(trainer, 2)
        assert not all(t.isfinite().all() for t in flat(trainer)[0].values())

    assert run(cfg, body=body) == [0], log(cfg)


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_x0_that_is_not_finite_names_its_rows(tmp_path, kind):
    """An overflow of the VAE, in one process of two."""
    sections = {"space": {"kind": "latent", "vae": str(ROOT / "assets" / "vae")}} if kind == "latent" else {}
    cfg = config(tmp_path / "run", train=SHORT, **sections)

    def body(cfg):
        trainer = Trainer(cfg)
        encode = trainer.modules.space.encode

        def overflowing(pixels, random):
            x0 = encode(pixels, random)
            if trainer.accelerator.process_index == 1:
                x0[1] = math.inf
            return x0

        trainer.modules.space.encode = overflowing
        if trainer.accelerator.process_index == 1:
            (tmp_path / "bad").write_text(str(int(next(iter(trainer.loader())).rows[1])))
        trainer.fit()

    assert run(cfg, processes=2, body=body) == [3, 3], log(cfg)
    row = (tmp_path / "bad").read_text()
    what = f"non-finite latents from the VAE {cfg.space.vae}" if kind == "latent" else "non-finite pixels"
    assert f"step 0 skipped on all processes: {what} (rows {row})" in log(cfg)
    assert kind == "pixel" or "run the VAE in float32" in log(cfg)


def scaled(trainer, scale=2.0**16):
    """The trainer as it is on a GPU in fp16: Accelerate refuses fp16 on CPUs, torch's scaler works there."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    trainer.accelerator.scaler = trainer.state._scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, device_placement=False, scaler=scaler)
    trainer.accelerator._optimizers = [trainer.optimizer]
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    return trainer


@pytest.mark.parametrize("processes", [1, 2])
def test_overflow_of_the_fp16_scaler_is_skipped_and_not_counted(tmp_path, processes):
    cfg = config(tmp_path / "run", train=SHORT | {"max_nonfinite_steps": 2}, model={"dropout": 0.0})

    def body(cfg):
        trainer = scaled(Trainer(cfg))
        poison_gradient(trainer, {1, 2, 3}, math.inf, rank=processes - 1)
        assert steps(trainer, 1) == [True]
        before, rate = flat(trainer), trainer.optimizer.param_groups[0]["lr"]
        assert steps(trainer, 3) == [False] * 3  # more than max_nonfinite_steps: an overflow is no error
        assert same(before, flat(trainer))
        assert trainer.state.nonfinite_steps == 0
        assert trainer.accelerator.scaler.get_scale() == 2.0**13
        assert steps(trainer, 1) == [True] and not same(before, flat(trainer))
        assert trainer.optimizer.param_groups[0]["lr"] == trainer.learning_rate(1) != rate

    assert run(cfg, processes=processes, body=body) == [0] * processes, log(cfg)


def test_scaler_changes_no_update(tmp_path):
    cfg = config(tmp_path / "run", train=SHORT, model={"dropout": 0.0})

    def body(cfg):
        plain = Trainer(cfg)
        steps(plain, 3)
        with_scaler = Trainer(cfg)
        steps(scaled(with_scaler), 3)
        for name, tensor in flat(plain)[0].items():
            torch.testing.assert_close(flat(with_scaler)[0][name], tensor, rtol=1e-4, atol=1e-6)

    assert run(cfg, body=body) == [0], log(cfg)


@pytest.mark.parametrize("cause", ["loss", "scale"])
def test_scaler_does_not_hide_a_run_that_diverged(tmp_path, cause):
    """A loss that is not finite counts, as does an overflow that the smallest scale does not help against."""
    cfg = config(tmp_path / "run", train=SHORT)

    def body(cfg):
        objective = Poisoned(cfg, set(range(2, 99))) if cause == "loss" else None
        trainer = scaled(Trainer(cfg, objective=objective), scale=1.0 if cause == "scale" else 2.0**16)
        if cause == "scale":
            poison_gradient(trainer, set(range(2, 99)), math.inf)
        trainer.fit()

    assert run(cfg, body=body) == [3], log(cfg)
    assert metrics(cfg)[-1]["step"] == 2 and all(math.isfinite(line["loss"]) for line in metrics(cfg))
    assert [p.name for p in (Path(cfg.output_dir) / "checkpoints").iterdir()] == ["step-00000002"]
    assert state(cfg, 2)


def test_nothing_that_is_not_finite_is_exported(tmp_path):
    cfg = config(tmp_path / "run", train={"max_train_steps": 1, "global_batch_size": 8})

    def body(cfg):
        real = Trainer.fit

        def spoiled(trainer):
            real(trainer)
            next(iter(trainer.ema.averages["ema_0.9"].values())).flatten()[0] = math.nan

        Trainer.fit = spoiled
        whole.train(cfg)

    assert run(cfg, body=body) == [NonFiniteError.exit_code], log(cfg)
    assert "is NaN or infinite, so the model is not exported" in log(cfg)
    assert not (Path(cfg.output_dir) / "pipeline").exists()

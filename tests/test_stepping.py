"""When the host learns whether a step was taken, and steps taken in the backward pass: nothing else changes."""

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.errors import DataError
from finetune.meter import Meter
from finetune.trainer import Trainer
from forked import log, metrics, run, state
from test_numerics import flat, poison_gradient, same
from test_objective_levels import IMPORTANCE
from test_text_training import text_config
from test_trainer import Poisoned
from tiny import config
from tiny_models import parts  # noqa: F401

RARELY = {"tracking": {"log_every": 100}, "checkpoint": {"checkpointing_steps": 100}}


def checkpoints(cfg):
    return sorted(path.name for path in (Path(cfg.output_dir) / "checkpoints").iterdir())


def facts(cfg, step):
    return json.loads((Path(cfg.output_dir) / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def skips(cfg):
    return re.findall("step [0-9]+ skipped.*", log(cfg))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_told_late_is_the_run_that_is_told_at_once(tmp_path, processes):
    """With steps that are not taken: weights, moments, averages, counters, words, learning rates are the same bits."""

    def body(cfg):
        Trainer(cfg, objective=Poisoned(cfg, {0, 3, 4, 8}, rank=processes - 1)).fit()

    sections = {"model": {"dropout": 0.0}, "checkpoint": {"checkpointing_steps": 9}}
    late, at_once = (
        config(tmp_path / name, tracking={"log_every": every}, **sections)
        for name, every in (("late", 4), ("at_once", 1))
    )
    for cfg in (late, at_once):
        assert run(cfg, processes=processes, body=body) == [0] * processes, log(cfg)
    assert state(late, 9) == state(at_once, 9)
    counters = ("step", "batches", "nonfinite_steps", "nonfinite_in_a_row", "ema_updates", "samples_seen")
    kept = [[facts(cfg, 9)[name] for name in counters] for cfg in (late, at_once)]
    assert kept[0] == kept[1] and kept[0][:4] == [9, 13, 4, 0]
    assert skips(late) == skips(at_once) and len(skips(late)) == 4
    lines = {line["step"]: line for line in metrics(at_once)}
    assert [line["step"] for line in metrics(late)] == [4, 8, 9]
    for line in metrics(late):
        told = lines[line["step"]]
        assert all(line[name] == told[name] for name in ("lr", "grad_norm", "samples_seen", "nonfinite_steps"))
    mean = sum(lines[step]["loss"] for step in range(1, 5)) / 4
    assert metrics(late)[0]["loss"] == pytest.approx(mean, rel=1e-6)


class Waits(TorchDispatchMode):
    """Stands for a device: what is computed from weights or x0 is on it, and each value of it that the host asks for
    is noted with the call of train_step in which it was computed and in which it is asked for."""

    ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self, trainer):
        super().__init__()
        self.call, self.seen = 0, []
        for tensor in (*trainer.modules.unet.parameters(), *trainer.modules.unet.buffers()):
            tensor.made_in = 0
        encode, tolist = trainer.modules.space.x0, torch.Tensor.tolist

        def x0(*args):
            found = encode(*args)
            found.made_in = self.call
            return found

        def asked(tensor):
            self.note(tensor)
            return tolist(tensor)

        trainer.modules.space.x0, torch.Tensor.tolist = x0, asked

    def note(self, tensor):
        if hasattr(tensor, "made_in"):
            self.seen.append((tensor.made_in, self.call))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if hasattr(t, "made_in")]
        if function.overloadpacket.__name__ in self.ASKING:
            [self.note(tensor) for tensor in given]
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out) if given else ():
            if isinstance(tensor, torch.Tensor):
                tensor.made_in = self.call
        return out


def waits(trainer, calls):
    """[(made in, asked for in)] over so many calls of train_step, counted from 1."""
    meter = Meter(trainer.accelerator, trainer.modules.objective)
    batches = meter.waiting(iter(trainer.loader()))
    with Waits(trainer) as found:
        for found.call in range(1, calls + 1):
            trainer.train_step(batches, meter)
    return found.seen


def test_between_two_lines_the_host_waits_for_nothing_of_the_step_under_way(tmp_path):
    """It asks for the last step's norm when that of the next is queued. Where it must know at once, it does."""
    train = {"global_batch_size": 8, "max_train_steps": 100, "gradient_accumulation_steps": 2}
    cases = {"late": {}, "at_once": {"tracking": {"log_every": 1}}, "learns": IMPORTANCE}
    cases["another"] = {"optimizer": {"kind": "lion", "lr_scheduler": "constant", "lr_warmup_steps": 0}}

    def body(cfg):
        late = Path(cfg.output_dir).name == "late"
        found = waits(Trainer(cfg), 7 if late else 3)
        at_once = [(made, asked) for made, asked in found if made == asked]
        if late:
            assert set(at_once) == {(1, 1), (4, 4)}, found  # the first step, and one that is logged
            assert [pair for pair in found if pair not in at_once] == [(2, 3), (3, 4), (5, 6), (6, 7)], found
        else:
            assert {call for _, call in at_once} == {1, 2, 3}, f"negative control: {found}"

    for name, sections in cases.items():
        sections = {"tracking": {"log_every": 4}, "checkpoint": {"checkpointing_steps": 100}, "train": train} | sections
        cfg = config(tmp_path / name, **sections)
        assert run(cfg, body=body) == [0], log(cfg)


def before_step(n, act, rank=0):
    """A `body`: one process acts before the call of train_step after n others."""

    def body(cfg):
        trainer, calls = Trainer(cfg), []
        step = trainer.train_step

        def then(*args):
            if len(calls) == n and trainer.accelerator.process_index == rank:
                act()
            calls.append(1)
            return step(*args)

        trainer.train_step = then
        trainer.fit()

    return body


@pytest.mark.parametrize(("processes", "stopped"), [(1, 4), (2, 5)])
def test_a_signal_stops_all_after_the_same_step(tmp_path, processes, stopped):
    """One process at once; several when all have been told, a step later."""
    cfg = config(tmp_path / "run", **RARELY)
    body = before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM), rank=processes - 1)
    assert run(cfg, processes=processes, body=body) == [75] * processes, log(cfg)
    assert checkpoints(cfg) == [f"step-{stopped:08d}"] and f"saved at step {stopped}" in log(cfg)


def fail():
    raise DataError("no more data")


def test_an_error_loses_no_step_that_was_not_told_yet(tmp_path):
    often = RARELY | {"checkpoint": {"checkpointing_steps": 3}}
    cfg, through = config(tmp_path / "run", **RARELY), config(tmp_path / "through", **often)
    assert run(cfg, body=before_step(3, fail)) == [4] and checkpoints(cfg) == ["step-00000003"], log(cfg)
    assert "process 0 of 1, step 4, rows " in log(cfg)
    assert run(through, body=before_step(6, fail)) == [4] and state(cfg, 3) == state(through, 3), log(through)


def test_one_too_many_steps_that_are_not_finite_end_the_run_at_that_step(tmp_path):
    """Also when the next step would have failed for another reason, before the host was told."""

    def body(cfg):
        trainer = Trainer(cfg, objective=Poisoned(cfg, set(range(4, 99))))
        step, calls = trainer.train_step, []

        def then(*args):
            calls.append(1)
            return fail() if len(calls) == 8 else step(*args)

        trainer.train_step = then
        trainer.fit()

    for most, codes, said in ((3, [3], "3 times in a row at step 4"), (4, [4], "no more data")):
        cfg = config(tmp_path / f"run{most}", **RARELY, train={"max_nonfinite_steps": most, "global_batch_size": 8})
        assert run(cfg, body=body) == codes and said in log(cfg), log(cfg)
        assert most == 4 or not (Path(cfg.output_dir) / "checkpoints").exists()
        assert len(skips(cfg)) == 3
    saved = facts(config(tmp_path / "run4"), 4)
    assert [saved[name] for name in ("batches", "nonfinite_steps", "nonfinite_in_a_row")] == [7, 3, 3]


# ------------------------------------------------------------------------------------------- in the backward pass

FUSED = {"max_train_steps": 6, "global_batch_size": 8, "max_grad_norm": 0}
OPTIMIZERS = {
    "adamw": {},
    "adafactor": {"optimizer": {"kind": "adafactor", "beta1": 0.9, "lr_warmup_steps": 1}},
    "lion": {"optimizer": {"kind": "lion", "weight_decay": 0.1, "lr_warmup_steps": 1}},
    "lora": {"lora": {"rank": 2}},
    "learned": {"objective": {"kind": "edm", "weighting": {"kind": "uncertainty", "fourier_channels": 8}}},
}


def grads(trainer):
    return [name for name, p in trainer.parameters.items() if p.grad is not None]


def steps(trainer, n):
    meter = Meter(trainer.accelerator, trainer.modules.objective)
    batches = meter.waiting(iter(trainer.loader()))
    return [(trainer.train_step(batches, meter), meter.read()["grad_norm"]) for _ in range(n)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_in_the_backward_pass_is_the_step_after_it(tmp_path, kind):
    def make(name, **train):
        train = FUSED | train | {"gradient_checkpointing": kind == "adafactor"}
        return config(tmp_path / name, train=train, **OPTIMIZERS[kind])

    def body(cfg):
        after, within = Trainer(make("after")), Trainer(make("within", fused_backward=True))
        assert steps(after, 3) == steps(within, 3) and same(flat(after), flat(within))
        if kind == "adamw":
            clipped = Trainer(make("clipped", max_grad_norm=0.01))
            steps(clipped, 3)
            assert not same(flat(after), flat(clipped)), "negative control"
            within.save(required=True)  # the setting may change at a resume, to and fro
            changed = Trainer(make("within"))
            assert changed.step == 3 and steps(changed, 1) == steps(after, 1) and same(flat(after), flat(changed))

    cfg = make("run")
    assert run(cfg, body=body) == [0], log(cfg)


def test_text_encoders_take_their_steps_in_it_too(parts, tmp_path):  # noqa: F811
    def body(cfg):
        optimizer = {"text_encoder_lr": 1e-4, "lr_warmup_steps": 0}
        ways = {"after": FUSED, "within": FUSED | {"fused_backward": True}}
        after, within = (
            Trainer(text_config(parts, tmp_path / name, train=train, optimizer=optimizer))
            for name, train in ways.items()
        )
        before = after.modules.text["text_encoder.final_layer_norm.weight"].clone()
        assert steps(after, 2) == steps(within, 2) and same(flat(after), flat(within))
        assert not torch.equal(before, within.modules.text["text_encoder.final_layer_norm.weight"])

    cfg = config(tmp_path / "run")
    assert run(cfg, body=body) == [0], log(cfg)


def test_of_all_gradients_one_is_in_memory(tmp_path):
    def body(cfg):
        trainer, most = Trainer(cfg), []
        for parameter in trainer.parameters.values():
            parameter.register_post_accumulate_grad_hook(lambda _: most.append(len(grads(trainer))))
        meter = Meter(trainer.accelerator, trainer.modules.objective)
        assert trainer.train_step(meter.waiting(iter(trainer.loader())), meter)
        assert max(most) == (0 if cfg.train.fused_backward else len(trainer.parameters)), most

    for fused in (True, False):  # the last as negative control
        cfg = config(tmp_path / f"{fused}", train=FUSED | {"fused_backward": fused})
        assert run(cfg, body=body) == [0], log(cfg)


def test_a_loss_that_is_not_finite_is_seen_before_the_backward_pass(tmp_path):
    def body(cfg):
        trainer = Trainer(cfg, objective=Poisoned(cfg, {1}))
        meter = Meter(trainer.accelerator, trainer.modules.objective)
        batches = meter.waiting(iter(trainer.loader()))
        assert trainer.train_step(batches, meter)
        before = flat(trainer)
        assert not trainer.train_step(batches, meter) and same(before, flat(trainer))
        assert trainer.state.nonfinite_steps == 1 and trainer.whole
        assert trainer.train_step(batches, meter) and not same(before, flat(trainer))

    cfg = config(tmp_path / "run", train=FUSED | {"fused_backward": True})
    assert run(cfg, body=body) == [0], log(cfg)
    assert "step 1 skipped on all processes: non-finite loss" in log(cfg)


@pytest.mark.parametrize("saved", [True, False])
def test_a_gradient_that_is_not_finite_ends_the_run_and_nothing_of_it_is_saved(tmp_path, saved):
    def body(cfg):
        trainer = Trainer(cfg)
        poison_gradient(trainer, {4}, math.inf)
        trainer.fit()

    every = {"checkpointing_steps": 2 if saved else 100}
    cfg = config(tmp_path / "run", train=FUSED | {"fused_backward": True}, checkpoint=every)
    assert run(cfg, body=body) == [3], log(cfg)
    assert "the gradient norm of step 5 was" in log(cfg) and "although its loss was finite" in log(cfg)
    root = Path(cfg.output_dir) / "checkpoints"
    if not saved:
        assert not root.exists() and "there is no checkpoint yet" in log(cfg)
        return
    assert checkpoints(cfg) == ["step-00000002", "step-00000004"]
    assert f"the same command goes on from {root / 'step-00000004'}" in log(cfg)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"train": {"max_grad_norm": 1.0}}, "train.max_grad_norm: 1 needs the norm of all gradients.*: use 0"),
        ({"train": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps: 2 add up gradients.*: use 1"),
        ({"train": {"mixed_precision": "fp16"}}, "train.mixed_precision: fp16 looks for .*: use bf16 or no"),
        ({"optimizer": {"kind": "prodigy", "learning_rate": 1}}, "optimizer.kind: a step of prodigy needs all"),
    ],
)
def test_what_needs_all_gradients_is_refused(tmp_path, sections, problem):
    fused = FUSED | {"fused_backward": True}
    with pytest.raises(ValueError, match=problem):
        config(tmp_path, **sections | {"train": fused | sections.get("train", {})})
    config(tmp_path, **sections | {"train": FUSED | sections.get("train", {})})  # negative control


def test_processes_and_accumulation_of_the_launcher_are_refused(tmp_path):
    cfg = config(tmp_path / "run", train=FUSED | {"fused_backward": True})
    assert run(cfg, processes=2) == [2, 2] and "averaged over 2 processes: launch one process" in log(cfg)
    from finetune.config_launch import ACCUMULATION, launch_settings
    from finetune.errors import ConfigError

    with pytest.raises(ConfigError, match="train.gradient_accumulation_steps: 4 add up gradients"):
        launch_settings(cfg, {ACCUMULATION: "4"})

"""The learning rate is diffusers' schedule as a pure function of the optimizer step; optimizers and their state."""

import re
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import matplotlib.backends.backend_agg  # noqa: F401  imported here for the forked children
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from pydantic import TypeAdapter

from finetune import checkpoint
from finetune.conditioning import Unconditional
from finetune.config import AdamW, Optimizer
from finetune.evaluate import load_subject
from finetune.modules import Modules
from finetune.optimization import (
    PACKAGES,
    build_optimizer,
    evaluation_weights,
    learning_rate,
    schedule_free_average,
)
from finetune.trainer import Trainer
from finetune.training_state import TrainingState, optimizer_tensors
from forked import log, run, whole
from golden_numbers import arrays, compare
from tiny import ROOT, config


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("cosine", {}),
        ("linear", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_restarts", {"lr_num_cycles": 3}),
        ("polynomial", {"lr_power": 2.0}),
    ],
)
def test_equals_the_stepped_scheduler(name, extra):
    cfg = AdamW(learning_rate=3e-4, lr_scheduler=name, lr_warmup_steps=5, **extra)
    optimizer = torch.optim.SGD([torch.zeros(())], lr=3e-4)
    arguments = {key.removeprefix("lr_"): value for key, value in extra.items()}
    stepped = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=20, **arguments)
    at = learning_rate(cfg, 20)
    for step in range(20):
        assert at(step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        stepped.step()
    assert at(19) == at(19)


def test_peak_and_end():
    at = learning_rate(AdamW(learning_rate=1.0, lr_scheduler="cosine", lr_warmup_steps=5), 20)
    assert [at(0), at(5)] == [0.0, 1.0]
    assert at(20) == pytest.approx(0, abs=1e-12)


def test_constant_refuses_a_warmup_that_it_would_ignore():
    with pytest.raises(ValueError, match="use constant_with_warmup, or set lr_warmup_steps to 0"):
        AdamW(lr_scheduler="constant", lr_warmup_steps=500)


def test_adamw_is_fused_with_the_configured_numbers():
    (group,) = build_optimizer(AdamW(adam_beta1=0.8), [torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["fused"], group["betas"], group["weight_decay"]) == (True, (0.8, 0.999), 1e-6)


def test_schedules_of_generative_models():
    """Theirs starts at lr_start and ends at lr_min, ours at 0: compared is what is between, as a share of it."""
    file, data = "sgm_ema_lr", arrays("sgm_ema_lr")
    constant = learning_rate(AdamW(learning_rate=1, lr_scheduler="constant_with_warmup", lr_warmup_steps=10000), 1)
    # That of its example configurations starts at 1e-6, ours at 0.
    compare(file, "sgm_config_lr", [constant(n) for n in data["sgm_config_lr_at"]], rtol=2e-6, floor=1)
    key = "LambdaWarmUpCosine_5_0.1_1_0.01_30"
    cosine = learning_rate(AdamW(learning_rate=1, lr_scheduler="cosine", lr_warmup_steps=5), 30)
    compare(file, key, [cosine(n) for n in range(5)], (data[key][:5] - 0.01) / 0.99, rtol=1e-12)
    compare(file, key, [cosine(n) for n in range(5, 31)], (data[key][5:31] - 0.1) / 0.9, rtol=1e-12, floor=1)
    other = learning_rate(AdamW(learning_rate=1, lr_scheduler="cosine", lr_warmup_steps=5), 31)
    assert other(18) != pytest.approx((data[key][18] - 0.1) / 0.9, rel=0.01)


KINDS = ["adamw", "adamw_8bit", "adafactor", "lion", "prodigy", "schedule_free_adamw"]
EXTRA = {"lion": {"weight_decay": 0.1}, "prodigy": {"d_coef": 100.0}, "schedule_free_adamw": {"adam_weight_decay": 0.1}}


def settings(kind, **values):
    schedule = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    return TypeAdapter(Optimizer).validate_python({"kind": kind, **schedule, **EXTRA.get(kind, {}), **values})


class Tiny:
    """A training of three layers, one of which starts at zero, with 5,000 weights (bitsandbytes leaves less alone)."""

    def __init__(self, cfg):
        torch.manual_seed(0)
        self.unet = torch.nn.Sequential(
            torch.nn.Conv2d(3, 40, 3), torch.nn.SiLU(), torch.nn.Conv2d(40, 16, 3), torch.nn.Linear(4, 4)
        )
        torch.nn.init.zeros_(self.unet[3].weight)
        self.optimizer = build_optimizer(cfg, self.unet.parameters())
        objective = SimpleNamespace(parameters=dict, state_dict=dict)
        modules = Modules(space=None, conditioner=Unconditional(), objective=objective, unet=self.unet)
        self.state = TrainingState(modules, self.optimizer, ema=None, scaler=None)
        self.rate = learning_rate(cfg, 20)

    def steps(self, first, last):
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step) * (0 if step == 0 else 1 / (1 + step))  # a warm-up begins at 0
            torch.manual_seed(step)
            (self.unet(torch.randn(4, 3, 8, 8)) - 1).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.step += 1

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.unet.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_goes_on_bit_for_bit(tmp_path, kind):
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    cfg = settings(kind)
    through, half = Tiny(cfg), Tiny(cfg)
    through.steps(0, 12)
    half.steps(0, 6)
    found = checkpoint.load(checkpoint.save(tmp_path, parts=half.state.parts(), state=half.state.facts()))
    resumed = Tiny(cfg)
    resumed.state.load(found)
    kept, back = half.state.parts()["optimizer"], resumed.state.parts()["optimizer"]
    assert kept.keys() == back.keys() and all(torch.equal(back[name], kept[name]) for name in kept)
    resumed.steps(6, 12)
    assert torch.equal(resumed.weights(), through.weights())

    forgotten = Tiny(cfg)  # negative control: the state of the optimizer is what does it
    forgotten.unet.load_state_dict(found.tensors("model"))
    forgotten.steps(6, 12)
    assert not torch.equal(forgotten.weights(), through.weights())


def test_what_prodigy_found_is_state_and_its_settings_are_not(tmp_path):
    """Its estimate stands among the hyperparameters of the group; one that is changed for the resume stays changed."""
    cfg = settings("prodigy")
    run = Tiny(cfg)
    run.steps(0, 6)
    (group,) = run.optimizer.param_groups
    assert group["d"] > group["d0"], "the estimate has not grown: nothing is tested"
    found = checkpoint.load(checkpoint.save(tmp_path, parts=run.state.parts(), state=run.state.facts()))
    changed = Tiny(settings("prodigy", adam_weight_decay=0.25, d_coef=2.0))
    changed.state.load(found)
    (after,) = changed.optimizer.param_groups
    assert (after["d"], after["d_max"], after["d_numerator"], after["k"]) == (
        group["d"], group["d_max"], group["d_numerator"], group["k"]
    )  # fmt: skip
    assert (after["weight_decay"], after["d_coef"]) == (0.25, 2.0)


def test_adamw_is_torchs_to_the_bit():
    cfg = settings("adamw")
    run, by_hand = Tiny(cfg), Tiny(cfg)
    by_hand.optimizer = torch.optim.AdamW(
        by_hand.unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=True
    )
    run.steps(0, 5), by_hand.steps(0, 5)
    assert torch.equal(run.weights(), by_hand.weights())
    assert set(optimizer_tensors(run.optimizer, dict.fromkeys(run.unet.parameters(), "p"))) == {
        "p/step", "p/exp_avg", "p/exp_avg_sq"
    }  # fmt: skip


def test_adafactor_and_lion_take_the_step_of_their_papers():
    """One step on a matrix: Shazeer & Stern 2018, algorithm 4, whose decay is 0 at step 1; Chen et al. 2023."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(5, 3), torch.randn(5, 3)

    def stepped(cfg):
        parameter = torch.nn.Parameter(weight.clone())
        optimizer = build_optimizer(cfg, [parameter])
        parameter.grad = gradient.clone()
        optimizer.step()
        return parameter.detach()

    squares = gradient**2 + 1e-30
    rows, columns = squares.mean(1), squares.mean(0)
    update = gradient / (rows[:, None] * columns[None] / rows.mean()).sqrt()
    update /= max(1.0, float(update.square().mean().sqrt()))
    adafactor = stepped(settings("adafactor", learning_rate=0.01))
    torch.testing.assert_close(adafactor, weight - 0.01 * update)  # no scale by the weights, no relative step
    lion = stepped(settings("lion", learning_rate=0.01, weight_decay=0.5))
    torch.testing.assert_close(lion, weight * (1 - 0.01 * 0.5) - 0.01 * gradient.sign())
    assert not torch.allclose(lion, adafactor, atol=1e-3)  # negative control


def test_the_average_of_schedule_free_is_shown_and_the_training_goes_on_as_if_it_had_not_been(tmp_path):
    cfg = settings("schedule_free_adamw", learning_rate=0.1)
    seen, unseen = Tiny(cfg), Tiny(cfg)
    seen.steps(0, 6), unseen.steps(0, 6)
    trained = seen.weights()
    with evaluation_weights(seen.optimizer):
        average = seen.weights()
    assert torch.equal(seen.weights(), trained) and not torch.allclose(average, trained)
    seen.steps(6, 12), unseen.steps(6, 12)
    assert torch.equal(seen.weights(), unseen.weights())
    unseen.optimizer.eval(), unseen.optimizer.train()  # negative control: the library's own way back rounds
    assert not torch.equal(seen.weights(), unseen.weights())

    parts = seen.state.parts()
    with evaluation_weights(seen.optimizer):
        average = seen.weights()
    from_checkpoint = schedule_free_average(seen.unet.state_dict(), parts["optimizer"], 0.9)
    torch.testing.assert_close(torch.cat([t.flatten() for t in from_checkpoint.values()]), average)

    plain = Tiny(settings("adamw"))
    weights = plain.weights()
    with evaluation_weights(plain.optimizer):
        assert torch.equal(plain.weights(), weights)


class Uninstalled(PathFinder):
    """Finds modules as Python does, but for a package that is as if it were not there."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "prodigyopt" else PathFinder.find_spec(name, path, target)


def without_prodigy(cfg):
    sys.meta_path[sys.meta_path.index(PathFinder)] = Uninstalled
    sys.modules.pop("prodigyopt", None)
    Trainer(cfg)


def test_an_absent_package_is_refused_with_what_to_install(tmp_path):
    optimizer = {"kind": "prodigy", "learning_rate": 1}
    cfg = config(tmp_path / "run", optimizer=optimizer, data={"dataset_name": str(tmp_path / "none")})
    assert run(cfg, body=without_prodigy) == [2]
    said = "optimizer.kind prodigy needs a package that is not installed: pip install prodigyopt"
    assert log(cfg).strip().splitlines()[-1] == said  # before the data, which are not there, are looked for
    there = config(tmp_path / "there", optimizer=optimizer, data={"dataset_name": str(tmp_path / "none")})
    assert run(there, body=Trainer) == [4] and "no such file" in log(there), "negative control: it is installed here"


def test_packages_are_those_of_the_extra():
    pyproject = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^optimizers = \[(.+)\]$", pyproject, re.M)
    assert set(re.findall(r'"([\w-]+)>=', extra)) == set(PACKAGES.values())


def test_a_schedule_free_run_exports_and_measures_its_average(tmp_path):
    """Through the whole run, with pictures on the way: a resumed one comes to the same bits, and all mean one model."""
    optimizer = {"kind": "schedule_free_adamw", "learning_rate": 0.03, "lr_scheduler": "constant_with_warmup"}
    free = {"optimizer": optimizer, "ema": {"use_ema": False}, "sample": {"num_images": 2, "num_inference_steps": 2}}
    through = config(tmp_path / "through", **free)
    assert run(through, body=whole) == [0], log(through)
    stopped = {**free, "sample": {**free["sample"], "sample_every": 1}}
    resumed = config(tmp_path / "resumed", **stopped)
    assert run(resumed, stop=(5, signal.SIGTERM)) == [75], log(resumed)
    assert run(resumed) == [0], log(resumed)
    last = [checkpoint.latest(Path(cfg.output_dir) / "checkpoints") for cfg in (through, resumed)]
    trained, again = (found.tensors("model") for found in last)
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())

    exported = UNet2DModel.from_pretrained(Path(through.output_dir) / "pipeline" / "unet").state_dict()
    measured = load_subject(Path(through.output_dir)).unet.state_dict()
    for name, tensor in exported.items():
        torch.testing.assert_close(measured[name], tensor)
    assert not torch.allclose(trained["conv_in.weight"], exported["conv_in.weight"]), "negative control"
    weights = load_subject(Path(through.output_dir), average="weights").unet.state_dict()
    assert torch.equal(weights["conv_in.weight"], trained["conv_in.weight"])

"""The learning rate is diffusers' schedule as a pure function of the optimizer step."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from finetune.config import Optimizer
from finetune.optimization import build_optimizer, learning_rate
from golden_numbers import arrays, compare


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
    cfg = Optimizer(learning_rate=3e-4, lr_scheduler=name, lr_warmup_steps=5, **extra)
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
    at = learning_rate(Optimizer(learning_rate=1.0, lr_scheduler="cosine", lr_warmup_steps=5), 20)
    assert [at(0), at(5)] == [0.0, 1.0]
    assert at(20) == pytest.approx(0, abs=1e-12)


def test_constant_refuses_a_warmup_that_it_would_ignore():
    with pytest.raises(ValueError, match="use constant_with_warmup, or set lr_warmup_steps to 0"):
        Optimizer(lr_scheduler="constant", lr_warmup_steps=500)


def test_adamw_is_fused_with_the_configured_numbers():
    (group,) = build_optimizer(Optimizer(adam_beta1=0.8), [torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["fused"], group["betas"], group["weight_decay"]) == (True, (0.8, 0.999), 1e-6)


def test_schedules_of_generative_models():
    """Theirs starts at lr_start and ends at lr_min, ours at 0: compared is what is between, as a share of it."""
    file, data = "sgm_ema_lr", arrays("sgm_ema_lr")
    constant = learning_rate(Optimizer(learning_rate=1, lr_scheduler="constant_with_warmup", lr_warmup_steps=10000), 1)
    # That of its example configurations starts at 1e-6, ours at 0.
    compare(file, "sgm_config_lr", [constant(n) for n in data["sgm_config_lr_at"]], rtol=2e-6, floor=1)
    key = "LambdaWarmUpCosine_5_0.1_1_0.01_30"
    cosine = learning_rate(Optimizer(learning_rate=1, lr_scheduler="cosine", lr_warmup_steps=5), 30)
    compare(file, key, [cosine(n) for n in range(5)], (data[key][:5] - 0.01) / 0.99, rtol=1e-12)
    compare(file, key, [cosine(n) for n in range(5, 31)], (data[key][5:31] - 0.1) / 0.9, rtol=1e-12, floor=1)
    other = learning_rate(Optimizer(learning_rate=1, lr_scheduler="cosine", lr_warmup_steps=5), 31)
    assert other(18) != pytest.approx((data[key][18] - 0.1) / 0.9, rel=0.01)

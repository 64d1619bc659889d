"""Averages of the weights against the reference code's own numbers and closed forms."""

import numpy as np
import pytest
import torch

from finetune.config import Ema as EmaConfig
from finetune.ema import Ema
from golden_numbers import compare


def trajectory(cfg: EmaConfig, init: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The first average after each value that the parameter took."""
    parameter = torch.nn.Parameter(torch.tensor(init, dtype=torch.float32))
    ema = Ema({"w": parameter}, cfg)
    rows = []
    for value in values:
        parameter.data = torch.tensor(value, dtype=torch.float32)
        ema.step()
        rows.append(ema.averages[cfg.ema_max_decay[0]]["w"].clone().numpy())
    return np.stack(rows)


def config(decay: float, warmup: str) -> EmaConfig:
    return EmaConfig(use_ema=True, ema_max_decay=(decay,), ema_warmup=warmup)


@pytest.mark.parametrize(
    ("file", "key", "decay", "warmup"),
    [
        ("sgm_ema_lr", "ema_const_0.9", 0.9, "none"),
        ("sgm_ema_lr", "ema_warm_0.5", 0.5, "ratio"),
        ("sgm_ema_lr", "ema_warm_0.9999", 0.9999, "ratio"),
        ("iddpm_misc", "ema_after", None, "none"),
    ],
)
def test_golden(golden, file, key, decay, warmup):
    numbers = golden(file)
    decay = float(numbers["ema_rate"]) if decay is None else decay
    got = trajectory(config(decay, warmup), numbers["ema_init"], numbers["ema_params"])
    compare(file, key, got, rtol=2e-6, floor=0.05)
    wrong = trajectory(config(decay, "power"), numbers["ema_init"], numbers["ema_params"])
    assert np.abs(wrong - numbers[key]).max() > 1e-3


def test_power_warmup_is_diffusers():
    from diffusers.training_utils import EMAModel

    parameter = torch.nn.Parameter(torch.zeros(3))
    ours, theirs = Ema({"w": parameter}, config(0.95, "power")), EMAModel([parameter], decay=0.95, use_ema_warmup=True,
                                                                          inv_gamma=1.0, power=0.75)
    for n in range(1, 60):
        parameter.data = torch.full((3,), 0.1 * n)
        ours.step()
        theirs.step([parameter])
        torch.testing.assert_close(ours.averages[0.95]["w"], theirs.shadow_params[0], rtol=1e-6, atol=1e-6)


def test_several_rates_swap_and_load():
    parameter = torch.nn.Parameter(torch.zeros(2))
    cfg = EmaConfig(use_ema=True, ema_max_decay=(0.5, 0.9), ema_warmup="none")
    ema = Ema({"w": parameter}, cfg)
    parameter.data = torch.ones(2)
    ema.step()
    assert ema.averages[0.5]["w"].tolist() == pytest.approx([0.5, 0.5])
    assert ema.averages[0.9]["w"].tolist() == pytest.approx([0.1, 0.1])
    with ema.swapped_in():
        assert parameter.tolist() == pytest.approx([0.5, 0.5])
    assert parameter.tolist() == [1, 1]
    with pytest.raises(RuntimeError), ema.swapped_in():
        raise RuntimeError
    assert parameter.tolist() == [1, 1]

    other = Ema({"w": torch.nn.Parameter(torch.zeros(2))}, cfg)
    other.load(ema.updates, ema.averages)
    assert other.updates == 1
    assert torch.equal(other.averages[0.9]["w"], ema.averages[0.9]["w"])


def test_average_of_bfloat16_weights_is_float32():
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, config(0.9999, "none"))
    parameter.data = torch.ones(1, dtype=torch.bfloat16)
    ema.step()
    assert ema.averages[0.9999]["w"].item() == pytest.approx(1e-4, rel=1e-3)

"""Averages of the weights against the reference code's own numbers and closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune.export  # noqa: F401  imported here for the forked children
import finetune.run
from finetune import checkpoint, posthoc
from finetune.cli import main
from finetune.config import Ema as EmaConfig
from finetune.config_io import load_text
from finetune.ema import Ema, drop_snapshots_after, gamma_of, refuse_unmoved
from finetune.errors import CheckpointError, ConfigError
from forked import log, run, state
from golden_numbers import compare
from tiny import config as tiny

torch.set_num_threads(1)


def trajectory(cfg: EmaConfig, init: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The first average after each value that the parameter took."""
    parameter = torch.nn.Parameter(torch.tensor(init, dtype=torch.float32))
    ema = Ema({"w": parameter}, cfg)
    rows = []
    for value in values:
        parameter.data = torch.tensor(value, dtype=torch.float32)
        ema.step()
        rows.append(ema.averages[f"ema_{cfg.ema_max_decay[0]}"]["w"].clone().numpy())
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


@pytest.mark.parametrize(
    ("file", "key", "cfg"),
    [
        ("kdiff_losses", "EMAWarmup_1_0.667", {"ema_power": 2 / 3}),
        ("diffusers_0421_pins", "ema_decay_warmup_2_3", {"ema_power": 2 / 3}),
        ("diffusers_0421_pins", "ema_decay_const_0.999", {"ema_max_decay": (0.999,), "ema_warmup": "none"}),
    ],
)
def test_golden_decays(golden, file, key, cfg):
    """The decay of each update: k-diffusion's EMAWarmup, and EMAModel of diffusers."""
    decays = []
    for updates in range(len(golden(file)[key])):
        ema = Ema({"w": torch.nn.Parameter(torch.zeros(1))}, EmaConfig(use_ema=True, **cfg))
        ema.updates = updates
        decays.append(ema.decay(next(iter(ema.averages))))
    compare(file, key, decays, rtol=1e-6)
    assert abs(decays[1] - 0.9) > 0.05


@pytest.mark.parametrize("run", ["hybrid_full", "hybrid_microbatch"])
def test_golden_training_loop(golden, run):
    """The averages that improved-diffusion's own loop keeps beside each other, from its initial weights on."""
    numbers = golden("iddpm_trainloop")
    names = [str(name) for name in numbers["param_order"]]
    initial = {"s": np.zeros(6)} | {f"conv.{k}": numbers[f"{run}/init_{k}"] for k in ("weight", "bias")}
    start = np.concatenate([np.ravel(initial[name]) for name in names])
    for decay in (0.5, 0.9):
        got = trajectory(config(decay, "none"), start, numbers[f"{run}/params"])
        compare("iddpm_trainloop", f"{run}/ema_{decay}", got, rtol=2e-6, floor=0.05)  # float32 sums near zero
    assert np.abs(got - numbers[f"{run}/ema_0.5"]).max() > 1e-3, "negative control: the other decay"


def test_power_warmup_is_diffusers():
    from diffusers.training_utils import EMAModel

    parameter = torch.nn.Parameter(torch.zeros(3))
    ours, theirs = Ema({"w": parameter}, config(0.95, "power")), EMAModel([parameter], decay=0.95, use_ema_warmup=True,
                                                                          inv_gamma=1.0, power=0.75)
    for n in range(1, 60):
        parameter.data = torch.full((3,), 0.1 * n)
        ours.step()
        theirs.step([parameter])
        torch.testing.assert_close(ours.averages["ema_0.95"]["w"], theirs.shadow_params[0], rtol=1e-6, atol=1e-6)


def test_several_rates_swap_and_load():
    parameter = torch.nn.Parameter(torch.zeros(2))
    cfg = EmaConfig(use_ema=True, ema_max_decay=(0.5, 0.9), ema_warmup="none")
    ema = Ema({"w": parameter}, cfg)
    parameter.data = torch.ones(2)
    ema.step()
    assert ema.averages["ema_0.5"]["w"].tolist() == pytest.approx([0.5, 0.5])
    assert ema.averages["ema_0.9"]["w"].tolist() == pytest.approx([0.1, 0.1])
    with ema.swapped_in():
        assert parameter.tolist() == pytest.approx([0.5, 0.5])
    assert parameter.tolist() == [1, 1]
    with pytest.raises(RuntimeError), ema.swapped_in():
        raise RuntimeError
    assert parameter.tolist() == [1, 1]

    other = Ema({"w": torch.nn.Parameter(torch.zeros(2))}, cfg)
    other.load(ema.updates, ema.averages)
    assert other.updates == 1
    assert torch.equal(other.averages["ema_0.9"]["w"], ema.averages["ema_0.9"]["w"])


def test_average_of_bfloat16_weights_is_float32():
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, config(0.9999, "none"))
    parameter.data = torch.ones(1, dtype=torch.bfloat16)
    ema.step()
    assert ema.averages["ema_0.9999"]["w"].item() == pytest.approx(1e-4, rel=1e-3)


# ---------------------------------------------------------------------------------------------------- power functions


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_gamma_gives_the_relative_width(width):
    """The defining property, by numerical integration: the standard deviation of the profile on [0, 1]."""
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    profile = tau ** gamma_of(width)
    profile /= profile.sum()
    mean = (tau * profile).sum()
    assert math.sqrt(((tau - mean) ** 2 * profile).sum()) == pytest.approx(width, rel=1e-6)
    assert gamma_of(12**-0.5) == pytest.approx(0, abs=1e-9)


def power(*widths: float, **settings) -> EmaConfig:
    return EmaConfig(use_ema=True, ema_max_decay=(), relative_widths=widths, **settings)


@pytest.mark.parametrize("width", [0.05, 0.1, 12**-0.5])
def test_average_is_the_integral_over_its_profile(width):
    """Step s counts as the integral of the profile from s - 1 to s; the initial weights do not count."""
    parameter, steps = torch.nn.Parameter(torch.full((2,), 1e3)), 60
    ema = Ema({"w": parameter}, power(width))
    power_of, rng = gamma_of(width) + 1, np.random.RandomState(0)
    values = np.stack([np.arange(1, steps + 1), rng.normal(size=steps)], axis=1)  # a ramp, and noise
    for n, value in enumerate(values, start=1):
        parameter.data = torch.tensor(value, dtype=torch.float32)
        ema.step()
        edges = np.linspace(0, 1, n + 1) ** power_of
        np.testing.assert_allclose(ema.averages[f"ema_width_{width}"]["w"], np.diff(edges) @ values[:n], atol=2e-5)
    # The integral of tau * p(tau) is t (gamma + 1) / (gamma + 2); a step counts from its start: at most one more.
    continuous = steps * power_of / (power_of + 1)
    assert continuous < float(ema.averages[f"ema_width_{width}"]["w"][0]) < continuous + 1


def test_first_listed_is_swapped_in_and_decays_come_first():
    parameter = torch.nn.Parameter(torch.zeros(1))
    both = EmaConfig(use_ema=True, ema_max_decay=(0.5,), ema_warmup="none", relative_widths=(0.1, 0.05))
    for cfg, first in [(both, "ema_0.5"), (power(0.1, 0.05), "ema_width_0.1")]:
        ema = Ema({"w": parameter}, cfg)
        for value in (1.0, 3.0):
            parameter.data = torch.full((1,), value)
            ema.step()
        expected = float(ema.averages[first]["w"])
        assert len({float(average["w"]) for average in ema.averages.values()}) == len(cfg.averages)
        with ema.swapped_in():
            assert float(parameter.detach()) == expected


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"relative_widths": [0.3]}, "less than or equal to 0.288"),
        ({"relative_widths": [0]}, "greater than 0"),
        ({"relative_widths": [0.1, 0.1]}, "names a width twice"),
        ({"relative_widths": [0.1], "use_ema": False}, "need use_ema true"),
        ({"snapshot_every": 5}, "has nothing to keep"),
        ({"update_every": 2, "use_ema": False}, "update_every 2 has nothing to move: set use_ema true"),
        ({"relative_widths": [0.1], "snapshot_every": 5, "update_every": 2}, "no multiple of update_every 2.* as 4"),
        ({"ema_max_decay": []}, "needs at least one value, or set relative_widths"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        EmaConfig(**{"use_ema": True, **settings})


# ------------------------------------------------------------------------------------------- every k steps


def moved(cfg: EmaConfig, values) -> dict[str, float]:
    """Each average after a parameter, 10 before the first step, took these values."""
    parameter = torch.nn.Parameter(torch.full((1,), 10.0))
    ema = Ema({"w": parameter}, cfg)
    for value in values:
        parameter.data = torch.full((1,), float(value))
        ema.step()
    return {part: float(average["w"]) for part, average in ema.averages.items()}


@pytest.mark.parametrize("warmup", ["power", "ratio", "none"])
def test_rare_moves_of_constant_weights_are_all_the_single_ones(warmup):
    each = {"use_ema": True, "ema_max_decay": (0.9, 0.5), "ema_warmup": warmup, "relative_widths": (0.1,)}
    steps = [-3.0] * 4 + [50.0] * 4 + [7.0] * 4
    single, rare = moved(EmaConfig(**each), steps), moved(EmaConfig(**each, update_every=4), steps)
    assert rare == pytest.approx(single, rel=1e-5)
    between = moved(EmaConfig(**each, update_every=4), [*steps, 99.0, 99.0, 99.0])
    assert between == rare, "what is seen between two moves is the last of them"
    assert moved(EmaConfig(**each, update_every=6), steps) != pytest.approx(single, rel=0.1), "negative control"
    assert set(moved(EmaConfig(**each, update_every=13), steps).values()) == {10.0}


def test_rare_moves_of_a_drift_are_the_sums_over_it():
    """theta_n = n: of constant decay d the moves at k, 2k, ..., mk leave 10 d^mk + sum (1 - d^k) d^(k(m - j)) jk; a
    power function weighs jk by the integral of its profile from (j - 1) k to jk."""
    k, m, d, width = 3, 20, 0.9, 0.1
    cfg = EmaConfig(use_ema=True, ema_max_decay=(d,), ema_warmup="none", relative_widths=(width,), update_every=k)
    got, j = moved(cfg, range(1, k * m + 3)), np.arange(1, m + 1)
    weights = np.diff(np.linspace(0, 1, m + 1) ** (gamma_of(width) + 1))
    expected = {f"ema_{d}": 10 * d ** (k * m) + ((1 - d**k) * d ** (k * (m - j)) * j * k).sum()}
    expected |= {f"ema_width_{width}": weights @ (j * k)}
    assert got == pytest.approx(expected, rel=1e-5)
    single = moved(EmaConfig(use_ema=True, ema_max_decay=(d,), ema_warmup="none"), range(1, k * m + 1))
    assert abs(single[f"ema_{d}"] - got[f"ema_{d}"]) > 0.5, "negative control: a move per step lags otherwise"


def test_rare_moves_are_reconstructed_after_the_training(tmp_path):
    parameter, k = torch.nn.Parameter(torch.zeros(20)), 5
    kept, beside = (Ema({"w": parameter}, power(*widths, update_every=k)) for widths in ((0.05, 0.1), (0.075,)))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 1004):  # the last snapshot, at the end, is of step 1000
        parameter.data = parameter.data + 0.02 * torch.randn(20, generator=generator)
        kept.step(), beside.step()
        if step % 100 == 0 or step == 1003:
            kept.snapshot(tmp_path)
    snapshots = [checkpoint.load(path) for path in checkpoint.folders(tmp_path)]
    assert [one.step for one in snapshots] == list(range(100, 1001, 100))
    weights, _ = posthoc.reconstruct(snapshots, (0.075, 1000))
    wanted, spread = beside.averages["ema_width_0.075"]["w"], kept.averages
    spread = (spread["ema_width_0.05"]["w"] - spread["ema_width_0.1"]["w"]).square().mean()
    assert float((weights["w"] - wanted).square().mean() / spread) ** 0.5 < 0.02
    wrong, _ = posthoc.reconstruct(snapshots, (0.09, 1000))
    assert float((wrong["w"] - wanted).square().mean() / spread) ** 0.5 > 0.1, "negative control: another width"


# ------------------------------------------------------------------------------------------- after the training


STEPS, EVERY = 2000, 100


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """(snapshots of widths .05 and .1, averages of .05, .075 and .1 at each step) of a wandering parameter."""
    root = tmp_path_factory.mktemp("snapshots")
    parameter = torch.nn.Parameter(torch.zeros(50))
    kept, beside = Ema({"w": parameter}, power(0.05, 0.1)), Ema({"w": parameter}, power(0.05, 0.075, 0.1))
    generator, mean, history = torch.Generator().manual_seed(0), torch.full((50,), 5.0), {}
    for step in range(1, STEPS + 1):
        mean = mean + 0.02 * torch.randn(50, generator=generator)
        parameter.data = mean + 0.1 * torch.randn(50, generator=generator)
        kept.step(), beside.step()
        if step % EVERY == 0:
            kept.snapshot(root)
            history[step] = {part: average["w"].clone() for part, average in beside.averages.items()}
    return [checkpoint.load(path) for path in checkpoint.folders(root)], history


def error_of(weights, history, step: int, width: float) -> float:
    """Root mean square error over the spread between the widths .05 and .1, which is what is at stake."""
    at = history[step]
    spread = (at["ema_width_0.05"] - at["ema_width_0.1"]).square().mean()
    return float((weights["w"] - at[f"ema_width_{width}"]).square().mean() / spread) ** 0.5


@pytest.mark.parametrize("step", [STEPS, STEPS - 5 * EVERY])
def test_another_width_is_what_would_have_been_tracked(tracked, step):
    snapshots, history = tracked
    weights, residual = posthoc.reconstruct(snapshots, (0.075, step))
    assert 0 < residual < 5e-3
    assert error_of(weights, history, step, 0.075) < 0.01
    before, _ = posthoc.reconstruct([one for one in snapshots if one.step <= step], (0.075, step))
    assert torch.equal(weights["w"], before["w"]), "snapshots of later steps do not count"
    (narrow, wide), more = posthoc.fit([(0.05, step), (0.1, step)], (0.075, step))  # of a single snapshot
    worse = narrow * history[step]["ema_width_0.05"] + wide * history[step]["ema_width_0.1"]
    assert more > 10 * residual and error_of({"w": worse}, history, step, 0.075) > 0.05, "negative control"


def test_a_stored_width_comes_back_bit_by_bit(tracked):
    snapshots, history = tracked
    for width in (0.05, 0.1):
        weights, residual = posthoc.reconstruct(snapshots, (width, 700))
        assert residual == 0 and torch.equal(weights["w"], history[700][f"ema_width_{width}"])


def test_inner_product_and_residual_are_those_of_the_integrals():
    averages = [(0.05, 60), (0.1, 100), (0.05, 100), (0.075, 100)]
    tau = (np.arange(400_000) + 0.5) / 4000
    gammas, steps = np.array([(gamma_of(width), step) for width, step in averages]).T[:, :, None]
    profiles = np.where(tau < steps, (gammas + 1) * (tau / steps) ** gammas / steps, 0)
    ours = posthoc.inner_product(gammas, steps, gammas.T, steps.T)
    np.testing.assert_allclose(ours, profiles @ profiles.T / 4000, rtol=1e-4)
    coefficients, residual = posthoc.fit(averages[:3], averages[3])
    missed = profiles[3] - coefficients @ profiles[:3]
    assert residual == pytest.approx(np.linalg.norm(missed) / np.linalg.norm(profiles[3]), rel=1e-3)
    assert coefficients.sum() == pytest.approx(1, abs=1e-12)


def test_out_of_reach_is_refused_with_what_is_there(tracked):
    snapshots, _ = tracked
    with pytest.raises(ConfigError, match=r"--step 150: there is no snapshot of it, only of 100, 200, .*, 2000"):
        posthoc.reconstruct(snapshots, (0.075, 150))
    with pytest.raises(ConfigError, match=r"out of reach of the 20 snapshots .* In reach: 0\.02\d to 0\.2\d\d\."):
        posthoc.reconstruct(snapshots, (0.01, STEPS))
    assert posthoc.within_reach([(0.05, 100)], 100).count("to") == 1
    assert posthoc.within_reach([(0.03, 100), (0.15, 100)], 100).count("to") == 2


def test_snapshots_of_steps_that_are_done_again_go_and_damage_is_named(tmp_path):
    ema = Ema({"w": torch.nn.Parameter(torch.zeros(3))}, power(0.1))
    for _ in range(3):
        ema.step()
        ema.snapshot(tmp_path)
    drop_snapshots_after(tmp_path, 2)
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["step-00000001", "step-00000002"]
    with (tmp_path / "step-00000001" / "ema_width_0.1.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(CheckpointError, match="snapshot: .* does not match its checksum"):
        checkpoint.load(tmp_path / "step-00000001", what="snapshot")


EMA = {"use_ema": True, "ema_max_decay": [0.9], "relative_widths": [0.05, 0.1], "snapshot_every": 2}


def train(cfg) -> None:
    finetune.run.train(cfg)


def snapshots_of(cfg) -> dict[str, bytes]:
    root = Path(cfg.output_dir) / "ema_snapshots"
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of 9 steps with snapshots at 2, 4, 6, 8 and 9."""
    cfg = tiny(tmp_path_factory.mktemp("posthoc") / "run", ema=EMA)
    assert run(cfg, body=train) == [0], log(cfg)
    return cfg


def test_rare_moves_are_resumed_exactly(tmp_path):
    rare = {"ema": EMA | {"update_every": 2, "snapshot_every": 4}, "checkpoint": {"checkpointing_steps": 3}}
    through, cut = tiny(tmp_path / "through", **rare), tiny(tmp_path / "cut", **rare)
    assert run(through) == [0], log(through)
    assert run(cut, stop=(4, 9)) == [-9] and run(cut) == [0], log(cut)
    assert state(cut, 9) == state(through, 9) and snapshots_of(cut) == snapshots_of(through)


def test_killed_and_resumed_keeps_the_same_averages_and_snapshots(finished, tmp_path):
    cfg = tiny(tmp_path / "run", ema=EMA, checkpoint={"checkpointing_steps": 3})
    assert run(cfg, stop=(4, 9)) == [-9]
    stale = Path(cfg.output_dir) / "ema_snapshots" / "step-00000004"
    assert run(cfg) == [0], log(cfg)
    assert state(cfg, 9) == state(finished, 9) and "ema_width_0.05.safetensors" in state(cfg, 9)
    assert snapshots_of(cfg) == snapshots_of(finished)
    assert sorted({name.split("/")[0][-1] for name in snapshots_of(cfg)}) == list("24689") and stale.is_dir()


def test_command_writes_the_pipeline_of_another_width(finished, tmp_path, capsys):
    """What comes out is, but for the residual, what a run that tracks this width exports; it loads and draws."""
    out = tmp_path / "new" / "wider"
    assert main(["ema", finished.output_dir, "--relative_width", "0.075", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "relative width 0.075 at step 9, from snapshots at 5 steps; residual of the profile " in said

    direct = tiny(tmp_path / "direct", ema={"use_ema": True, "ema_max_decay": [], "relative_widths": [0.075]})
    assert run(direct, body=train) == [0], log(direct)
    file = "unet/diffusion_pytorch_model.safetensors"
    wanted, got = load_file(Path(direct.output_dir) / "pipeline" / file), load_file(out / file)
    before = load_file(Path(finished.output_dir) / "pipeline" / file)
    assert wanted.keys() == got.keys() == before.keys()

    def distance(weights):
        return sum(float((weights[name] - wanted[name]).square().sum()) for name in wanted) ** 0.5

    assert distance(got) < 0.05 * distance(before), "negative control: the run's own export, with decay 0.9"
    assert "average with relative width 0.075" in (out / "README.md").read_text()
    assert load_text((out / "config.yaml").read_text()).ema.averages == ["relative width 0.075"]
    assert '"post_hoc_average"' in (out / "run.json").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["wider"]
    assert main(["sample", str(out), "--out", str(tmp_path / "pictures"), "--num_images", "1", "--steps", "2"]) == 0


def test_command_takes_a_stored_width_at_an_earlier_step(finished, tmp_path, capsys):
    options = ["--relative_width", "0.1", "--step", "6", "--out", str(tmp_path / "out")]
    assert main(["ema", finished.output_dir, *options]) == 0
    stored = load_file(Path(finished.output_dir) / "ema_snapshots" / "step-00000006" / "ema_width_0.1.safetensors")
    got = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(got[name], stored[name]) for name in got) and got.keys() == stored.keys()
    assert "optimizer steps | 6 |" in (tmp_path / "out" / "README.md").read_text()


def test_command_refuses(finished, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for options, problem in [
        (["--relative_width", "0.01"], "--relative_width 0.01 at step 9 is out of reach of the 5 snapshots"),
        (["--relative_width", "0.1", "--step", "5"], "no snapshot of it, only of 2, 4, 6, 8, 9"),
        (["--relative_width", "0.4"], "must be above 0 and at most 0.2887, got 0.4"),
        (["--relative_width", "0.1", "--out", str(tmp_path / "there")], "exists: name a new folder"),
    ]:
        assert main(["ema", finished.output_dir, "--out", str(tmp_path / "out"), *options]) == 2
        assert problem in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_averages_that_would_never_move_are_refused():
    refuse_unmoved(EmaConfig(use_ema=True, update_every=20), 20)
    refuse_unmoved(EmaConfig(), 1)
    with pytest.raises(ConfigError, match="the run has 19 steps, so the averages would never move: use at most 19"):
        refuse_unmoved(EmaConfig(use_ema=True, update_every=20), 19)

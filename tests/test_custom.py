"""Code of the user's own, named by a configuration: what it needs to run, and that it does not run without."""

import os
import re
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter

import finetune.run
from finetune import cli
from finetune import config_objective as co
from finetune.config_io import dump, load, load_text, read
from finetune.errors import ConfigError
from finetune.identity import run_settings
from finetune.objective import build_objective
from finetune.sample import generate, load_pipeline
from finetune.seeding import PositionRandom
from forked import log, metrics, run
from tiny import config

torch.set_num_threads(1)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
PIECES = """
import subprocess
from subprocess import run
from pathlib import Path
import torch
from finetune.objective import build_objective
from finetune.objective.regression import Regression

Path({ran!r}).write_text("imported")

def weighting(gamma, extra=()):
    extra.append(1) if extra else None
    return lambda snr, scale: gamma * snr * scale

class Levels:
    def __init__(self, level): self.level = level
    def sample(self, random):
        return torch.full_like(random.integers("level", 2), self.level), 2 * torch.ones(len(random.uniform("u")))

def loss(power):
    return Regression("mine", lambda d: d.abs() ** power, lambda c: c.abs() ** power)

def objective(gamma):
    from dataclasses import replace
    import finetune.config_objective as co
    return replace(build_objective(co.DDPM(), clip_sample=True), weighting=weighting(gamma))

def nothing(): pass
def one_argument(): return lambda snr: snr
def scalar(): return lambda snr, scale: snr.mean()
def fails(): raise RuntimeError("no such luck")
CONSTANT = 3
"""
names = count()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of a new package with PIECES on the path; importing it leaves the file `ran`."""
    name = f"mine_{next(names)}"
    (tmp_path / "lib" / name).mkdir(parents=True)
    (tmp_path / "lib" / name / "__init__.py").write_text("")
    (tmp_path / "lib" / name / "pieces.py").write_text(PIECES.format(ran=str(tmp_path / "ran")))
    (tmp_path / "lib" / name / "broken.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.chdir(tmp_path)
    return name


def custom(package, name, **params):
    return {"kind": "custom", "target": f"{package}.{name}", "params": params}


def build(objective: dict, *trust: str):
    return build_objective(TypeAdapter(co.Objective).validate_python(objective), clip_sample=True, trust=trust)


def refused(objective: dict, *trust: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(objective, *trust)
    return str(caught.value)


def recipe(objective: str) -> str:
    return "output_dir: out\ndata: {train_data_dir: pics, resolution: 64}\n" + objective


# ---- who may run code


def test_without_trust_it_is_inert(package, tmp_path):
    """Neither reading, showing nor a refused training imports it, nor torch; with --trust the same command does."""
    lines = ["objective:", " weighting:", "  kind: custom", f"  target: {package}.pieces.weighting"]
    (tmp_path / "r.yaml").write_text(recipe("\n".join([*lines, "  params: {gamma: 2}"])))
    cfg = load(["--config", "r.yaml"], env={})
    assert load_text(dump(cfg)) == cfg and cfg.objective.weighting.params == {"gamma": 2}
    code = (
        "import sys; from finetune.cli import main\n"
        "try: sys.exit(main(sys.argv[1:]))\nfinally: print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "lib"), *sys.path])}

    def command(*words):
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)

    without = command("train", "--config", "r.yaml")
    assert (without.returncode, without.stdout) == (2, "False\n")
    assert without.stderr == (
        f"r.yaml:6: objective.weighting.target: {package}.pieces.weighting is code, which a configuration alone cannot "
        f"have run: if it is yours, add --trust {package} to the command\n"
    )
    shown = command("config", "--config", "r.yaml")
    assert shown.returncode == 0 and shown.stdout.endswith("False\n")
    assert not (tmp_path / "ran").exists()
    build({"kind": "ddpm", "weighting": custom(package, "pieces.weighting", gamma=2)}, package)
    assert (tmp_path / "ran").read_text() == "imported"


@pytest.mark.parametrize("text, option, message", [
    ("trust: [mine]\n", None, "r.yaml:3: trust: no such setting: only the command line can say whose code may run"),
    ("objective: {trust: mine}\n", None, "r.yaml:3: objective.trust: no such setting: only the command line"),
    ("", "my_package.module", "--trust: expected the name of your package, without dots, got 'my_package.module'"),
    ("", "", "--trust: expected the name of your package, without dots, got ''"),
])  # fmt: skip
def test_trust_is_an_option_and_a_package(text, option, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(recipe(text))
    with pytest.raises(ConfigError) as caught:
        load(["--config", "r.yaml", *([f"--trust={option}"] if option is not None else [])], env={})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_trust_is_repeatable_and_another_package_does_not_help(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(recipe("objective: {loss: {kind: custom, target: mine.Loss}}\n"))
    words = ["--config", "r.yaml", "--trust", "a", "b", "--trust", "mine"]
    assert read(words, env={}, to_run=True).trust == ("a", "b", "mine")
    with pytest.raises(ConfigError, match="add --trust mine to the command"):
        read(words[:-2], env={}, to_run=True)
    with pytest.raises(ConfigError, match="r.yaml:3: seeed.*\n(.*\n)*.*add --trust mine"):  # all mistakes at once
        Path("r.yaml").write_text("output_dir: out\ndata: {train_data_dir: pics, resolution: 64}\nseeed: 1\n"
                                  "objective: {loss: {kind: custom, target: mine.Loss}}\n")  # fmt: skip
        read(words[:-2], env={}, to_run=True)


@pytest.mark.parametrize("target", [
    "os.system", "builtins.exec", "subprocess.run", "importlib.import_module", "finetune.run.train", "eval", "mine",
    "torch.hub.load", "torch.load", "diffusers.DiffusionPipeline", "numpy.load",
    ".mine.Loss", "..mine.Loss", "mine..Loss", "mine.__init__", "__main__.Loss", "mine._Loss", "mine.Loss()",
    "mine:Loss", "mine.Lo ss", "mine.Loss\n", "", 5, None, ["mine.Loss"], "mine/Loss.py",
])  # fmt: skip
def test_names_that_are_no_code_of_the_user(target):
    """Whatever is trusted."""
    text = yaml.safe_dump({"objective": {"loss": {"kind": "custom", "target": target}}})
    with pytest.raises(ConfigError, match=r"objective\.loss\.target: (expected|.* is not code of yours)") as caught:
        load_text(recipe(text))
    assert str(caught.value).count("\n") == 0


def test_only_what_the_package_defines_can_be_named(package):
    for name in ("run", "subprocess", "CONSTANT", "Path", "absent"):
        objective = {"kind": "ddpm", "weighting": custom(package, f"pieces.{name}")}
        message = refused(objective, package)
        assert message == (f"objective.weighting.target: {package}.pieces defines no class or function {name} of the "
                           f"package {package}")  # fmt: skip
    assert "is code, which" in refused({"kind": "ddpm", "loss": custom(package, "pieces.loss", power=2)}, "another")


# ---- what can be wrong with it


@pytest.mark.parametrize("setting, name, params, message", [
    ("weighting", "absent.Mine", {}, "objective.weighting.target: {p}.absent.Mine: there is no module {p}.absent: put"),
    ("weighting", "broken.x", {}, "objective.weighting.target: {p}.broken.x: ModuleNotFoundError: No module named "
                                  "'a_package_that_is_not_there' ({lib}/{p}/broken.py:1)"),
    ("weighting", "pieces.weighting", {"gama": 2}, "objective.weighting.params: {p}.pieces.weighting: TypeError: "),
    ("weighting", "pieces.fails", {}, "objective.weighting.params: {p}.pieces.fails: RuntimeError: no such luck ("),
    ("weighting", "pieces.nothing", {}, "objective.weighting: {p}.pieces.nothing must make a function of snr"),
    ("weighting", "pieces.one_argument", {}, "objective.weighting: {p}.pieces.one_argument must make a function of"),
    ("weighting", "pieces.scalar", {}, "objective.weighting: {p}.pieces.scalar must make a function of snr"),
    ("levels", "pieces.nothing", {}, "objective.levels: {p}.pieces.nothing must make an object whose sample(random)"),
    ("loss", "pieces.nothing", {}, "objective.loss: {p}.pieces.nothing must make a finetune.objective.regression.Reg"),
    (None, "pieces.nothing", {}, "objective: {p}.pieces.nothing must make a finetune.objective.Objective; got None"),
])  # fmt: skip
def test_what_is_wrong_names_its_setting(package, setting, name, params, message, tmp_path):
    piece = custom(package, name, **params)
    said = refused({"kind": "ddpm", setting: piece} if setting else piece, package)
    assert said.startswith(message.format(p=package, lib=tmp_path / "lib"))


def test_params_are_plain_finite_data(package):
    text = "objective: {{kind: custom, target: mine.f, params: {}}}\n"
    for params in ("[1]", "3", "{a: .inf}", "{a: [{b: .nan}]}"):
        with pytest.raises(ConfigError, match="objective.params: "):
            load_text(recipe(text.format(params)))
    cfg = load_text(recipe(text.format("{a: 1e-4, b: [1, no, {c: null}], d: 'yes', e: true}")))
    assert cfg.objective.params == {"a": 1e-4, "b": [1, "no", {"c": None}], "d": "yes", "e": True}
    assert load_text(dump(cfg)) == cfg
    given = co.CustomObjective(kind="custom", target=f"{package}.pieces.weighting", params={"gamma": 1, "extra": [0]})
    with pytest.raises(ConfigError, match="must make a finetune.objective.Objective; got function"):
        build_objective(given, clip_sample=True, trust=[package])
    assert given.params["extra"] == [0]  # the code had a copy


# ---- what it does


@pytest.mark.parametrize("kind", ["ddpm", "edm", "flow"])
def test_pieces_take_their_place(package, kind):
    level = {"ddpm": 300, "edm": 1.5, "flow": 0.5}[kind]
    objective = build({
        "kind": kind, "noise_offset": 0.1,
        "weighting": custom(package, "pieces.weighting", gamma=3.0),
        "levels": custom(package, "pieces.Levels", level=int(level) if kind != "flow" else 1),
        "loss": custom(package, "pieces.loss", power=3),
    }, package)  # fmt: skip
    assert objective.noise.offset == 0.1 and objective.regression.name == "mine"
    drawn, weight = objective.levels.sample(PositionRandom(0, torch.arange(4)))
    assert drawn.tolist() == [int(level) if kind != "flow" else 1] * 4 and weight.tolist() == [2] * 4
    x0, noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    at = torch.full((4,), level)
    terms = objective.loss_at(lambda x, t: torch.zeros_like(x), x0, at, noise)
    alpha, sigma, _ = objective.process(at)
    target = objective.prediction.target(x0, noise, alpha, sigma)
    _, c_out = objective.prediction.pair(alpha, sigma)
    expected = target.abs().pow(3).flatten(1).mean(1) * (3 * (alpha / sigma) ** 2 * c_out.abs() ** 3).float()
    torch.testing.assert_close(terms.per_sample, expected)


def test_a_whole_objective(package):
    ours, plain = build(custom(package, "pieces.objective", gamma=7.0), package), build({"kind": "ddpm"})
    x0, level = torch.zeros(2, 3, 4, 4), torch.tensor([10, 900])
    noise = torch.ones_like(x0)
    one, other = (o.loss_at(lambda x, t: 0 * x, x0, level, noise).per_sample for o in (ours, plain))
    torch.testing.assert_close(one, 7 * other)


def test_a_checkpoint_belongs_to_its_code(tmp_path):
    def of(**params):
        cfg = config(tmp_path, objective={"kind": "ddpm", "weighting": custom("mine", "f", **params)})
        return run_settings(cfg, global_batch=8, steps=9, mixed_precision="no", fingerprint="x")

    assert of(gamma=2) == of(gamma=2) and of(gamma=2) != of(gamma=3)
    assert of()["objective.weighting.target"] == "mine.f"


def test_what_it_trained_is_sampled_and_published_without_it(package, tmp_path):
    """The whole objective is the user's; its pipeline is one of diffusers."""
    cfg = config(
        tmp_path / "run", objective=custom(package, "pieces.objective", gamma=2.0), train={"max_train_steps": 1}
    )

    def train(cfg):
        finetune.run.train(cfg, trust=[package])

    assert run(cfg, body=train) == [0], log(cfg)
    assert f"{package}.pieces.objective" in log(cfg)  # in the plan
    (tmp_path / "ran").unlink()
    assert load_text((tmp_path / "run" / "config.yaml").read_text()).objective == cfg.objective
    assert len(generate(load_pipeline(cfg.output_dir), num_images=1, seed=0)) == 1
    assert f"target: {package}.pieces.objective" in (tmp_path / "run" / "pipeline" / "config.yaml").read_text()
    assert not (tmp_path / "ran").exists() and package not in sys.modules


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)[1]


def test_the_example_of_the_page_trains_with_the_loss_it_should_have(tmp_path, monkeypatch):
    """A network that starts at 0 has the loss mean(noise^2) w(level): both are functions of seed and position."""
    path = tmp_path / block("python").splitlines()[0].removeprefix("# ")
    path.parent.mkdir()
    path.write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    cfg = config(
        tmp_path / "run",
        model={"zero_init": True},
        train={"max_train_steps": 1},
        objective={"kind": "ddpm", **yaml.safe_load(block("yaml"))["objective"]},
    )
    (tmp_path / "my_recipe.yaml").write_text(dump(cfg))
    words = block("bash").split("train_unet.py")[1].split()
    monkeypatch.chdir(tmp_path)
    assert run(cfg, body=lambda cfg: cli.train(words)) == [0], log(cfg)
    with pytest.raises(SystemExit, match="^2$"):  # without --trust
        cli.train(words[:2])

    random = PositionRandom(0, torch.arange(8))
    noise = random.normal("noise", (3, 8, 8)).double().square().flatten(1).mean(1)
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[random.integers("level", 1000)]
    snr = abar / (1 - abar)
    expected = (noise * snr.clamp(min=1) / snr).mean()
    assert metrics(cfg)[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert float(noise.mean()) != pytest.approx(float(expected), rel=0.1)
    assert "my_package.weighting.TruncatedSNR" in log(cfg)  # in the plan

"""The command line: what it says, what it returns, and how little it loads before it knows what to do."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  imported here for the forked children
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import finetune.export  # noqa: F401  as above
import finetune.run
from finetune.cli import main
from finetune.config_io import dump
from forked import log, run
from tiny import ROOT, config

torch.set_num_threads(1)


def train(cfg) -> None:
    finetune.run.train(cfg)


@pytest.fixture(autouse=True)
def own_log(monkeypatch):
    """What `main` sets up for the screen ends with the test."""
    monkeypatch.setattr(logging.getLogger("finetune"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("finetune"), "level", logging.NOTSET)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output_dir of a class-conditional run of two steps."""
    cfg = config(tmp_path_factory.mktemp("cli") / "run", train={"max_train_steps": 2})
    assert run(cfg, body=train) == [0], log(cfg)
    return Path(cfg.output_dir)


def said(capsys, *words) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    return code, *capsys.readouterr()


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))]).astype(int)


def test_sample_draws_numbered_pictures_and_a_grid(finished, tmp_path, capsys):
    code, out, err = said(capsys, "sample", finished, "--out", tmp_path / "a", "--num_images", 3, "--seed", 5)
    assert (code, out) == (0, f"3 images and grid.png in {tmp_path / 'a'}\n")
    assert "Traceback" not in err and "Warning" not in err
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0000.png", "0001.png", "0002.png", "grid.png"]
    assert pictures(tmp_path / "a").shape == (3, 8, 8, 3)
    again = ("--out", tmp_path / "b", "--num_images", 3, "--seed", 5, "--batch_size", 1)
    assert said(capsys, "sample", finished / "pipeline", *again)[0] == 0
    assert np.abs(pictures(tmp_path / "a") - pictures(tmp_path / "b")).max() <= 1, "the batch changes no image"
    other = ("--out", tmp_path / "c", "--num_images", 3, "--seed", 5, "--scheduler", "euler")
    assert said(capsys, "sample", finished, *other)[0] == 0
    assert np.abs(pictures(tmp_path / "a") - pictures(tmp_path / "c")).max() > 5, "negative control: the scheduler does"
    named = ("--out", tmp_path / "d", "--class_label", "one", "--seed", 6)
    assert said(capsys, "sample", finished, *named)[0] == 0
    assert np.abs(pictures(tmp_path / "d") - pictures(tmp_path / "a")[1]).max() <= 1, "image 1: class one, seed 5 + 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "seven"], "this pipeline takes no prompts (conditioning class_label): leave them out"),
        (["--class_label", "eleven"], "--class_label eleven is not a number or one of zero, one,"),
        (["--class_label", "10"], "class labels are 0..9, got 10"),
        (["--steps", "5000"], "num_inference_steps must lie in 1..1000 (the timesteps trained), got 5000"),
        (["--scheduler", "unipc", "--steps", "61"], "a timestep outside 0..999: use 60, or another number"),
    ],
)
def test_sample_refuses_what_the_pipeline_cannot_do(finished, tmp_path, capsys, options, message):
    code, out, err = said(capsys, "sample", finished, "--out", tmp_path / "new", *options)
    last = err.replace("\r", "\n").splitlines()[-1]
    assert (code, out) == (2, "") and message in last and "Traceback" not in err
    assert not (tmp_path / "new").exists()


LIGHT = """
import contextlib, io, json, sys
from finetune.cli import main
answers = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    answers.append([code, out.getvalue(), err.getvalue()])
json.dump({"answers": answers, "heavy": sorted({"torch", "diffusers", "datasets"} & set(sys.modules))}, sys.stdout)
"""


def test_help_and_mistakes_need_no_torch(finished, tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text((finished / "config.yaml").read_text())
    recipe, nothing, out = "configs/train/digits.yaml", str(tmp_path / "nothing"), str(tmp_path / "new")
    cases = {
        (): (0, "usage: finetune COMMAND [options]"),
        ("--help",): (0, "accelerate launch train_unet.py --config FILE"),
        ("trian",): (2, "finetune: there is no command 'trian'; choose from train, sample,"),
        ("train", "--help"): (0, "--optimizer.learning_rate"),
        ("train",): (2, "no data: give --dataset_name (a Hub id or a local path)"),
        ("train", "--config", nothing): (2, f"--config: cannot read {nothing}: No such file or directory"),
        ("train", "--config", recipe, "--learning_rat", "1"): (2, "no such option; did you mean --learning_rate?"),
        ("train", "--config", recipe, "--learning_rate", "fast"): (2, "--learning_rate: expected a number, got 'fast'"),
        ("sample", "--help"): (0, "--scheduler"),
        ("sample",): (2, "the following arguments are required: RUN_OR_FOLDER_OR_REPO, --out"),
        ("sample", nothing, "--out", out): (2, f"'{nothing}' is neither a folder"),
        ("sample", str(tmp_path), "--out", out): (2, "give the output_dir of a finished run or"),
        ("sample", str(finished), "--out", str(finished)): (2, "is a file or not empty: name a new folder"),
        ("sample", str(finished), "--out", out, "--batch_size", "0"): (2, "--batch_size must be at least 1, got 0"),
        ("push", "--help"): (0, "--hub_model_id"),
        ("push",): (2, "the following arguments are required: RUN"),
        ("push", nothing): (2, f"{nothing} is no run (a folder with config.yaml): give the output_dir"),
        ("push", str(finished / "pipeline")): (2, "is no run"),
        ("push", str(tmp_path / "unfinished")): (2, "is not finished: its training command, given again, goes on"),
        ("evaluate", "--help"): (0, "--clip_denoised"),
        ("evaluate", nothing, "--metrics", "bpd"): (2, f"{nothing} is no run"),
        ("evaluate", str(finished), "--metrics", "fid"): (2, "invalid choice: 'fid'"),
        ("evaluate", str(finished), "--metrics", "bpd", "--seed", "-1"): (2, "--seed must be at least 0, got -1"),
        ("sigma_data", "--help"): (0, "--num_samples"),
        ("sigma_data", "--config", recipe, "--learning_rat", "1"): (2, "did you mean --learning_rate?"),
        ("ema", "--help"): (0, "--relative_width"),
        ("ema", nothing, "--relative_width", "0.1", "--out", out): (2, f"{nothing} is no run"),
        ("ema", str(finished), "--relative_width", "0.1", "--out", out): (2, "kept no snapshots: train with ema."),
        ("config", "--help"): (0, "--optimizer.learning_rate"),
        ("config", "--config", recipe, "--seed", "-1"): (2, "seed"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], input=json.dumps([*cases]), capture_output=True, text=True, cwd=ROOT
    )
    result = json.loads(done.stdout)
    assert result["heavy"] == []
    for (words, (code, message)), (answer, out, err) in zip(cases.items(), result["answers"], strict=True):
        assert answer == code, (words, answer, out, err)
        assert message in (err if code else out), (words, out, err)
        assert "Traceback" not in err and not (out if code else err), (words, out, err)


def test_the_front_door_explains_itself_without_torch():
    code = (
        "import runpy, sys\nsys.argv = ['train_unet.py', '--help']\n"
        "try: runpy.run_path('train_unet.py', run_name='__main__')\n"
        "except SystemExit as stop: sys.exit(stop.code or 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: train_unet.py [--config RECIPE.yaml]" in done.stdout and "--train.max_train_steps" in done.stdout


def test_config_shows_the_schema_and_where_each_setting_comes_from(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = ("--config", "configs/train/digits_pixel.yaml", "--learning_rate", "3e-4")
    code, out, _ = said(capsys, "config", "--schema")
    assert code == 0 and json.loads(out)["required"] == ["output_dir", "data"]
    code, out, _ = said(capsys, "config", *recipe, "--resolved")
    origins = {line.split(":")[0]: line.split("#")[-1].strip() for line in out.splitlines()}
    assert code == 0 and origins["optimizer.learning_rate"] == "--learning_rate"
    assert origins["data.resolution"].startswith("configs/train/digits_pixel.yaml:") and origins["seed"] == "default"
    code, out, _ = said(capsys, "config", *recipe)
    assert code == 0 and yaml.safe_load(out)["optimizer"]["learning_rate"] == 3e-4


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m finetune.cli config --schema | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_push_without_a_login_keeps_the_model_and_says_what_to_do(finished, capsys, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    code, _, err = said(capsys, "push", finished)
    assert code == 5
    assert "Run `hf auth login`, or set HF_TOKEN." in err and f"finetune push {finished}" in err
    assert (finished / "pipeline" / "model_index.json").is_file()


def test_each_way_to_end_has_its_code_and_one_message(tmp_path, capsys):
    def ends_with(code, message, **sections):
        cfg = config(tmp_path / f"run{code}", **sections)
        assert run(cfg, body=train) == [code], log(cfg)
        assert message in log(cfg) and "Traceback" not in log(cfg)

    (tmp_path / "empty").mkdir()
    data = {"dataset_name": str(tmp_path / "empty"), "max_train_samples": None}
    ends_with(4, str(tmp_path / "empty"), data=data)
    ends_with(2, "choose from", tracking={"report_to": "nobody"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config(tmp_path / "run")) + "sede: 1\n")
    code, out, err = said(capsys, "train", "--config", recipe)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "sede" in err and f"{recipe}:{len(recipe.read_text().splitlines())}" in err and "seed" in err
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ

"""The whole way of a user: train, resume, export, load elsewhere, publish, pull back."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import matplotlib.backends.backend_agg  # noqa: F401  imported here for all forked children
import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # noqa: F401  as above
from PIL import Image
from safetensors.torch import load_file

import elsewhere
import finetune.export
import finetune.run
from fake_hub import READ_TOKEN, WRITE_TOKEN, FakeHub
from finetune.conditioning import Unconditional
from finetune.config_io import dump, load
from finetune.errors import ConfigError
from finetune.models import build_unet
from finetune.sample import grid
from finetune.space import PixelSpace
from finetune.trainer import Trainer
from forked import last_step, log, metrics, run, state
from tiny import ROOT, config
from tiny_models import CONDITION, CROSS

STEPS = 2
PROMPTS = ["a handwritten seven", "a handwritten zero"]
SPACES, CONDITIONINGS, MODELS = ("pixel", "latent"), ("none", "class_label", "pooled_text", "text"), ("2d", "condition")
COMBINATIONS = [(s, c, m) for s in SPACES for c in CONDITIONINGS for m in MODELS if (c, m) != ("text", "2d")]
STOCK = {("pixel", "none", "2d"): "DDPMPipeline", ("latent", "text", "condition"): "StableDiffusionPipeline"}
UNCONDITIONAL = COMBINATIONS[0]


def train(cfg, dataset=None):
    """The exit code of `finetune train`, in a forked process."""

    def body(cfg):
        finetune.run.train(cfg, dataset=dataset)

    return run(cfg, body=body)


def combined(folder: Path, space="pixel", conditioning="none", model="2d", **sections):
    """The tiny run of this combination: two steps, two images."""
    text = {"text_encoder": str(ROOT / "assets" / "text_encoder"), "tokenizer": str(ROOT / "assets" / "tokenizer")}
    settings = {
        "train": {"max_train_steps": STEPS},
        "conditioning": {"kind": conditioning, **(text if "text" in conditioning else {})},
        "model": {} if model == "2d" else CROSS if conditioning == "text" else CONDITION,
        "sample": {"prompts": PROMPTS} if "text" in conditioning else {},
        "tracking": {"report_to": "tensorboard"},  # as by default
    }
    if space == "latent":
        settings |= {"space": {"kind": "latent", "vae": str(ROOT / "assets" / "vae")}, "data": {"resolution": 32}}
    return config(folder, **settings, **sections)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def screen(cfg) -> list[str]:
    """What a run showed, one line for each time that a bar was drawn."""
    return [line for line in log(cfg).replace("\r", "\n").replace("\x1b[A", "").splitlines() if line.strip()]


def exported(cfg) -> Path:
    return Path(cfg.output_dir) / "pipeline"


def draw_elsewhere(jobs) -> None:
    """In a process that knows the folders only, what the training drew at its end."""
    command = [sys.executable, elsewhere.__file__]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def assert_same_picture(cfg, array: np.ndarray, labels=None) -> None:
    """The images are those of the grid that the training process drew, to the last bit of a pixel."""
    assert np.isfinite(array).all()
    images = [Image.fromarray(image) for image in (array * 255).round().astype(np.uint8)]
    ours = np.asarray(grid(images, labels, columns=2)).astype(int)
    drawn = np.asarray(Image.open(Path(cfg.output_dir) / "samples" / f"step-{STEPS:08d}.png")).astype(int)
    assert ours.shape == drawn.shape
    assert np.abs(ours - drawn).max() <= 1
    assert np.abs(ours - drawn[:, ::-1]).max() > 20, "negative control: another picture is another picture"


# ------------------------------------------------------------------------------------------------- every combination


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """combination -> (config, images drawn in a fresh process from the export)."""
    root = tmp_path_factory.mktemp("runs")
    cfgs = {one: combined(root / "-".join(one), *one) for one in COMBINATIONS}
    jobs = []
    for one, cfg in cfgs.items():
        assert train(cfg) == [0], log(cfg)
        job = {"source": str(exported(cfg)), "stock": STOCK.get(one), "out": f"{cfg.output_dir}.npy"}
        jobs.append(job | {"prompts": PROMPTS if "text" in one[1] else None, "steps": None})
    draw_elsewhere(jobs)
    return {one: (cfg, np.load(f"{cfg.output_dir}.npy")) for one, cfg in cfgs.items()}


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_every_combination_trains_exports_and_draws_the_same_elsewhere(everything, combination):
    cfg, images = everything[combination]
    index = json.loads((exported(cfg) / "model_index.json").read_text())
    assert index["_class_name"] == STOCK.get(combination, "UNetPipeline")
    labels = {"none": None, "class_label": ["zero", "one"]}.get(combination[1], PROMPTS)
    assert_same_picture(cfg, images, labels)


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_the_screen_is_the_plan_the_bars_and_where_things_are(everything, combination):
    cfg, _ = everything[combination]
    lines = [line for line in screen(cfg) if not line.startswith("Generating ")]  # datasets, when it reads a new file
    size = next(i for i, line in enumerate(lines) if not line.startswith("  "))
    assert lines[0].startswith("  data ") and lines[size - 1].startswith("  push ") and size < 20
    bars = [line for line in lines[size:] if line.startswith(("train: ", "sampling: "))]
    assert bars and [line for line in lines[size:] if line not in bars] == [
        f"samples: {cfg.output_dir}/samples/step-{STEPS:08d}.png",
        f"pipeline: {cfg.output_dir}/pipeline",
    ]


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_export_is_the_first_average_and_frozen_is_frozen(everything, combination):
    cfg, _ = everything[combination]
    unet = load_file(exported(cfg) / "unet" / "diffusion_pytorch_model.safetensors")
    checkpoint = Path(cfg.output_dir) / "checkpoints" / f"step-{STEPS:08d}"

    def same(name):
        saved = load_file(checkpoint / name)
        return saved.keys() == unet.keys() and all(torch.equal(unet[key], saved[key]) for key in unet)

    assert same("ema_0.9.safetensors")
    assert not same("model.safetensors"), "negative control"
    frozen = {"vae": "diffusion_pytorch_model.safetensors"} if combination[0] == "latent" else {}
    frozen |= {"text_encoder": "model.safetensors"} if "text" in combination[1] else {}
    for part, name in frozen.items():
        ours, source = load_file(exported(cfg) / part / name), load_file(ROOT / "assets" / part / name)
        assert ours.keys() == source.keys()
        assert all(torch.equal(ours[key].view(torch.uint8), source[key].view(torch.uint8)) for key in source)


def test_combinations_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no cross-attention to read a text sequence with: use conditioning.kind"):
        combined(tmp_path / "run", "pixel", "text", "2d")
    for name, change, advice in [
        ("crossing", {"model": CROSS}, "use blocks without CrossAttn"),
        ("side", {"data": {"resolution": 9}}, "data.resolution must be a multiple of 2 (x0 of 2), got 9"),
        ("depth", {"model": {"block_out_channels": [8, 16, 16]}}, "give 3"),
        ("vae", {"space": {"kind": "latent", "vae": str(ROOT / "assets" / "nothing")}}, "is neither a folder"),
        ("vae size", {"space": {"kind": "latent", "vae": str(ROOT / "assets" / "vae")}, "data": {"resolution": 10}},
         "use 8 or 12"),
    ]:  # fmt: skip
        cfg = config(tmp_path / name, **change)
        assert train(cfg) == [2], log(cfg)
        assert advice in log(cfg) and "Traceback" not in log(cfg)
        assert not (tmp_path / name / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------------- start again


def test_the_same_command_after_the_end_trains_nothing(tmp_path):
    cfg = combined(tmp_path / "run")
    assert train(cfg) == [0], log(cfg)
    trained, lines, before = state(cfg, STEPS), metrics(cfg), contents(exported(cfg))
    (exported(cfg) / "README.md").unlink()
    assert train(cfg) == [0], log(cfg)
    assert f"resumes at step {STEPS}" in log(cfg)
    assert (state(cfg, STEPS), metrics(cfg)) == (trained, lines)
    assert contents(exported(cfg)) == before


@pytest.mark.parametrize("where", ["sample", "pipeline"])
def test_a_run_killed_between_its_last_checkpoint_and_its_export_finishes(tmp_path, monkeypatch, where):
    cfg = combined(tmp_path / "run")

    def dies(cfg):
        owner, name = (Trainer, "sample") if where == "sample" else (finetune.export, "verify")
        monkeypatch.setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        finetune.run.train(cfg)

    assert run(cfg, body=dies) == [-signal.SIGKILL]
    assert last_step(cfg) == STEPS and not exported(cfg).exists()
    assert train(cfg) == [0], log(cfg)
    assert (Path(cfg.output_dir) / "samples" / f"step-{STEPS:08d}.png").exists()
    assert (exported(cfg) / "model_index.json").exists()
    assert not [p for p in Path(cfg.output_dir).iterdir() if p.name.startswith(".pipeline")]


# --------------------------------------------------------------------------------------------------------- publishing


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        for name, value in server.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        yield server


def assert_no_token(cfg) -> None:
    assert not [name for name, data in contents(Path(cfg.output_dir)).items() if WRITE_TOKEN.encode() in data]
    assert WRITE_TOKEN not in log(cfg)


def test_push_and_pull_back(tmp_path, hub):
    cfg = combined(tmp_path / "run", hub={"push": True})
    assert train(cfg) == [0], log(cfg)
    assert hub.repos["user/run"].private
    assert hub.files("user/run") == contents(exported(cfg))
    assert f"pushed: {hub.endpoint}/user/run/commit/" in log(cfg)
    assert_no_token(cfg)
    kinds = {"stock": "DDPMPipeline", "ours": None}
    outs = {name: str(tmp_path / f"{name}.npy") for name in kinds}

    def pulls(_):
        hub.lead(tmp_path / "pulled", setattr)
        for name, stock in kinds.items():
            elsewhere.draw({"source": "user/run", "stock": stock, "prompts": None, "steps": 2, "out": outs[name]})

    gets = len([request for request in hub.requests if "/resolve/" in request.path])
    assert run(cfg, body=pulls) == [0], log(cfg)
    assert len([request for request in hub.requests if "/resolve/" in request.path]) > gets
    for out in outs.values():
        assert_same_picture(cfg, np.load(out))


def test_an_outage_at_the_end_costs_the_push_only(tmp_path, hub):
    cfg = combined(tmp_path / "run", hub={"push": True, "push_budget_minutes": 0.1})
    hub.fail("/preupload/|/commit/", 503, times=1000)
    assert train(cfg) == [5], log(cfg)
    assert (exported(cfg) / "model_index.json").exists()
    last = log(cfg).splitlines()[-1]
    assert f"The model is saved in {exported(cfg)}, but not on the Hub" in last
    assert f"finetune push {cfg.output_dir} --hub_model_id run" in last and "Traceback" not in log(cfg)
    assert_no_token(cfg)
    hub.rules.clear()
    before = {name: data for name, data in contents(Path(cfg.output_dir)).items() if name != ".lock"}
    words = last.partition("finetune push ")[2].split()
    command = [sys.executable, "-m", "finetune.cli", "push", *words]
    pushed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert pushed.returncode == 0, pushed.stderr
    assert "pushed: " in pushed.stderr
    after = {name: data for name, data in contents(Path(cfg.output_dir)).items() if name != ".lock"}
    assert after == before, "nothing is trained, drawn or exported again"
    assert hub.files("user/run") == contents(exported(cfg))


@pytest.mark.parametrize(("token", "advice"), [(READ_TOKEN, "a token that may write"), ("", "Run `hf auth login`")])
def test_a_push_that_cannot_work_is_said_before_anything_is_done(tmp_path, hub, monkeypatch, token, advice):
    monkeypatch.setenv("HF_TOKEN", token)
    cfg = combined(tmp_path / "run", hub={"push": True})
    assert train(cfg) == [2]
    assert advice in log(cfg) and "Traceback" not in log(cfg)
    assert not Path(cfg.output_dir).exists()
    assert not hub.repos


def test_no_error_shows_the_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    cfg = combined(tmp_path / "run")

    def fails(kind, cfg):
        monkeypatch.setattr(Trainer, "train_step", lambda *_: (_ for _ in ()).throw(kind(f"refused {WRITE_TOKEN}")))
        finetune.run.log.warning("sent %s", WRITE_TOKEN)
        finetune.run.train(cfg)

    assert run(cfg, body=partial(fails, RuntimeError)) == [1]
    assert run(cfg, body=partial(fails, ConfigError)) == [2]
    text = log(cfg)
    assert text.count("refused [token]") == 2 and text.count("sent [token]") == 2 and "Traceback" in text
    assert_no_token(cfg)


# ------------------------------------------------------------------------------------------------------ other entries


def test_a_data_set_in_memory(tmp_path):
    pictures = [Image.fromarray(np.full((8, 8, 3), 25 * i, np.uint8)) for i in range(8)]
    dataset = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
    cfg = combined(tmp_path / "run")
    cfg = replace(cfg, data=replace(cfg.data, dataset_name=None, max_train_samples=None))
    assert train(cfg, dataset) == [0], log(cfg)
    assert "from Python: 8 images" in log(cfg)
    assert "a data set passed from Python" in (exported(cfg) / "README.md").read_text()
    named = combined(tmp_path / "both")
    assert train(named, dataset) == [2]
    assert "give one of them" in log(named)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of eight pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.full((16, 20, 3), 25 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_command_as_diffusers_users_know_it(tmp_path, pictures):
    words = f"--train_data_dir {pictures} --output_dir {tmp_path / 'run'} --train_batch_size 4 --num_epochs 1 --use_ema"
    words = [*words.split(), "--learning_rate", "1e-4", "--lr_warmup_steps", "5"]
    cfg = load([*words, "--resolution", "64"], env={})
    assert (cfg.model.kind, cfg.space.kind, cfg.ema.use_ema, cfg.train.num_train_epochs) == ("unet2d", "pixel", True, 1)
    assert (cfg.train.train_batch_size, cfg.optimizer.lr_warmup_steps) == (4, 5)
    with torch.device("meta"):
        unet = build_unet(cfg, PixelSpace(channels=3, size=64), Unconditional(), seed=0)
    assert type(unet).__name__ == "UNet2DModel"
    assert sum(p.numel() for p in unet.parameters()) == 113_673_219
    small = load([*words, "--resolution", "16"], env={})
    assert train(small) == [2]
    assert "data.resolution must be a multiple of 32 (x0 of 32), got 16 (x0 of 16): use 32" in log(small)


def test_butterflies_with_pictures_of_ones_own(tmp_path, pictures, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = f"""
        --config configs/train/butterflies.yaml --dataset_name {pictures} --output_dir {tmp_path / 'run'}
        --hub.push false --resolution 8 --mixed_precision no --max_train_steps 2 --train_batch_size 4
        --block_out_channels 8 16 --layers_per_block 1 --norm_num_groups 4
        --down_block_types DownBlock2D AttnDownBlock2D --up_block_types AttnUpBlock2D UpBlock2D
        --sample.num_images 2 --num_inference_steps 2 --dataloader_num_workers 0
    """
    cfg = load(options.split(), env={})
    assert cfg.objective.beta_schedule == "linear" and cfg.optimizer.lr_warmup_steps == 500
    assert train(cfg) == [0], log(cfg)
    card = (exported(cfg) / "README.md").read_text()
    assert "DDPMPipeline" in card and str(tmp_path) not in card
    assert load(["--config", str(tmp_path / "run" / "config.yaml")], env={}) == cfg
    assert dump(cfg) == (tmp_path / "run" / "config.yaml").read_text()

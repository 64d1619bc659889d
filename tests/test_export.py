"""The export is the model that was trained: bit for bit, complete, replaced as a whole, silent about this machine."""

import getpass
import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import hub, plots
from finetune.config_io import load_text
from finetune.errors import FinetuneError, NonFiniteError
from finetune.export import check_finite, export, verify
from finetune.objective import build_objective
from finetune.pipelines import UNetPipeline, build_pipeline
from finetune.provenance import published_config, run_facts
from tiny_models import build, config, make_parts

torch.set_num_threads(1)

CARD = ["README.md", "config.yaml", "loss.png", "model_index.json", "run.json", "samples.png"]
UNET = ["scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
VAE = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
TEXT = [
    "text_encoder/config.json", "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
]  # fmt: skip
CASES = {
    "DDPMPipeline": (("pixel", "none", "unet2d"), [*CARD, *UNET]),
    "StableDiffusionPipeline": (("latent", "text", "unet2d_condition"), [*CARD, *UNET, *VAE, *TEXT]),
    "UNetPipeline by class": (("pixel", "class_label", "unet2d"), [*CARD, *UNET]),
    "UNetPipeline by text": (("latent", "pooled_text", "unet2d"), [*CARD, *UNET, *VAE, *TEXT]),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Tiny vae/, text_encoder/ and tokenizer/."""
    return make_parts(tmp_path_factory.mktemp("parts"))


class Run:
    """A run in tmp_path/secret-folder/run with real parts, as the trainer hands it to `export`."""

    def __init__(self, parts: Path, root: Path, combination=CASES["DDPMPipeline"][0], **sections) -> None:
        self.output_dir = root / "secret-folder" / "run"
        self.output_dir.mkdir(parents=True)
        data = {"train_data_dir": str(root / "secret-folder" / "photos")}
        self.cfg = config(parts, *combination, data=data, **sections)
        self.unet, space, conditioner = build(self.cfg)
        objective = build_objective(self.cfg.objective, clip_sample=self.cfg.space.kind == "pixel")
        self.pipeline = build_pipeline(self.unet, space, conditioner, objective.scheduler, self.cfg)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "step.png")
        lines = [{"step": i, "loss": 1 / i, "lr": 1e-4, "samples_seen": 16 * i} for i in range(1, 5)]
        (self.output_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        facts = run_facts(self.cfg) | {"data": {"rows": 3, "left_out": 0}, "data_fingerprint": "0f" * 16}
        facts["command"] = f"train_unet.py --train_data_dir {data['train_data_dir']} --vae {parts}/vae"
        self.arguments = {
            "cfg": self.cfg, "run": facts, "samples": root / "step.png", "metrics": self.output_dir / "metrics.jsonl"
        }  # fmt: skip

    def export(self) -> Path:
        return export(self.pipeline, output_dir=self.output_dir, **self.arguments)


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, parts, tmp_path):
    combination, files = CASES[name]
    run = Run(parts, tmp_path, combination)
    folder = run.export()
    assert type(run.pipeline).__name__ == name.split()[0]
    assert folder == run.output_dir / "pipeline"
    assert sorted(listing(folder)) == sorted(files) == sorted(hub.check(folder))
    assert not [path for path in run.output_dir.iterdir() if path.name.startswith(".")]
    loaded = type(run.pipeline).from_pretrained(folder, local_files_only=True)
    for key, tensor in run.unet.state_dict().items():
        assert torch.equal(tensor, loaded.unet.state_dict()[key])
    assert load_text((folder / "config.yaml").read_text()) == published_config(run.cfg)


def test_stock_pipelines_need_nothing_of_ours(parts, tmp_path):
    folder = Run(parts, tmp_path).export()
    images = DiffusionPipeline.from_pretrained(folder)(num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()


def test_frozen_parts_are_the_ones_that_were_loaded(parts, tmp_path):
    folder = Run(parts, tmp_path, ("latent", "text", "unet2d_condition")).export()
    for component, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        source = load_file(parts / component / f"{file}.safetensors")
        exported = load_file(folder / component / f"{file}.safetensors")
        assert source.keys() == exported.keys() and all(torch.equal(source[key], exported[key]) for key in source)
    assert (folder / "tokenizer/tokenizer.json").read_bytes() == (parts / "tokenizer/tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_this_machine_is_in_any_byte(name, parts, tmp_path):
    run = Run(parts, tmp_path, CASES[name][0])
    run.unet.register_to_config(_name_or_path=str(tmp_path / "secret-folder" / "base"))
    user = getpass.getuser()
    words = [socket.gethostname(), str(tmp_path), str(parts), str(Path.home()) + "/", os.getcwd(), "secret-folder"]
    words = [word for word in (*words, user, *tmp_path.parts[2:], *parts.parts[2:]) if len(word) > 3]
    ends = {word: b"" if word.endswith("/") else rb"(?!\w)" for word in words}
    patterns = [re.compile(rb"(?<!\w)" + re.escape(word.encode()) + ends[word]) for word in words]
    files = listing(run.export())
    hits = [(file, p.pattern) for file, content in files.items() for p in patterns if p.search(content)]
    assert not hits
    config = json.loads(files["unet/config.json"])
    assert config["_name_or_path"] == "base"
    local = (run.output_dir / "local.json").write_text(json.dumps(run.arguments["run"]))
    assert local and b"secret-folder" in (run.output_dir / "local.json").read_bytes()  # negative control: it was there


def test_a_hub_id_in_name_or_path_stays(parts, tmp_path):
    run = Run(parts, tmp_path)
    run.unet.register_to_config(_name_or_path="/x/hub/models--google--ddpm-cat-256/snapshots/0abc/unet")
    assert json.loads((run.export() / "unet/config.json").read_text())["_name_or_path"] == "google/ddpm-cat-256"


def test_an_export_replaces_the_one_before_it_whole(parts, tmp_path):
    run = Run(parts, tmp_path)
    before = listing(run.export())
    (run.output_dir / "pipeline" / "stray.txt").write_text("from an earlier version")
    with torch.no_grad():
        next(run.unet.parameters()).add_(1)
    after = listing(run.export())
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["unet/diffusion_pytorch_model.safetensors"]


def test_the_same_model_gives_the_same_bytes(parts, tmp_path):
    run = Run(parts, tmp_path)
    assert listing(run.export()) == listing(run.export())


def test_files_can_be_read_as_the_umask_says(parts, tmp_path):
    modes = {path.stat().st_mode & 0o777 for path in Run(parts, tmp_path).export().rglob("*") if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_and_the_earlier_export_stays(value, parts, tmp_path):
    run = Run(parts, tmp_path)
    before = listing(run.export())
    with torch.no_grad():
        run.unet.conv_out.bias[1] = value
    with pytest.raises(NonFiniteError, match=r"unet: the weight conv_out\.bias"):
        run.export()
    with pytest.raises(NonFiniteError):
        check_finite(run.pipeline)
    assert listing(run.output_dir / "pipeline") == before
    assert sorted(path.name for path in run.output_dir.iterdir()) == ["metrics.jsonl", "pipeline"]


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_the_earlier_export_and_nothing_else(exception, parts, tmp_path, monkeypatch):
    run = Run(parts, tmp_path)
    before = listing(run.export())

    def fail(*_, **__):
        raise exception("in the middle")

    monkeypatch.setattr("finetune.export.model_card", fail)
    with torch.no_grad():
        next(run.unet.parameters()).add_(1)
    with pytest.raises(exception):
        run.export()
    assert listing(run.output_dir / "pipeline") == before
    assert sorted(path.name for path in run.output_dir.iterdir()) == ["metrics.jsonl", "pipeline"]


def test_what_a_killed_export_left_is_undone(parts, tmp_path):
    """Killed between the two renames, the old folder stands aside; killed earlier, a half-written one stands there."""
    run = Run(parts, tmp_path)
    before = listing(run.export())
    (run.output_dir / "pipeline").rename(run.output_dir / ".pipeline-old-123")
    (run.output_dir / ".pipeline-tmp-123").mkdir()
    original = run.pipeline.save_pretrained
    run.pipeline.save_pretrained = lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        run.export()
    assert listing(run.output_dir / "pipeline") == before
    assert sorted(path.name for path in run.output_dir.iterdir()) == ["metrics.jsonl", "pipeline"]
    run.pipeline.save_pretrained = original
    assert listing(run.export()) == before


def flip_weight(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"].view(-1).view(torch.int32)[5] ^= 1  # the last bit of one number
    save_file(tensors, path, metadata={"format": "pt"})


def change(file: str, **entries):
    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | entries))

    return apply


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (flip_weight, "weight conv_in.weight of unet"),
        (change("unet/config.json", flip_sin_to_cos=False), "unet has other settings.*flip_sin_to_cos"),
        (change("scheduler/scheduler_config.json", beta_end=0.5), "scheduler has other settings.*beta_end"),
        (change("model_index.json", num_classes=7), "model_index.json has other settings.*num_classes"),
    ],
)
def test_verify_finds_what_differs(damage, found, parts, tmp_path):
    run = Run(parts, tmp_path, ("pixel", "class_label", "unet2d"))
    folder = run.export()
    verify(run.pipeline, folder, same_kernels=True)
    damage(folder)
    with pytest.raises(FinetuneError, match=found):
        verify(run.pipeline, folder, same_kernels=True)


def test_verify_compares_what_is_drawn(parts, tmp_path):
    """A tokenizer is no weight and no setting, but changes what is drawn."""
    run = Run(parts, tmp_path, ("latent", "pooled_text", "unet2d"))
    folder = run.export()
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a</w>"], vocab["b</w>"] = vocab["b</w>"], vocab["a</w>"]
    path.write_text(json.dumps(content))
    with pytest.raises(FinetuneError, match="samples differ"):
        verify(run.pipeline, folder, same_kernels=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parts_survive(dtype, parts, tmp_path):
    run = Run(parts, tmp_path, ("latent", "class_label", "unet2d"))
    run.pipeline.vae.to(dtype)
    stored = load_file(run.export() / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}


def test_without_samples_and_metrics(parts, tmp_path):
    run = Run(parts, tmp_path)
    run.arguments |= {"samples": None, "metrics": None}
    folder = run.export()
    assert not {"samples.png", "loss.png"} & listing(folder).keys()
    assert ".png)" not in (folder / "README.md").read_text()


def test_metrics_are_drawn(tmp_path):
    lines = [{"step": i, "loss": 2.0**-i, "lr": 1e-4} for i in range(5)]
    plots.draw_loss(lines, tmp_path / "loss.png")
    plots.draw_loss([{"step": 1, "loss": 0.0}], tmp_path / "one.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (840, 480) and len(np.unique(np.asarray(image))) > 20
        assert not image.text  # no software, no date: the same run gives the same bytes


def test_ours_is_ours():
    assert UNetPipeline.__module__ == "finetune.pipelines"  # what the card tells people to import

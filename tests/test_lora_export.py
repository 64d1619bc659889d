"""What a LoRA run leaves: files that a process of its own loads as the LoRA in memory, a card, and a way to merge."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

import finetune.lora_proof as proof
import tiny
from finetune import cli, hub
from finetune.config import TrainConfig
from finetune.config_io import dump, load_text
from finetune.errors import ConfigError, FinetuneError, NonFiniteError
from finetune.lora import base_dtype, hold_base
from finetune.lora_export import export_lora
from finetune.lora_formats import adapters_of, write_diffusers
from finetune.lora_metadata import tag_frequency
from finetune.lora_pipeline import adaptable, base_pipeline
from finetune.pretrained import lora_file
from finetune.provenance import published_config, run_facts
from finetune.run import train
from finetune.sample import load_pipeline
from finetune.trainer import Trainer
from forked import log
from forked import run as run_forked
from tiny_lora import SD, disturb
from tiny_models import PROMPTS, UNET2D, make_parts

torch.set_num_threads(1)

UNET = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4, **SD, "cross_attention_dim": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A pipeline of SD 1.5's layout, in a folder of its name: 32x32 pixels, x0 of 8x8."""
    folder = make_parts(tmp_path_factory.mktemp("secret-folder") / "tiny-sd")
    torch.manual_seed(0)
    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    return folder


def config(model: Path, output_dir: Path, **sections) -> TrainConfig:
    text = {"text_encoder": str(model / "text_encoder"), "tokenizer": str(model / "tokenizer")}
    settings = {
        "output_dir": str(output_dir),
        "data": {"resolution": 32, "train_data_dir": str(model.parent / "10_photos")},
        "space": {"kind": "latent", "vae": str(model / "vae")},
        "conditioning": {"kind": "text", **text},
        "model": {"kind": "pretrained", "pretrained_model_name_or_path": str(model), "subfolder": "unet"},
        "sample": {"num_inference_steps": 2, "prompts": PROMPTS, "guidance_scale": 1},
    }
    return TypeAdapter(TrainConfig).validate_python(settings | sections)


class Run:
    """A run with a trained LoRA, as the trainer hands it to `export_lora`."""

    def __init__(self, cfg: TrainConfig, *, text=True, target=("to_q", "proj_in", "conv1"), **lora) -> None:
        self.cfg, self.output_dir = cfg, Path(cfg.output_dir)
        self.output_dir.mkdir(parents=True)
        self.pipeline = base_pipeline(cfg, {})
        torch.manual_seed(1)
        for part, module in adaptable(self.pipeline).items():
            if part == "unet" or text:
                targets = list(target) if part == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
                inject_adapter_in_model(LoraConfig(target_modules=targets, r=2, **lora), module)
                disturb(module)
        picture = self.output_dir / "step.png"
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
        metrics = self.output_dir / "metrics.jsonl"
        metrics.write_text(json.dumps({"step": 7, "loss": 0.5, "lr": 1e-4, "epoch": 1.2}) + "\n")
        run = run_facts(cfg) | {"data": {"rows": 3, "left_out": 0}}
        (self.output_dir / "config.yaml").write_text(dump(cfg))
        (self.output_dir / "run.json").write_text(json.dumps(run))
        self.arguments = {"cfg": cfg, "run": run, "samples": picture, "metrics": metrics}

    def export(self, **more) -> Path:
        return export_lora(self.pipeline, output_dir=self.output_dir, **self.arguments, **more)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Run:
    """A run of both UNet and text encoder that is exported in both namings, each proved in a fresh process."""
    run = Run(config(model, tmp_path_factory.mktemp("runs") / "my lora"), lora_alpha=3)
    run.folder = run.export(kohya=True, tags={"red": 2, "blue": 1})
    return run


def test_the_folder(run):
    names = ["README.md", "config.yaml", "loss.png", "my_lora_kohya.safetensors", "pytorch_lora_weights.safetensors",
             "run.json", "samples.png"]  # fmt: skip
    assert sorted(path.name for path in run.folder.iterdir()) == names == sorted(hub.check(run.folder))
    assert load_text((run.folder / "config.yaml").read_text()) == published_config(run.cfg)
    assert not [path for path in run.output_dir.iterdir() if path.name.startswith(".")]


def test_nothing_of_this_machine_is_in_any_byte(run, model):
    words = [str(model.parent), str(run.output_dir.parent), "secret-folder", str(Path.home()) + "/"]
    found = [(path.name, word) for path in run.folder.iterdir() for word in words if word.encode() in path.read_bytes()]
    assert not found
    assert "secret-folder" in (run.output_dir / "config.yaml").read_text()  # negative control: it was there


def test_sd_scripts_metadata(run):
    with safe_open(run.folder / "my_lora_kohya.safetensors", framework="pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_output_name": "my lora",
        "ss_sd_model_name": "tiny-sd",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "3.0",
        "ss_network_args": '{"conv_dim": 2, "conv_alpha": 3.0}',
        "ss_learning_rate": "0.0001",
        "ss_steps": "7",
        "ss_num_train_images": "3",
        "ss_resolution": "(32, 32)",
        "ss_tag_frequency": '{"10_photos": {"red": 2, "blue": 1}}',
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "my lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "32x32",
    }
    assert {name: metadata.get(name) for name in expected} == expected
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", metadata["modelspec.date"])


def test_tags_are_counted_once_an_image():
    assert tag_frequency([("red, dog", "red,cat "), ("a red dog",), ("",)]) == {
        "red": 1, "dog": 1, "cat": 1, "a red dog": 1
    }  # fmt: skip


def test_the_card(run, model, tmp_path):
    card = (run.folder / "README.md").read_text()
    assert "A LoRA for `tiny-sd`" in card and "rank 2, scale 1.5" in card and "my_lora_kohya" in card
    assert "- lora\n" in card and "diffusers reads from version 0.34 on" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.S)[1]
    compile(snippet, "card", "exec")
    assert "pipeline.load_lora_weights('.', weight_name='pytorch_lora_weights.safetensors')" in snippet
    assert "base_model" not in card.split("---")[1]  # a local folder is no model of the Hub


def test_a_base_on_the_hub_stands_in_the_cards_header(run):
    from finetune.card import LoraWords, model_card

    settings = TypeAdapter(TrainConfig).dump_python(run.cfg)
    settings["model"]["pretrained_model_name_or_path"] = "org/model"
    cfg = TypeAdapter(TrainConfig).validate_python(settings)
    words = LoraWords(sentence="A LoRA.", usage="Use it.")
    card = model_card(cfg, run.arguments["run"], pipeline="", samples=False, metrics=[], lora=words)
    assert "base_model: org/model\nbase_model_relation: adapter\n" in card


def test_sampling_from_the_run_is_sampling_from_memory(run):
    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline(PROMPTS[0], num_inference_steps=2, generator=generator, output_type="np").images

    memory = draw(run.pipeline)
    assert np.array_equal(draw(load_pipeline(str(run.output_dir))), memory)
    assert not np.allclose(draw(base_pipeline(run.cfg, {})), memory, atol=1e-2)


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "my_lora_kohya.safetensors"])
def test_merge(run, model, tmp_path, file, capsys):
    base = base_pipeline(run.cfg, {})
    base.save_pretrained(tmp_path / "base")
    out = tmp_path / "merged"
    command = ["merge", str(run.folder / file), "--base", str(tmp_path / "base"), "--out", str(out)]
    assert cli.main(command) == 0, capsys.readouterr().err
    assert re.search(r"(\d+) of \1 tensors matched, scale 1\n", capsys.readouterr().out)
    merged, memory = proof.probe(adaptable(DiffusionPipeline.from_pretrained(out))), proof.probe(run_modules(run))
    plain = proof.probe(adaptable(base))
    for part, output in memory.items():
        assert torch.allclose(merged[part], output, atol=1e-4 * float(output.abs().max()))
        assert not torch.allclose(plain[part], output, atol=0.01)
    names, others = ({path.relative_to(at).as_posix() for path in at.rglob("*")} for at in (out, tmp_path / "base"))
    assert names == others
    assert cli.main(command) == 2 and "exists: name a new folder" in capsys.readouterr().err


def run_modules(run):
    return adaptable(run.pipeline)


def test_merging_half_of_it_into_a_unet_folder(model, tmp_path):
    run = Run(config(model, tmp_path / "run"), text=False, target=["to_q"], use_dora=True)
    write_diffusers(adapters_of(run_modules(run)), tmp_path / "lora.safetensors")
    command = ["merge", str(tmp_path / "lora.safetensors"), "--base", str(model / "unet"), "--out"]
    outputs = {}
    for scale in ("0.5", "1"):
        assert cli.main([*command, str(tmp_path / scale), "--scale", scale]) == 0
        outputs[scale] = proof.probe({"unet": UNet2DConditionModel.from_pretrained(tmp_path / scale)})["unet"]
    assert torch.allclose(outputs["1"], proof.probe(run_modules(run))["unet"], atol=1e-4)
    assert not torch.allclose(outputs["1"], outputs["0.5"], atol=1e-3)


@pytest.mark.parametrize(
    ("lora", "found"),
    [("nowhere/at/all", "is no LoRA: give"), ("{model}/unet", "keys fit no layer"), ("{model}", "is no LoRA: give")],
)
def test_what_cannot_be_merged(lora, found, model, tmp_path, capsys):
    command = ["merge", lora.format(model=model), "--base", str(model / "unet"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert found in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_where_a_lora_lies(run, tmp_path):
    expected = run.folder / "pytorch_lora_weights.safetensors"
    assert {lora_file(str(place), setting="x") for place in (expected, run.folder, run.output_dir)} == {expected}
    for name in "ab":
        (tmp_path / f"{name}.safetensors").touch()
    with pytest.raises(ConfigError, match="holds 2 .safetensors files"):
        lora_file(str(tmp_path), setting="x")


def test_the_proof_rounds_the_base_as_the_training_did(model, tmp_path, monkeypatch):
    run = Run(config(model, tmp_path / "run"), text=False)
    hold_base(run.pipeline.unet, torch.bfloat16)
    assert base_dtype(run.pipeline.unet) == torch.bfloat16
    monkeypatch.setattr("finetune.lora_proof._ask", proof._answer)  # what the fresh process does, in this one
    run.export()
    monkeypatch.setattr("finetune.lora_proof.base_dtype", lambda _: torch.float32)
    with pytest.raises(FinetuneError, match="the unet computes something else"):  # negative control
        run.export()


def test_a_failed_proof_leaves_the_earlier_export(run, monkeypatch):
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}

    def fail(*_):
        raise FinetuneError("it is another one")

    monkeypatch.setattr("finetune.lora_export.prove", fail)
    with pytest.raises(FinetuneError, match="another one"):
        run.export()
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    assert not [path for path in run.output_dir.iterdir() if path.name.startswith(".")]


def test_a_lora_that_is_not_finite_is_refused(model, tmp_path):
    run = Run(config(model, tmp_path / "run"), text=False, target=["to_q"])
    next(p for name, p in run.pipeline.unet.named_parameters() if "lora_A" in name).data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="lora_A"):
        run.export()


def test_the_proof_sees_what_differs(run):
    """The comparison alone; what a fresh process answers is exchanged."""
    modules = run_modules(run)
    expected = proof._tensors(modules)
    proof._compare("file", expected, dict(expected))
    matrix = next(key for key in expected if key.endswith("lora_B.weight"))
    turned = expected[matrix].clone()
    turned.view(-1).view(torch.int32)[0] ^= 1  # the last bit of one number
    for change, found in [
        ({matrix: turned}, "is another one"),
        ({"output.unet": expected["output.unet"] * 1.01}, "the unet computes something else"),
        ({"output.text_encoder": expected["output.text_encoder"] * float("nan")}, "the text_encoder computes"),
        ({"unet.more": turned}, "1 tensors are in one of them only"),
    ]:
        with pytest.raises(FinetuneError, match=found):
            proof._compare("file", expected, expected | change)


def test_a_whole_run_of_a_unet_without_a_loader_in_diffusers(tmp_path):
    """A UNet2DModel: trained, proved, sampled by this package, and the card says so; a second run goes on from it."""
    shape = {name: value for name, value in UNET2D.items() if name != "kind"}
    UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **shape).save_pretrained(tmp_path / "base" / "unet")
    cfg = tiny.config(tmp_path / "run", lora={"rank": 2, "alpha": 3, "target": "all"}, data={"channels": 1},
                      conditioning={"kind": "none"}, train={"max_train_steps": 2})  # fmt: skip
    values = TypeAdapter(TrainConfig).dump_python(cfg)
    values["model"] = {"kind": "pretrained", "pretrained_model_name_or_path": str(tmp_path / "base")}
    cfg = TypeAdapter(TrainConfig).validate_python(values)

    def body(cfg):
        train(cfg)

    assert run_forked(cfg, body=body) == [0], log(cfg)
    folder = tmp_path / "run" / "pipeline"
    count = re.search(r"weights.safetensors: loaded in a fresh process, (\d+) of \1 tensors matched", log(cfg))
    card = (folder / "README.md").read_text()
    assert count and "finetune merge pytorch_lora_weights.safetensors --base 'base'" in card
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert len(stored) == int(count[1])
    pipeline = load_pipeline(str(tmp_path / "run"))
    drawn = adapters_of(adaptable(pipeline))["unet"].tensors
    assert all(torch.equal(stored[f"unet.{key}"], tensor) for key, tensor in drawn.items())

    values["lora"]["pretrained"], values["output_dir"] = str(tmp_path / "run"), str(tmp_path / "second")
    second = Trainer(TypeAdapter(TrainConfig).validate_python(values))
    begun = adapters_of({"unet": second.modules.unet})["unet"].tensors
    assert all(torch.equal(stored[f"unet.{key}"], tensor) for key, tensor in begun.items())
    values["export"] = {"kohya": True}
    with pytest.raises(ConfigError, match="this UNet2DModel is none of them"):  # before a step is made
        Trainer(TypeAdapter(TrainConfig).validate_python(values))


def test_kohya_needs_a_lora(model, tmp_path):
    with pytest.raises(ValidationError, match=r"export.kohya: the format is one of LoRAs, and none is trained"):
        config(model, tmp_path, export={"kohya": True})


def test_the_proof_computes_without_autocast_whatever_accelerate_put_in(model):
    """With train.mixed_precision the trained UNet has a `forward` of its own; the fresh process has not."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    plain = proof.probe({"unet": unet})["unet"]
    inputs = torch.ones(1, 4, 8, 8), 7, torch.ones(1, 4, 16)
    unet.forward = prepared = torch.autocast("cpu", torch.bfloat16)(unet.forward)
    assert unet(*inputs).sample.dtype == torch.bfloat16, "negative control"
    assert torch.equal(proof.probe({"unet": unet})["unet"], plain) and unet.forward is prepared

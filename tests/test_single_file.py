"""Stable Diffusion in one file, by the original names of its weights, which are written here the other way round."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import tiny_pipelines
from finetune.config_io import load
from finetune.errors import ConfigError
from finetune.foundation import resolve
from forked import run
from tiny import config

pretrained = tiny_pipelines.pretrained
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
UNET = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0",
        "time_embedding.linear_2": "time_embed.2", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
VAE = {"conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
       "mid_block.attentions.0": "mid.attn_1", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q",
       "to_k": "k", "to_v": "v", "to_out.0": "proj_out", ".resnets.": ".block.", "downsamplers.0": "downsample",
       "upsamplers.0": "upsample", "down_blocks": "down"}  # fmt: skip


def unet_names(unet) -> dict[str, torch.Tensor]:
    """Of the original UNet: its blocks are numbered through."""
    places, n = dict(UNET), 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            places |= {f"down_blocks.{level}.resnets.{layer}": f"input_blocks.{n}.0"}
            places |= {f"down_blocks.{level}.attentions.{layer}": f"input_blocks.{n}.1"}
            n += 1
        if block.downsamplers:
            places |= {f"down_blocks.{level}.downsamplers.0.conv": f"input_blocks.{n}.0.op"}
            n += 1
    n = 0
    for level, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for layer in range(len(block.resnets)):
            places |= {f"up_blocks.{level}.resnets.{layer}": f"output_blocks.{n}.0"}
            places |= {f"up_blocks.{level}.attentions.{layer}": f"output_blocks.{n}.1"}
            n += 1
        if block.upsamplers:
            places |= {f"up_blocks.{level}.upsamplers.0.conv": f"output_blocks.{n - 1}.{1 + attends}.conv"}
    named = {}
    for name, tensor in unet.state_dict().items():
        place = next(place for place in places if name.startswith(f"{place}."))
        rest = name.removeprefix(place)
        if ".resnets." in name:
            part = rest.split(".")[1]
            rest = rest.replace(part, RESNET[part], 1)
        named[f"model.diffusion_model.{places[place]}{rest}"] = tensor
    return named


def vae_names(vae) -> dict[str, torch.Tensor]:
    """Of the original VAE: its way up is numbered from the finest level, its attention is made of convolutions."""
    named = {}
    for name, tensor in vae.state_dict().items():
        if "attentions" in name and name.endswith("weight") and "norm" not in name:
            tensor = tensor[:, :, None, None]
        for ours, theirs in VAE.items():
            name = name.replace(ours, theirs)
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", name)
        named[f"first_stage_model.{name}"] = tensor
    return named


def open_clip_names(encoder, prefix) -> dict[str, torch.Tensor]:
    """Of OpenCLIP, XL's second encoder: query, key and value in one."""
    weights = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    named = {"text_projection": weights.pop("text_projection.weight").T}
    for name, tensor in weights.items():
        name = name.replace("encoder.layers", "transformer.resblocks").replace("final_layer_norm", "ln_final")
        name = name.replace("embeddings.token_embedding", "token_embedding").replace("layer_norm", "ln_")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        name = name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj").replace("self_attn", "attn")
        if joined := re.search(r"q_proj.(weight|bias)", name):
            parts = [weights[f"encoder.layers.{name.split('.')[2]}.self_attn.{one}_proj.{joined[1]}"] for one in "qkv"]
            named[name.replace(f"q_proj.{joined[1]}", f"in_proj_{joined[1]}")] = torch.cat(parts)
        elif not re.search("[kv]_proj", name):
            named[name] = tensor
    return {prefix + name: tensor for name, tensor in named.items()}


def single_file(folder, path, dtype=torch.float32):
    """The pipeline of `folder` in one file."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    xl = hasattr(pipeline, "text_encoder_2")
    text = "conditioner.embedders.0" if xl else "cond_stage_model"
    encoder = {name.removeprefix("text_model."): t for name, t in pipeline.text_encoder.state_dict().items()}
    named = unet_names(pipeline.unet) | vae_names(pipeline.vae)
    named |= {f"{text}.transformer.text_model.{name}": tensor for name, tensor in encoder.items()}
    if xl:
        named |= open_clip_names(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in named.items()}, path)
    return path


def configured(path, run, *options):
    words = f"--pretrained_model_name_or_path={path} --train_data_dir=x --resolution=64 --output_dir={run}"
    return load([*words.split(), *options], env={})


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_unpacked_it_is_the_pipeline(pretrained, tmp_path, kind):
    folder, path = pretrained(kind), single_file(pretrained(kind), tmp_path / "model.safetensors")
    cfg = resolve(configured(path, tmp_path / "run", f"--single_file_config={folder}"))
    [base] = (tmp_path / "run").iterdir()
    assert cfg.model.pretrained_model_name_or_path == str(base) and cfg.space.vae == str(base) and not cfg.is_open
    found, truth = DiffusionPipeline.from_pretrained(base), DiffusionPipeline.from_pretrained(folder)
    assert type(found) is type(truth) and found.scheduler.config == truth.scheduler.config
    for part in [part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if part in truth.components]:
        mine, theirs = getattr(found, part).state_dict(), getattr(truth, part).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine), part
    before = base.stat().st_mtime_ns
    assert resolve(configured(path, tmp_path / "run", f"--single_file_config={folder}")) == cfg
    assert base.stat().st_mtime_ns == before  # unpacked once
    assert resolve(cfg) == cfg


def test_refused(pretrained, tmp_path):
    path, folder = single_file(pretrained("sd15"), tmp_path / "model.safetensors"), pretrained("sd15")
    old = tmp_path / "model.ckpt"
    old.write_bytes(b"")
    for name, options, problem in (
        (old, [], "a .ckpt can run code"),
        (path, [], "holds weights only: name the pipeline"),
        (path, [f"--single_file_config={folder}", "--variant=fp16"], "neither model.variant nor"),
        (path, [f"--single_file_config={pretrained('inpaint')}"], "is a StableDiffusionInpaintPipeline: only"),
        (path, [f"--single_file_config={pretrained('sdxl')}"], r"model.safetensors (is no|lacks)"),
        (folder, [f"--single_file_config={folder}"], "goes with a single file only"),
    ):
        with pytest.raises(ConfigError, match=problem):
            resolve(configured(name, tmp_path / "run", *options))
    assert not list(tmp_path.glob("run/*"))


def test_two_processes_train_from_it_and_resume(pretrained, tmp_path):
    path = single_file(pretrained("sd15"), tmp_path / "model.safetensors")
    cfg = configured(path, tmp_path / "run", f"--single_file_config={pretrained('sd15')}", "--max_train_steps=2")
    tiny = config(tmp_path)
    steps = replace(tiny.train, max_train_steps=2, global_batch_size=2)
    few = replace(tiny.sample, num_images=1)
    cfg = replace(cfg, data=replace(tiny.data, resolution=64), train=steps, tracking=tiny.tracking, sample=few)
    assert run(cfg, processes=2) == [0, 0]
    assert len(list((tmp_path / "run").glob("*base-*"))) == 1
    assert run(cfg) == [0]  # finds itself done

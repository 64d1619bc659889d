"""Inpainting: nine channels, of a pipeline for it or widened, as StableDiffusionInpaintPipeline joins them."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

import test_foundation
import tiny_pipelines
from finetune.batching import first_batch
from finetune.data import open_data
from finetune.errors import ConfigError
from finetune.foundation import resolve
from finetune.models import bind
from finetune.run import train
from finetune.seeding import PositionRandom
from test_foundation import Step, configured

pretrained, images = tiny_pipelines.pretrained, test_foundation.images


@torch.no_grad()
def test_channels_are_those_of_diffusers_pipeline(pretrained, images):
    step = Step(configured(pretrained("inpaint"), images))
    pipeline, seen = StableDiffusionInpaintPipeline.from_pretrained(pretrained("inpaint")), []
    pipeline.unet.conv_in.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    part, batch = step.modules.conditioner.parts["inpaint"], step.batch
    ours = part.of(batch)["inpaint"]
    mean = pipeline.vae.encode(batch.pixel_values * (part.masks(4, (64, 64)) < 0.5)).latent_dist.mean
    pipeline.vae.encode = lambda image: SimpleNamespace(latents=mean)  # in place of a sample
    pipeline(batch.captions, image=batch.pixel_values / 2 + 0.5, mask_image=part.masks(4, (64, 64)),
             num_inference_steps=1, guidance_scale=1.0, output_type="latent")  # fmt: skip
    torch.testing.assert_close(seen[0][:, 4:], ours, atol=1e-5, rtol=1e-4)
    drawn = part.of(batch, PositionRandom(0, batch.positions))["inpaint"]
    assert (drawn[:, 0] != ours[:, 0]).any() and set(drawn[:, 0].unique().tolist()) <= {0.0, 1.0}


def test_masks_are_drawn_per_position(pretrained, images):
    part = Step(configured(pretrained("inpaint"), images)).modules.conditioner.parts["inpaint"]
    positions = torch.arange(400)
    masks = part.masks(400, (64, 48), PositionRandom(0, positions))
    assert torch.equal(masks[7:9], part.masks(2, (64, 48), PositionRandom(0, positions[7:9])))
    shares = masks.flatten(1).mean(1)
    assert 0.2 < (shares == 1).float().mean() < 0.3 and shares.min() >= 0.25**2 - 0.01
    edges = masks[:, 0].any(2).float().mean(0)  # how often each line is hidden in part
    assert edges[0] > 0.25 and edges[-1] > 0.25 and edges[32] > 0.6


@torch.no_grad()
def test_a_widened_unet_computes_at_first_what_it_did(pretrained, images):
    plain, wide = (Step(configured(pretrained("sd15"), images, *more)) for more in ([], ["--conditioning.inpaint={}"]))
    assert wide.modules.unet.config.in_channels == 9 and wide.modules.conditioner.kind == "text+inpaint"
    torch.testing.assert_close(wide.loss(), plain.loss())
    other = wide.loss(lambda condition: condition | {"inpaint": condition["inpaint"] + 1})
    torch.testing.assert_close(other, plain.loss())
    random = PositionRandom(0, wide.batch.positions)
    x, condition = random.normal("x", (4, 8, 8)), wide.modules.conditioner(wide.batch, random)
    wide.modules.unet.conv_in.weight[:, 4:] = 0.1  # negative control: the new channels are read
    changed = bind(wide.modules.unet, condition)(x, torch.tensor(5))
    assert not torch.allclose(changed, bind(plain.modules.unet, plain.modules.conditioner.of(plain.batch))(x, 5))


@pytest.mark.parametrize(("kind", "options"), [("inpaint", []), ("sd15", ["--conditioning.inpaint={}"])])
def test_a_run_ends_in_diffusers_pipeline(pretrained, images, tmp_path, kind, options):
    cfg = configured(pretrained(kind), images, f"--output_dir={tmp_path / 'run'}", *options)
    exported = train(cfg)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(exported)
    assert pipeline.unet.config.in_channels == 9 and pipeline.unet.conv_in.weight[:, 4:].any()
    assert Image.open(exported / "samples.png").size[0] > 3 * 64  # masked, drawn, truth
    shown = first_batch(open_data(resolve(cfg)), 1)
    result = pipeline("a cat", image=shown.pixel_values / 2 + 0.5, mask_image=torch.ones(1, 1, 64, 64),
                      num_inference_steps=2, output_type="np").images  # fmt: skip
    assert result.shape == (1, 64, 64, 3)
    again = resolve(configured(exported, images))
    assert again.conditioning.inpaint.full_mask == 0.25 and again.conditioning.text.text_encoder == str(exported)


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        ("sdxl", "--conditioning.inpaint={}", "only a StableDiffusionPipeline can be made one"),
        ("inpaint", "--validation_prompt=a", "training samples are shown"),
        ("inpaint", "--space.kind=pixel", "it goes with a text alone and space.kind latent"),
        ("inpaint", "--conditioning.kind=none", "in_channels 9, x0 has 4 channels"),
        ("inpaint", "--clip_skip=1", "StableDiffusionInpaintPipeline alone, which has no clip_skip"),
    ],
)
def test_refused(pretrained, images, tmp_path, kind, options, problem):
    with pytest.raises(ConfigError, match=problem):
        train(configured(pretrained(kind), images, f"--output_dir={tmp_path / 'run'}", *options.split()))

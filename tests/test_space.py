"""Encoding and decoding against AutoencoderKL by hand, and what a VAE must fit."""

import pytest
import torch
from diffusers import AutoencoderKL

from finetune.errors import ConfigError
from finetune.seeding import PositionRandom
from finetune.space import LatentSpace, PixelSpace, build_space
from tiny_models import batch, config, parts  # noqa: F401

PIXELS = batch(range(4)).pixel_values


@pytest.fixture(scope="module")
def space(parts):  # noqa: F811
    return build_space(config(parts, "latent"))


def test_latents_are_those_of_diffusers(parts, space):  # noqa: F811
    vae = AutoencoderKL.from_pretrained(parts / "vae").eval()
    with torch.no_grad():
        mean = vae.encode(PIXELS).latent_dist.mode() * 0.7
        torch.testing.assert_close(space.encode(PIXELS), mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(space.decode(mean), vae.decode(mean / 0.7).sample, rtol=0, atol=1e-5)
    assert (space.channels, space.size, space.factor) == (4, 4, 4)
    assert space.parameters_frozen == sum(p.numel() for p in vae.parameters())


def test_the_posterior_is_sampled_by_position(space):
    random = PositionRandom(0, torch.arange(4))
    posterior = space.vae.encode(PIXELS).latent_dist
    expected = (posterior.mean + posterior.std * random.normal("posterior", (4, 4, 4))) * 0.7
    torch.testing.assert_close(space.encode(PIXELS, random), expected, rtol=0, atol=1e-6)
    assert (space.encode(PIXELS, random) - space.encode(PIXELS)).abs().max() > 0.01
    half = space.encode(PIXELS[2:], PositionRandom(0, torch.arange(2, 4)))
    torch.testing.assert_close(half, space.encode(PIXELS, random)[2:], rtol=0, atol=1e-5)


def test_shift_and_scale_undo_each_other(parts):  # noqa: F811
    vae = AutoencoderKL.from_pretrained(parts / "vae", shift_factor=0.3)
    shifted = LatentSpace(vae, size=4)
    z = vae.encode(PIXELS).latent_dist.mode()
    torch.testing.assert_close(shifted.encode(PIXELS), (z - 0.3) * 0.7, rtol=0, atol=1e-6)
    torch.testing.assert_close(shifted.decode(shifted.encode(PIXELS)), vae.decode(z).sample, rtol=0, atol=1e-5)


def test_the_vae_is_frozen_and_knows_no_autocast(space):
    assert not space.vae.training and not any(p.requires_grad for p in space.vae.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        x0 = space.encode(PIXELS)
        assert torch.equal(x0, space.encode(PIXELS)) and x0.dtype == torch.float32
        pixels = space.decode(x0)
    assert torch.equal(x0, space.encode(PIXELS)) and torch.equal(pixels, space.decode(x0))
    assert not x0.requires_grad


def test_pixel_space_is_the_identity(parts):  # noqa: F811
    space = build_space(config(parts))
    assert isinstance(space, PixelSpace) and (space.channels, space.size) == (3, 16)
    assert torch.equal(space.decode(space.encode(PIXELS)), PIXELS)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"resolution": 18}}, "multiple of 4 .* got 18: use 16 or 20"),
        ({"data": {"resolution": 2}}, "got 2: use 4$"),
        ({"data": {"channels": 1}}, "channels of 3|3 channels"),
        ({"space": {"vae": "./nowhere/vae"}}, "space.vae: './nowhere/vae' is neither a folder .* nor a Hub id"),
        ({"space": {"vae": "nobody/no-such-vae"}}, "space.vae: the Hub repository nobody/no-such-vae cannot be loaded"),
        ({"space": {"revision": "main"}}, "a local folder has no revision"),
        ({"space": {"subfolder": "missing"}}, "has no folder 'missing'"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused(parts, sections, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        build_space(config(parts, "latent", **sections))


def test_another_model_is_refused(parts):  # noqa: F811
    with pytest.raises(ConfigError, match="must be an AutoencoderKL"):
        build_space(config(parts, "latent", space={"vae": str(parts / "text_encoder")}))


def test_missing_weights_are_refused(parts, tmp_path):  # noqa: F811
    from safetensors.torch import load_file, save_file

    AutoencoderKL.from_pretrained(parts / "vae").save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("encoder.conv_in.weight")
    save_file(weights, path)
    with pytest.raises(ConfigError, match="every weight .* encoder.conv_in.weight"):
        build_space(config(parts, "latent", space={"vae": str(tmp_path)}))

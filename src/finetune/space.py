"""Where the diffusion happens: on pixels, or on the latents of a frozen VAE. Both encode to x0 and decode back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from finetune.errors import ConfigError
from finetune.frozen import Frozen
from finetune.pretrained import load_model_config

if TYPE_CHECKING:
    from finetune.batching import Batch
    from finetune.config import TrainConfig
    from finetune.seeding import PositionRandom


class PixelSpace:
    """x0 is the image itself."""

    factor = 1
    """Side of the image over side of x0."""
    parameters_frozen = 0
    """Parameters of the frozen VAE."""

    def __init__(self, *, channels: int, size: int) -> None:
        """channels and side of x0, which are those of the image."""
        self.channels, self.size = channels, size

    def encode(self, pixels: Tensor, random: PositionRandom | None = None) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> the same in float32."""
        return pixels.float()

    def x0(self, batch: Batch, random: PositionRandom, device: torch.device | str) -> Tensor:
        """x0 of a training batch, on `device`."""
        return self.encode(batch.pixel_values.to(device, non_blocking=True), random)

    def decode(self, x0: Tensor) -> Tensor:
        """[B, C, H, W] -> the same; not clamped."""
        return x0


class LatentSpace:
    """x0 is a latent of a frozen AutoencoderKL, shifted and scaled to about unit variance (Rombach et al. 2022)."""

    def __init__(self, vae: AutoencoderKL, *, size: int, weights: Frozen | None = None) -> None:
        """vae: frozen here. size: side of the latents. weights: of a hollow VAE, taken when it computes."""
        self.vae = vae.requires_grad_(False).eval()
        self.weights = weights
        self.size = size
        self.channels: int = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.parameters_frozen = sum(p.numel() for p in vae.parameters())
        self._shift = vae.config.shift_factor or 0.0  # None for most
        self._scale: float = vae.config.scaling_factor

    def encode(self, pixels: Tensor, random: PositionRandom | None = None) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> (z - shift) * scale, [B, c, H/factor, W/factor] float32.

        z is a sample of the VAE's posterior, drawn by `random`; without it, the posterior's mean.
        """
        return self.draw(self.moments(pixels), random)

    def x0(self, batch: Batch, random: PositionRandom, device: torch.device | str) -> Tensor:
        """x0 of a training batch, on `device`: drawn from the moments that were cached, or encoded."""
        if batch.moments is None:
            return self.encode(batch.pixel_values.to(device, non_blocking=True), random)
        return self.draw(batch.moments.to(device, non_blocking=True), random)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> mean and log-variance of the posterior, [B, 2c, H/factor, W/factor] float32."""
        self.load("to encode images")
        with torch.autocast(pixels.device.type, enabled=False):  # half-precision VAEs overflow
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
            return torch.cat([posterior.mean, posterior.logvar], 1).float()

    @torch.no_grad()
    def draw(self, moments: Tensor, random: PositionRandom | None = None) -> Tensor:
        """[B, 2c, h, w] as `moments` gives them, of any precision -> x0 as `encode` gives it."""
        with torch.autocast(moments.device.type, enabled=False):
            z, logvar = moments.float().chunk(2, 1)
            if random is not None:
                z = z + (0.5 * logvar).exp() * random.normal("posterior", z.shape[1:])
        return (z - self._shift) * self._scale

    def load(self, why: str) -> None:
        """See that the VAE has its weights, on its device."""
        if self.weights is not None:
            self.weights.fill(self.vae, why=why)

    def put_aside(self) -> None:
        """Let the device have the VAE's memory until it is needed again; only of a VAE whose latents are cached."""
        if self.weights is not None:
            self.weights.put_aside(self.vae)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B, c, h, w] as `encode` makes them -> pixels [B, C, h*factor, w*factor] float32; not clamped."""
        self.load("to decode latents")
        with torch.autocast(x0.device.type, enabled=False):
            return self.vae.decode((x0.float() / self._scale + self._shift).to(self.vae.dtype)).sample.float()


Space = PixelSpace | LatentSpace


def build_space(cfg: TrainConfig, device: torch.device | str = "cpu") -> Space:
    """The space that cfg.space names, with its VAE loaded to `device` and frozen in float32.

    With cfg.cache.latents it is not loaded before it computes: training alone does not need it.

    Raises ConfigError if the VAE cannot be loaded or does not fit the images of cfg.data.
    """
    channels, resolution = cfg.data.channels, cfg.data.resolution
    if cfg.space.kind == "pixel":
        return PixelSpace(channels=channels, size=resolution)
    place = {"setting": "space.vae", "revision": cfg.space.revision, "subfolder": cfg.space.subfolder}
    config = load_model_config(AutoencoderKL, cfg.space.vae, **place)
    if config.get("_class_name") != "AutoencoderKL":
        raise ConfigError(
            f"space.vae must be an AutoencoderKL, {cfg.space.vae} holds a {config.get('_class_name')}: "
            'name its folder, such as space.subfolder "vae" of a pipeline'
        )
    frozen = Frozen(cls=AutoencoderKL, name=cfg.space.vae, variant=cfg.space.variant, device=device, **place)
    vae = frozen.hollow() if cfg.cache.latents else frozen.load()
    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
        raise ConfigError(
            f"space.vae {cfg.space.vae} normalises each channel (latents_mean, latents_std), which this version does "
            "not do: use a VAE with a scaling_factor alone"
        )
    if vae.config.in_channels != channels:
        raise ConfigError(
            f"space.vae {cfg.space.vae} reads images of {vae.config.in_channels} channels, data.channels is {channels}"
            f": set data.channels to {vae.config.in_channels}"
        )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % factor:
        below, above = resolution // factor * factor, -(-resolution // factor) * factor
        choices = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"data.resolution must be a multiple of {factor} for the VAE {cfg.space.vae}, got {resolution}: "
            f"use {choices}"
        )
    return LatentSpace(vae, size=resolution // factor, weights=frozen if cfg.cache.latents else None)

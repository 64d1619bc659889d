"""Make the embedded default assets: digits, a tiny VAE, a tiny CLIP text encoder with its tokenizer.

    python assets/make_assets.py --out assets                # everything, about four minutes on one CPU core
    python assets/make_assets.py --out assets --only text    # one part: data, vae or text

Every part follows from fixed seeds on one thread with deterministic kernels, so two runs on one machine and one set of
library versions write identical bytes. `make_text.py` beside this file holds the text part.
"""

import argparse
import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, Value
from diffusers import AutoencoderKL
from make_text import DIGITS, PHRASINGS, caption, make_text
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from torch import Tensor

SIDE, SOURCE_SIDE, SOURCE_MAX = 32, 8, 16  # stored side in pixels; side and white level of the source
LEVELS = 51  # grey steps stored, 5 of 255 apart: the PNGs shrink by a fifth, the block means stay
HELD_OUT_EVERY = 6  # row r is held out of VAE training when r % 6 == 0
VAE_STEPS, VAE_BATCH, VAE_LR = 2800, 16, 8e-3
KL_WEIGHT = 5e-5  # on the mean over latent values, beside the mean over pixel values of the squared error
LATENT_JITTER = 0.2  # largest std of the extra noise that the decoder learns to absorb; the prior has std 1


def enlarge(digits: Tensor) -> Tensor:
    """Enlarge grey digits [N,8,8] in [0,1] to [N,32,32]: each 4x4 block keeps the mean of the pixel it came from.

    Bicubic enlargement followed by back-projection (Irani & Peleg 1991, "Improving resolution by image registration"):
    the error of the block means, enlarged, is added until area reduction gives the source back. Plain bicubic
    enlargement alone is off by up to 4.5 of 16 grey levels.
    """
    identity = np.eye(SOURCE_SIDE, dtype=np.float32)
    columns = [
        np.asarray(PILImage.fromarray(row[None]).resize((SIDE, 1), PILImage.Resampling.BICUBIC))[0] for row in identity
    ]
    up = torch.tensor(np.stack(columns, axis=1), dtype=torch.float64)  # [32,8], acts on rows and columns alike
    images = up @ digits.double() @ up.T
    for _ in range(100):
        images = images.clamp(0, 1)
        images += up @ (digits - reduce(images)) @ up.T
    return images.clamp(0, 1)


def reduce(images: Tensor) -> Tensor:
    """Reduce [N,32,32] to [N,8,8] by area: the mean of each 4x4 block."""
    return F.avg_pool2d(images[:, None], SIDE // SOURCE_SIDE)[:, 0]


def make_data(out: Path) -> None:
    """Write digits/train.parquet: the 1,797 digits in scikit-learn's order, as 32x32 grey PNG, label and caption."""
    source = load_digits()
    levels = (enlarge(torch.tensor(source.images) / SOURCE_MAX) * LEVELS).round()
    images = []
    for array in (levels * (255 // LEVELS)).to(torch.uint8).numpy():
        png = io.BytesIO()
        PILImage.fromarray(array).save(png, format="PNG", optimize=True)
        images.append({"bytes": png.getvalue(), "path": None})
    seen = [0] * len(DIGITS)  # phrasings go round within each class, so every digit meets every phrasing equally often
    texts = []
    for label in source.target.tolist():
        texts.append(caption(label, seen[label] % len(PHRASINGS)))
        seen[label] += 1
    rows = {"image": images, "label": source.target.tolist(), "text": texts}
    features = Features({"image": Image(), "label": ClassLabel(names=list(DIGITS)), "text": Value("string")})
    (out / "digits").mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(out / "digits" / "train.parquet")


def read_pixels(out: Path) -> Tensor:
    """Read the stored digits as [1797,3,32,32] float32 in [-1,1]."""
    rows = Dataset.from_parquet(str(out / "digits" / "train.parquet"), keep_in_memory=True)
    grey = torch.tensor(np.stack([np.asarray(image) for image in rows["image"]]))
    return (grey.float() / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)


def held_out(count: int) -> Tensor:
    """Mask [count] of the rows that VAE training never saw."""
    return torch.arange(count) % HELD_OUT_EVERY == 0


def build_vae() -> AutoencoderKL:
    """A fresh AutoencoderKL, [N,3,32,32] <-> [N,4,8,8], without attention."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 3 pixels and darken its ink to as little as 60%: keeps decoding sane off the data."""
    count = len(pixels)
    padded = F.pad(pixels, (3, 3, 3, 3), value=-1.0)
    shift = torch.randint(0, 7, (2, count), generator=generator)
    rows = (torch.arange(SIDE) + shift[0, :, None])[:, None, :, None]
    columns = (torch.arange(SIDE) + shift[1, :, None])[:, None, None, :]
    moved = padded[torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]
    ink = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
    return (moved + 1) * ink - 1


def train_vae(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Minimise squared error + KL_WEIGHT * KL (Kingma & Welling 2014) on half-augmented batches of `pixels`."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(vae.parameters(), lr=VAE_LR, betas=(0.9, 0.99))
    for step in range(VAE_STEPS):
        decay = 0.5 * (1 + math.cos(math.pi * step / VAE_STEPS))
        optimizer.param_groups[0]["lr"] = VAE_LR * min(1.0, (step + 1) / 100) * decay
        batch = pixels[torch.randint(len(pixels), (VAE_BATCH,), generator=generator)]
        batch = torch.cat([batch[: VAE_BATCH // 2], augment(batch[VAE_BATCH // 2 :], generator)])
        posterior = vae.encode(batch).latent_dist
        jitter = LATENT_JITTER * torch.rand(VAE_BATCH, 1, 1, 1, generator=generator)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        latents = posterior.mean + (posterior.var + jitter**2).sqrt() * noise
        error = F.mse_loss(vae.decode(latents).sample, batch)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        optimizer.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 0:
            print(f"vae step {step}: mse {error.item():.5f} kl {kl.item():.3f}", flush=True)


@torch.no_grad()
def level_channels(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Give every latent channel mean 0 and the same std over `pixels`, and set `scaling_factor` to one over that std.

    Exact: the affine map is folded into the 1x1 convolutions on both sides of the latents, so decoding is unchanged.
    """
    posterior = vae.encode(pixels).latent_dist
    mean = posterior.mean.mean((0, 2, 3))
    std = (posterior.mean.var((0, 2, 3)) + posterior.var.mean((0, 2, 3))).sqrt()  # of posterior samples
    common = std.log().mean().exp()
    gain = common / std
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1 / common.item(), 4))


def make_vae(out: Path) -> None:
    """Train the VAE on the stored digits that are not held out and write it to vae/."""
    pixels = read_pixels(out)
    pixels = pixels[~held_out(len(pixels))]
    torch.manual_seed(0)
    vae = build_vae()
    train_vae(vae, pixels)
    level_channels(vae.eval(), pixels)
    vae.save_pretrained(out / "vae")


@torch.no_grad()
def measure(out: Path) -> dict[str, float]:
    """Measure what README.md states: reconstruction over the held-out digits, latents over the others.

    Latents are posterior samples times `scaling_factor`, what a diffusion model sees.
    """
    vae = AutoencoderKL.from_pretrained(out, subfolder="vae").eval()
    scale = vae.config.scaling_factor
    pixels = read_pixels(out)
    mask = held_out(len(pixels))
    generator = torch.Generator().manual_seed(0)
    posterior = vae.encode(pixels[mask]).latent_dist
    sample = posterior.sample(generator)
    noisy = sample + 0.1 / scale * torch.randn(sample.shape, generator=generator)
    figures = {}
    for name, latents in {"mean": posterior.mean, "sample": sample, "sample + 0.1 noise": noisy}.items():
        error = F.mse_loss(vae.decode(latents).sample, pixels[mask]).item()
        figures |= {f"MSE, {name}": error, f"PSNR in dB, {name}": 10 * math.log10(4 / error)}
    posterior = vae.encode(pixels[~mask]).latent_dist
    latents = posterior.sample(generator) * scale
    figures["latent std"] = latents.std().item()
    figures["posterior std"] = (posterior.std * scale).mean().item()
    figures["largest latent"] = latents.abs().max().item()
    for channel, values in enumerate(latents.unbind(1)):
        figures[f"channel {channel} mean"] = values.mean().item()
        figures[f"channel {channel} std"] = values.std().item()
        figures[f"channel {channel} kurtosis"] = ((values - values.mean()) / values.std()).pow(4).mean().item()
    return figures


def main() -> None:
    """Parse the command line and make the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder that receives the parts")
    parser.add_argument("--only", choices=("data", "vae", "text"), help="make one part (vae reads the data in --out)")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    parts = {"data": make_data, "vae": make_vae, "text": make_text}
    for name, make in parts.items():
        if args.only in (None, name):
            make(args.out)
    if args.only in (None, "vae"):
        for name, value in measure(args.out).items():
            print(f"| {name} | {value:.3g} |")


if __name__ == "__main__":
    main()

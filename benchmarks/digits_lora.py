"""Teach the digits of runs/digits_text2img one new style by a LoRA, and measure who shows it.

    python benchmarks/digits_lora.py [--samples 20] [--seed 1000] [--picture docs/images/digits_lora.png]

The style is a slant to the right: every digit is sheared by 0.6, its caption says "a slanted handwritten seven". Half
of the data are slanted, half as they were, under their own captions. Trains configs/train/digits_text2img.yaml where
there is no such run, then configs/train/digits_lora.yaml from nothing; and draws `samples` images of each digit with
the word and without it, from the LoRA and, as a control, from the model that it began with.
  slanted  share whose slant is above 0.3; the slant of ink w at (x, y), y upwards, is cov(x, y) / var(y) by w, which a
           shear by s raises by s. Of the real digits it is so of 0.1 %, of the sheared ones of 98.5 %
  read     share that the judge of digits_quality.py, which saw upright digits, reads as the digit asked for, after the
           shear is undone where the word was in the prompt
Prints a table and one line of JSON.
"""

import argparse
import io
import json
import os
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from digits_quality import NAMES, judge, to_vector
from digits_recipes import ROOT, train
from finetune.config_io import load_text
from finetune.sample import generate, grid, load_pipeline

SHEAR, SLANTED = 0.6, 0.3
WORDS = {"without": "a handwritten {}", "with": "a slanted handwritten {}"}
BASE, DATA, RUN = Path("runs/digits_text2img"), Path("runs/digits_slanted"), Path("runs/digits_lora")


def sheared(image: Image.Image, by: float) -> Image.Image:
    """The image with each row moved to the right by `by` times its height above the middle."""
    middle = (image.height - 1) / 2
    map_back = (1, by, -by * middle, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, map_back, Image.Resampling.BILINEAR)


def slant(image: Image.Image) -> float:
    """How far the ink leans to the right per unit of height."""
    ink = np.asarray(image.convert("L"), dtype=np.float64)
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]]
    x, y = x - np.average(x, weights=ink), np.average(y, weights=ink) - y
    return np.average(x * y, weights=ink) / np.average(y**2, weights=ink)


def make_data(folder: Path) -> None:
    """Write the upright and the slanted digits with their captions as one Parquet file."""
    real = load_dataset(str(ROOT / "assets" / "digits"), split="train")
    images = [*real["image"], *(sheared(image, SHEAR) for image in real["image"])]
    texts = [*real["text"], *(WORDS["with"].format(NAMES[label]) for label in real["label"])]
    rows = {"image": [{"bytes": _png(image), "path": None} for image in images], "text": texts}
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw(run: Path, how: str, samples: int, seed: int) -> list[Image.Image]:
    """`samples` images of each digit, with the word or without it."""
    cfg = load_text((run / "config.yaml").read_text())
    return generate(
        load_pipeline(str(run)),
        prompts=[WORDS[how].format(name) for name in NAMES for _ in range(samples)],
        num_images=10 * samples,
        seed=seed,
        num_inference_steps=cfg.sampling_steps,
        guidance_scale=cfg.sample.guidance_scale,
        batch_size=50,
    )


def measure(images: list[Image.Image], how: str, samples: int) -> dict[str, float]:
    """The shares that are slanted, and read as the digit asked for."""
    upright = [sheared(image, -SHEAR) for image in images] if how == "with" else images
    vectors = np.stack([to_vector(image) for image in upright])
    read = judge(vectors, np.repeat(np.arange(10), samples))["read"]
    return {"slanted": float(np.mean([slant(image) > SLANTED for image in images])), "read": float(read)}


def main() -> None:
    """Train what is missing, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--picture", type=Path, help="where to draw two of each digit without the word and two with it")
    args, options = parser.parse_known_args()  # further options are those of the training
    os.chdir(ROOT)
    if not (BASE / "pipeline").is_dir():
        train("digits_text2img", BASE)
    make_data(DATA)
    row = {"samples": 10 * args.samples, **train("digits_lora", RUN, options)}
    print(f"{'':24}{'slanted':>10}{'read':>10}")
    shown = []
    for run in (BASE, RUN):
        for how in WORDS:
            images = draw(run, how, args.samples, args.seed)
            row[f"{run.name} {how}"] = found = measure(images, how, args.samples)
            print(f"{f'{run.name}, {how}':24}{found['slanted']:10.1%}{found['read']:10.1%}", flush=True)
            shown += [images[digit * args.samples + n] for n in range(2) for digit in range(10)] if run == RUN else []
    print(json.dumps(row))
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        grid(shown, columns=10).save(args.picture)


if __name__ == "__main__":
    main()

"""How good the digits of a finished run are: read by a judge that saw real digits only, and as varied as those.

    python benchmarks/digits_quality.py runs/digits [--samples 20] [--seed 1000] [--guidance_scale G]

From the exported pipeline, `samples` images of each digit. Every image is reduced to the 8x8 grey of the data set.
  read       share that an RBF support-vector machine, fitted on the 1,797 real digits, reads as the digit asked for
  diversity  mean pairwise distance of the samples of a digit over that of the real ones, averaged over the digits
  copies     share that lie nearer to a real image of their digit than the 1st percentile of the distances from each
             real image to its nearest other one of its digit
Prints a table and one line of JSON.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.distance import cdist, pdist
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from finetune.config_io import load_text
from finetune.sample import generate, load_pipeline

NAMES = "zero one two three four five six seven eight nine".split()


def to_vector(image: Image.Image) -> np.ndarray:
    """Any size, any mode -> [64] in 0..16, as in load_digits."""
    return np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=np.float64).ravel() * 16 / 255


def judge(samples: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """samples [N, 64] in 0..16, asked [N] in 0..9 -> read, diversity, copies, each as a share."""
    real, labels = load_digits(return_X_y=True)
    read = SVC(gamma=0.001, C=10).fit(real, labels).predict(samples) == asked
    diversity, copies = [], []
    for digit in range(10):
        theirs, ours = real[labels == digit], samples[asked == digit]
        diversity.append(pdist(ours).mean() / pdist(theirs).mean())
        among = cdist(theirs, theirs)
        np.fill_diagonal(among, np.inf)
        copies += list(cdist(ours, theirs).min(1) < np.percentile(among.min(1), 1))
    return {"read": read.mean(), "diversity": np.mean(diversity), "copies": np.mean(copies)}


def draw(run: Path, samples: int, seed: int, guidance_scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    """`samples` images of each digit, from a run or a pipeline folder -> vectors [10 * samples, 64], digits asked."""
    cfg = load_text((run / "config.yaml").read_text())
    asked = np.repeat(np.arange(10), samples)
    if cfg.conditioning.kind == "class_label":
        wanted = {"class_labels": asked.tolist()}
    else:
        wanted = {"prompts": [f"a handwritten {NAMES[digit]}" for digit in asked]}
    images = generate(
        load_pipeline(str(run)),
        **wanted,
        num_images=len(asked),
        seed=seed,
        num_inference_steps=cfg.sampling_steps,
        guidance_scale=cfg.sample.guidance_scale if guidance_scale is None else guidance_scale,
        batch_size=50,
    )
    return np.stack([to_vector(image) for image in images]), asked


def arguments(description: str, *, samples: int) -> argparse.Namespace:
    """run, samples, seed and guidance_scale from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--guidance_scale", type=float)
    return parser.parse_args()


def main() -> None:
    """Judge one run."""
    args = arguments(__doc__, samples=20)
    start = time.perf_counter()
    result = judge(*draw(args.run, args.samples, args.seed, args.guidance_scale))
    seconds = time.perf_counter() - start
    print(f"{'run':24}{'read':>10}{'diversity':>12}{'copies':>10}{'seconds':>10}")
    print(f"{args.run.name:24}{result['read']:10.1%}{result['diversity']:12.1%}{result['copies']:10.1%}{seconds:10.0f}")
    print(json.dumps({"run": args.run.name, "samples": 10 * args.samples, **result, "seconds": seconds}))


if __name__ == "__main__":
    main()

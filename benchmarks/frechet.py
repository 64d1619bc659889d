"""How far the digits of a finished run are from the real ones: the Frechet distance on features that the data fix.

    python benchmarks/frechet.py runs/digits [--samples 100] [--seed 1000] [--guidance_scale G]

From the exported pipeline, or one that `finetune ema` made, 10 * `samples` images: as many of each digit, or any of an
unconditional pipeline. Every image is reduced to the 8x8 grey of the data set. Two sets of features, neither
learned from anything but the 1,797 real digits, so that the numbers can be repeated anywhere and compared between runs
of the same number of samples; they are no FID, whose features are those of an Inception network:
  pixels     the 32 leading principal components of the real digits, each scaled to unit variance among them
  judge      the ten decision values of the RBF support-vector machine that digits_quality.py reads digits with
The floor is what as many real digits as there are samples (at most half of them) are from the others.
Prints a table and one line of JSON.
"""

import json
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from digits_quality import arguments, draw, to_vector
from finetune.config_io import load_text
from finetune.frechet import frechet_distance
from finetune.sample import generate, load_pipeline

COMPONENTS = 32


def features(images: np.ndarray) -> dict[str, np.ndarray]:
    """images [N, 64] in 0..16 -> pixels [N, 32], judge [N, 10]."""
    real, labels = load_digits(return_X_y=True)
    values, vectors = np.linalg.eigh(np.cov(real, rowvar=False))
    leading = vectors[:, -COMPONENTS:] / np.sqrt(values[-COMPONENTS:])
    judge = SVC(gamma=0.001, C=10, decision_function_shape="ovr").fit(real, labels)
    return {"pixels": (images - real.mean(0)) @ leading, "judge": judge.decision_function(images)}


def distances(images: np.ndarray) -> dict[str, float]:
    """images [N, 64] in 0..16 -> for each set of features the distance to the real digits, and its floor."""
    real = load_digits().data
    ours, theirs = features(images), features(real)
    order = np.random.RandomState(0).permutation(len(real))
    some, others = np.split(order, [min(len(images), len(real) // 2)])
    result = {name: frechet_distance(ours[name], theirs[name]) for name in theirs}
    return result | {f"{name}_floor": frechet_distance(theirs[name][some], theirs[name][others]) for name in theirs}


def draw_any(run: Path, samples: int, seed: int, guidance_scale: float | None) -> np.ndarray:
    """10 * `samples` images of a run or a pipeline folder, conditional or not -> [10 * samples, 64] in 0..16."""
    cfg = load_text((run / "config.yaml").read_text())
    if cfg.conditioning.kind != "none":
        return draw(run, samples, seed, guidance_scale)[0]
    steps = cfg.sample.num_inference_steps
    pipeline = load_pipeline(str(run))
    images = generate(pipeline, num_images=10 * samples, seed=seed, num_inference_steps=steps, batch_size=50)
    return np.stack([to_vector(image) for image in images])


def main() -> None:
    """Measure one run."""
    args = arguments(__doc__, samples=100)
    start = time.perf_counter()
    result = distances(draw_any(args.run, args.samples, args.seed, args.guidance_scale))
    seconds = time.perf_counter() - start
    print(f"{'run':24}{'pixels':>10}{'(floor)':>10}{'judge':>10}{'(floor)':>10}{'seconds':>10}")
    numbers = "".join(f"{result[name]:10.3f}" for name in ("pixels", "pixels_floor", "judge", "judge_floor"))
    print(f"{args.run.name:24}{numbers}{seconds:10.0f}")
    print(json.dumps({"run": args.run.name, "samples": 10 * args.samples, **result, "seconds": seconds}))


if __name__ == "__main__":
    main()

"""Train one UNet by each family of objectives on as many images, and compare what comes of it.

    python benchmarks/digits_families.py [FAMILY ...] [--out runs/families]

Each family is configs/train/digits_iddpm.yaml (digits by class, 16 px, pixel space) in 500 steps, with the options
below and nothing else changed. All are judged by 200 pictures (digits_quality.py, frechet.py), drawn without guidance
in as many evaluations of the network; those with a variational bound also by bits per dimension of 50 images, which
they were trained on. Prints a table, and one line of JSON per family.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from digits_quality import draw, judge
from digits_recipes import ROOT, train
from frechet import distances

STEPS = ["--train.max_train_steps", "500"]
KIND, LINEAR = "--objective.kind", ["--objective.beta_schedule", "linear"]
PLAIN = ["--objective.variance.kind", "fixed_small"]
V = [*PLAIN, "--objective.prediction_type", "v_prediction"]
FAMILIES = {
    "epsilon": PLAIN,
    "v": V,
    "v, zero terminal SNR": [*V, *LINEAR, "--objective.rescale_betas_zero_snr", "true"],
    "IDDPM hybrid": [],
    "IDDPM bound": ["--objective.variance.vb_loss", "rescaled_kl", "--objective.levels.kind", "loss_second_moment"],
    "EDM": [KIND, "edm", "--sample.scheduler", "edm_heun", "--sample.num_inference_steps", "25"],
    "rectified flow": [KIND, "flow", "--sample.scheduler", "flow_euler"],
}


def bits_per_dim(run: Path) -> float:
    """Of 50 images, by `finetune evaluate`."""
    command = ["-m", "finetune.cli", "evaluate", str(run), "--metrics", "bpd", "--num_samples", "50"]
    subprocess.run([sys.executable, *command], check=True)
    return json.loads((run / "evaluation" / "bpd.json").read_text())["total"]["mean"]


def main() -> None:
    """Train and judge each family in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    args = parser.parse_args()
    os.chdir(ROOT)
    rows = []
    for family in args.families:
        run = args.out / family.replace(" ", "_").replace(",", "")
        row = {"family": family, **train("digits_iddpm", run, [*STEPS, *FAMILIES[family]])}
        samples, asked = draw(run, samples=20, seed=1000, guidance_scale=None)
        row |= judge(samples, asked) | {"frechet": distances(samples)["pixels"]}
        if KIND not in FAMILIES[family]:
            row["bits_per_dim"] = bits_per_dim(run)
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{'family':24}{'time':>8}{'read':>8}{'diversity':>11}{'copies':>8}{'Frechet':>9}{'bits/dim':>10}")
    for row in rows:
        quality = f"{row['read']:8.1%}{row['diversity']:11.1%}{row['copies']:8.1%}{row['frechet']:9.2f}"
        bits = f"{row['bits_per_dim']:10.3f}" if "bits_per_dim" in row else ""
        print(f"{row['family']:24}{row['seconds']:6.0f} s{quality}{bits}")


if __name__ == "__main__":
    main()

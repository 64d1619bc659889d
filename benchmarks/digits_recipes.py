"""Train the digits recipes as a user would, and report wall time, peak memory and quality of each.

    python benchmarks/digits_recipes.py [RECIPE ...] [--out runs/benchmark]

Time is that of the whole `accelerate launch` command: start, check of the data, training, samples, export. Memory is
the highest resident set of the training process. Quality: see digits_quality.py; a recipe that is told no
digit has none. Prints a table, and one line of JSON per recipe.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from digits_quality import draw, judge

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "train").glob("digits*.yaml") if path.stem != "digits_lora")
"""All but that of digits_lora.py, which needs the data and the model that are made there."""


def train(recipe: str, output_dir: Path, options: Sequence[str] = ()) -> dict[str, float]:
    """Run the recipe, with further options, from nothing -> seconds and peak_memory_mb."""
    shutil.rmtree(output_dir, ignore_errors=True)
    accelerate = ["-m", "accelerate.commands.accelerate_cli", "launch"]
    device = "one_gpu" if torch.cuda.is_available() else "cpu"
    launcher = ["--config_file", f"configs/accelerate/{device}.yaml"]
    recipe_file = f"configs/train/{recipe}.yaml"
    command = [*accelerate, *launcher, "train_unet.py", "--config", recipe_file, "--output_dir", str(output_dir)]
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, *command, *options], os.environ)
    _, status, usage = os.wait4(child, 0)  # the usage of the launcher and of the trainer that it waited for
    assert os.waitstatus_to_exitcode(status) == 0, f"{recipe} failed"
    return {"seconds": time.perf_counter() - start, "peak_memory_mb": usage.ru_maxrss / 2**10}


def main() -> None:
    """Train and judge each recipe in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args()
    os.chdir(ROOT)
    rows = []
    for recipe in args.recipes:
        row = {"recipe": recipe, **train(recipe, args.out / recipe)}
        if recipe not in ("digits_pixel", "digits_upsample"):  # which are not told a digit
            row |= judge(*draw(args.out / recipe, samples=20, seed=1000, guidance_scale=None))
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{'recipe':20}{'time':>8}{'memory':>10}{'read':>8}{'diversity':>11}{'copies':>8}")
    for row in rows:
        quality = [f"{row[name]:.1%}" if name in row else "" for name in ("read", "diversity", "copies")]
        minutes, memory = f"{row['seconds']:.0f} s", f"{row['peak_memory_mb'] / 1024:.1f} GB"
        print(f"{row['recipe']:20}{minutes:>8}{memory:>10}{quality[0]:>8}{quality[1]:>11}{quality[2]:>8}")


if __name__ == "__main__":
    main()

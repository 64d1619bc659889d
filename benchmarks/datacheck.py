"""What the check of the data costs at the start of a run: the first time, and when nothing changed since.

    python benchmarks/datacheck.py [--images 1000] [--side 512] [--files 10000] [--repeats 7]

Writes JPEG images of noise in colours that vary slowly (--images of --side pixels) and small PNG files (--files) into a
temporary folder, and prints one line of JSON per figure; seconds are medians. The three times of the unchanged files
are taken in turns: bare os.stat of each file; `check`, which finds its answer in the cache; `open_data`, which
lists the folder too. "beyond_stat" is what they take longer than the stat calls; the goal is below 0.1 s for 10,000.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from finetune.config import TrainConfig
from finetune.data import open_data
from finetune.datacheck import check


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def write_images(folder: Path, count: int, side: int, suffix: str) -> TrainConfig:
    """Write images of slow noise, and the configuration that opens them."""
    folder.mkdir()
    for number in range(count):
        coarse = np.random.RandomState(number).randint(0, 256, (max(2, side // 16),) * 2 + (3,), np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.{suffix}")
    return TrainConfig(output_dir="unused", data={"resolution": 16, "train_data_dir": str(folder)})


def first_time(folder: Path, count: int, side: int, repeats: int) -> dict:
    """The check of images that were never seen."""
    cfg = write_images(folder, count, side, "jpg")
    times = []
    for repeat in range(repeats):
        datasets.config.HF_CACHE_HOME = folder.parent / f"cache_{repeat}"
        times.append(seconds(lambda: open_data(cfg, progress=False)))
    stored = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "figure": "check", "images": count, "side": side, "megabytes": round(stored / 1e6, 1),
        "seconds": statistics.median(times), "seconds_per_1000": 1000 * statistics.median(times) / count,
    }  # fmt: skip


def unchanged(folder: Path, count: int, repeats: int) -> list[dict]:
    """The check of files that were checked before, beside the stat calls that it cannot do without."""
    cfg = write_images(folder, count, 16, "png")
    datasets.config.HF_CACHE_HOME = folder.parent / "cache"
    data = open_data(cfg, progress=False)
    files, rows = [str(folder / name) for name in sorted(os.listdir(folder))], np.arange(count)
    actions = {
        "stat": lambda: [os.stat(file) for file in files],
        "check": lambda: check(data.table, rows, cfg.data, progress=False),
        "open_data": lambda: open_data(cfg, progress=False),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(seconds(action))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return [
        {
            "figure": f"unchanged files, {name}", "files": count, "seconds": medians[name], "stat": medians["stat"],
            "beyond_stat": medians[name] - medians["stat"], "ratio": medians[name] / medians["stat"],
        }
        for name in ("check", "open_data")
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 1000), ("side", 512), ("files", 10_000), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [first_time(Path(folder) / "images", args.images, args.side, args.repeats)]
        lines += unchanged(Path(folder) / "files", args.files, args.repeats)
    for line in lines:
        print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}))


if __name__ == "__main__":
    main()

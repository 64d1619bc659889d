"""What the caches cost and give: making latents beside a bare encode loop, reading records at random, memory by number.

    python benchmarks/cache.py [--images 24] [--resolution 256] [--records 4000] [--repeats 3]

Prints one line of JSON per figure. Making: pictures of --resolution through an AutoencoderKL of random weights with the
shape of Stable Diffusion's at a quarter of its width, from files to records on the disk (decoding, resizing and writing
included), and the bare loop that encodes ready pixels; the two take turns, the figures are medians. Reading: records of
8x64x64 float16 (mean and log-variance of 512x512 pixels) in random order on one core, checksums included; the goal is
5,000 per second. Memory: growth of the resident set of a fresh process that reads every record of a cache of 1,000,
10,000 and 100,000 small ones, and of 8x64x64 ones by `Records` and by numpy's memory map of the same files.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import TypeAdapter

from finetune import caches
from finetune.cache_store import Records, Writer, open_shelf
from finetune.cached import latent_keys
from finetune.config import TrainConfig
from finetune.data import open_data
from finetune.space import build_space

RECORD = (8, 64, 64)
SMALL = (8, 8, 8)


def synthetic(folder: Path, count: int, shape: tuple[int, ...]) -> Path:
    """A folder of `count` records of noise."""
    block = np.random.RandomState(0).standard_normal((64, *shape)).astype(np.float16)
    keys = np.random.RandomState(1).randint(-(2**63), 2**63, (count, 2), np.int64)
    with Writer(folder, dtype="float16") as writer:
        for index in range(count):
            writer.add(keys[index], block[index % 64], (512, 512, 0, 0, 512, 512))
    return folder


def making(folder: Path, *, images: int, resolution: int, repeats: int) -> dict:
    """Latents per second, made for the cache and by a bare loop over ready pixels."""
    (folder / "pictures").mkdir()
    for number in range(images):
        coarse = np.random.RandomState(number).randint(0, 256, (resolution // 16,) * 2 + (3,), np.uint8)
        picture = Image.fromarray(coarse).resize((resolution, resolution), Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{number:04}.png")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        block_out_channels=(32, 64, 128, 128), norm_num_groups=32, sample_size=resolution,
    ).save_pretrained(folder / "vae")  # fmt: skip
    cfg = TypeAdapter(TrainConfig).validate_python({
        "output_dir": "unused", "space": {"kind": "latent", "vae": str(folder / "vae")},
        "data": {"resolution": resolution, "train_data_dir": str(folder / "pictures"), "center_crop": True},
        "cache": {"latents": True, "folder": str(folder / "cache")},
    })  # fmt: skip
    data, space = open_data(cfg, progress=False), build_space(cfg)
    places, keys = latent_keys(data)
    (folder / "cache").mkdir()
    size = caches.encode_batch(resolution)
    batches = torch.stack([sample.pixels for sample in data.samples(data.rows, [0] * len(data))]).split(size)
    space.moments(batches[0])  # loads the weights
    actions = {
        "bare": lambda: [space.moments(pixels) for pixels in batches],
        "cache": lambda: caches.make_latents(cfg, data, places, keys, space, folder / "cache"),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - begin)
    per_second = {name: images / statistics.median(taken) for name, taken in times.items()}
    return {"figure": "latents per second", **per_second, "ratio": per_second["cache"] / per_second["bare"]}


def reading(folder: Path, count: int, repeats: int) -> dict:
    """Records read per second in random order, and the bytes that each takes on the disk."""
    shelf = open_shelf(synthetic(folder, count, RECORD))
    rates = []
    for repeat in range(repeats):
        records, order = Records(shelf.shards), np.random.RandomState(repeat).permutation(shelf.places).tolist()
        begin = time.perf_counter()
        for shard, index in order:
            records.read(shard, index)
        rates.append(count / (time.perf_counter() - begin))
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "figure": "records read per second", "records": count, "median": statistics.median(rates), "best": max(rates),
        "bytes_per_record": stored / count, "of_them_numbers": 2 * int(np.prod(RECORD)),
    }  # fmt: skip


def resident() -> int:
    """Bytes of this process that are in memory."""
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])


def read_all(folder: Path, how: str) -> None:
    """In a process of its own: read every record once, in random order, and print by how much it grew."""
    before = resident()
    shelf = open_shelf(folder)
    records, order = Records(shelf.shards), np.random.RandomState(0).permutation(shelf.places).tolist()
    maps = [
        np.memmap(shard.path, shard.dtype, "r", shard.starts[0], (shard.count, *shard.shape)) for shard in shelf.shards
    ]
    total = 0.0
    for shard, index in order:
        total += float(maps[shard][index].sum() if how == "map" else records.read(shard, index)[0].sum())
    print(resident() - before)


def growth(folder: Path, how: str = "records") -> float:
    """Megabytes by which a process grows that reads every record of `folder`."""
    command = [sys.executable, __file__, "--read", str(folder), "--how", how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--how", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        return read_all(args.read, args.how)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = making(root, images=args.images, resolution=args.resolution, repeats=args.repeats)
        print(json.dumps(made), flush=True)
        print(json.dumps(reading(root / "records", args.records, args.repeats)), flush=True)
        for how in ("records", "map"):
            figure = {"figure": "growth", "how": how, "records": args.records, "shape": RECORD}
            print(json.dumps(figure | {"megabytes": growth(root / "records", how)}), flush=True)
        for count in (1_000, 10_000, 100_000):
            figure = {"figure": "growth", "how": "records", "records": count, "shape": SMALL}
            print(json.dumps(figure | {"megabytes": growth(synthetic(root / str(count), count, SMALL))}), flush=True)


if __name__ == "__main__":
    main()

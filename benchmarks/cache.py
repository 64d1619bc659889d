"""What the caches cost and give: making latents beside a bare encode loop, reading at random, memory by number.

    python benchmarks/cache.py [--width 128] [--resolution 128] [--images 32] [--rounds 5] [--records 4000] [--docs]

Making: pictures through an AutoencoderKL with the shape of Stable Diffusion's and random weights, of --width channels
in its first block (128 is the real one), from files to records on the disk: read, hashed, decoded, resized, encoded,
rounded, checked, summed, written. The bare loop encodes the same batches, ready in memory. The two take turns; the
ratio is that of two neighbours, and its goal is 0.95.

Reading: records of 8x64x64 float16 (mean and log-variance of 512x512 pixels) in random order on one core, checksums
included; the goal is 5,000 per second. And captions of a batch of 16, from a table that holds the images too: as it is
read without cached latents, and with them.

Memory: growth of the resident set of a fresh process that reads every record of a cache of 1,000, 10,000 and 100,000
small ones, and of 8x64x64 ones by `Records` and by numpy's memory map of the same files.

Takes about three minutes on two cores.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from figures import Report, middle, parser
from finetune.cache_store import Records, Writer, open_shelf

RECORD = (8, 64, 64)
SMALL = (8, 8, 8)
BATCH = 16


def synthetic(folder: Path, count: int, shape: tuple[int, ...]) -> Path:
    """A folder of `count` records of noise."""
    block = np.random.RandomState(0).standard_normal((64, *shape)).astype(np.float16)
    keys = np.random.RandomState(1).randint(-(2**63), 2**63, (count, 2), np.int64)
    with Writer(folder, dtype="float16") as writer:
        for index in range(count):
            writer.add(keys[index], block[index % 64], (512, 512, 0, 0, 512, 512))
    return folder


def pictures(folder: Path, count: int, side: int) -> None:
    """`count` pictures of smooth noise with captions, as files."""
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        coarse = np.random.RandomState(number).randint(0, 256, (side // 16,) * 2 + (3,), np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(f"picture {number}")


def making(folder: Path, report: Report, *, width: int, resolution: int, images: int, rounds: int) -> None:
    """Latents per second, made for the cache and by a bare loop over ready pixels."""
    import torch
    from diffusers import AutoencoderKL
    from pydantic import TypeAdapter

    from finetune import caches
    from finetune.cached import latent_keys
    from finetune.config import TrainConfig
    from finetune.data import open_data
    from finetune.images import normalised
    from finetune.space import build_space

    pictures(folder / "pictures", images, resolution)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width), norm_num_groups=32, sample_size=resolution,
    ).save_pretrained(folder / "vae")  # fmt: skip
    cfg = TypeAdapter(TrainConfig).validate_python({
        "output_dir": "unused", "space": {"kind": "latent", "vae": str(folder / "vae")},
        "data": {"resolution": resolution, "train_data_dir": str(folder / "pictures"), "center_crop": True},
        "cache": {"latents": True, "folder": str(folder / "cache")},
    })  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, space = open_data(cfg, progress=False), build_space(cfg, device)
    places, keys = latent_keys(data)
    (folder / "cache").mkdir()
    pixels = normalised(torch.stack([sample.pixels for sample in data.samples(data.rows, [0] * len(data))])).to(device)
    batches = pixels.split(caches.encode_batch(resolution))
    space.moments(batches[0])  # loads the weights

    def bare() -> None:
        for batch in batches:
            space.moments(batch)
        if device == "cuda":
            torch.cuda.synchronize()

    def cache() -> None:
        caches.make_latents(cfg, data, places, keys, space, folder / "cache")

    where = {"what": f"{images} images of {resolution} pixels, VAE of width {width}, {device}"}
    pairs = [(seconds(bare), seconds(cache)) for _ in range(rounds)]
    report.add("bare encode loop, images per second", **middle([images / one for one, _ in pairs]), **where)
    report.add("cache built, images per second", **middle([images / other for _, other in pairs]), **where)
    report.add("cache built over bare loop", **middle([one / other for one, other in pairs]), **where)


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def reading(folder: Path, report: Report, count: int, rounds: int) -> None:
    """Records read per second in random order, and the bytes that each takes on the disk."""
    shelf = open_shelf(synthetic(folder, count, RECORD))
    rates = []
    for turn in range(rounds):
        records, order = Records(shelf.shards), np.random.RandomState(turn).permutation(shelf.places).tolist()
        rates.append(count / seconds(lambda records=records, order=order: [records.read(*place) for place in order]))
    report.add("random reads per second", **middle(rates), what=f"{count} records of {shown(RECORD)} float16, one core")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / count
    what = f"{2 * int(np.prod(RECORD))} of them numbers"
    report.add("bytes per sample on the disk", median=stored, what=what)


def table(report: Report, rounds: int) -> None:
    """Milliseconds to read a batch of rows of a table that holds its images, with and without them."""
    import io

    from datasets import Dataset
    from PIL import Image

    from finetune.config import Data
    from finetune.rows import rows_of
    from finetune.sources import Source

    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (512, 512, 3), np.uint8)).save(file, "JPEG")
    cells = [{"bytes": file.getvalue(), "path": None}] * 256
    dataset = Dataset.from_dict({"image": cells, "text": [f"picture {number}" for number in range(256)]})
    source = Source(name="pictures", dataset=dataset, folders=None, problems=[])
    rows = rows_of(source, Data(resolution=512), captions=True, labels=False)
    for name, each in (("with its images", rows), ("for cached latents", rows.without_images())):
        draws = [np.random.RandomState(turn).permutation(256)[:BATCH].tolist() for turn in range(20 * rounds)]
        each.read(draws[0])
        times = [1e3 * seconds(lambda each=each, draw=draw: each.read(draw)) for draw in draws]
        what = f"{BATCH} rows of a table with JPEG images of {len(file.getvalue()) // 1000} kB"
        report.add(f"table read {name}, ms", **middle(times), what=what)


def shown(shape: tuple[int, ...]) -> str:
    """8x64x64."""
    return "x".join(map(str, shape))


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
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=128, help="channels of the VAE's first block")
    options.add_argument("--resolution", type=int, default=128, help="of the images that are encoded, in pixels")
    options.add_argument("--images", type=int, default=32, help="encoded in each round")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--records", type=int, default=4000, help="read at random")
    options.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--how", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.read:
        return read_all(args.read, args.how)
    report = Report("cache", " ".join(["python benchmarks/cache.py", *(a for a in sys.argv[1:] if a != "--docs")]))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        size = {"width": args.width, "resolution": args.resolution, "images": args.images, "rounds": args.rounds}
        making(root, report, **size)
        reading(root / "records", report, args.records, args.rounds)
        table(report, args.rounds)
        for how in ("records", "map"):
            what = f"{args.records} of {shown(RECORD)}, by {'our reader' if how == 'records' else 'a memory map'}"
            report.add("resident growth, MB", median=growth(root / "records", how), what=what)
        for count in (1_000, 10_000, 100_000):
            grown = growth(synthetic(root / str(count), count, SMALL))
            report.add("resident growth, MB", median=grown, what=f"{count} of {shown(SMALL)}, by our reader")
    report.finish(docs=args.docs)


if __name__ == "__main__":
    main()

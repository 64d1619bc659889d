"""Images per second of the trainer, of the bare loop of the same UNet, and of diffusers' training scripts.

    python benchmarks/throughput.py [--diffusers CHECKOUT] [--only unet64|mini-sd|mini-sdxl] [--rounds 5] [--threads 1]

The work is that of workloads.py, the same for all: data, model, batch, precision, AdamW, clipping, a scalar per step to
TensorBoard. `ours` is train_unet.py as a user runs it, with caches for the latent workloads; `bare` is bare.py; the
scripts are train_unconditional.py (with and without EMA), train_text_to_image.py and train_text_to_image_sdxl.py of the
given checkout of diffusers, run as they are. The contenders of a workload are started together and take turns
(turns.py): a round is --seconds of each. The ratio is that of a round; the table has its median over the rounds, lowest
and highest, and the median of the ratio by processor time, which other loads on the machine disturb less. `memory` is
the ratio of the largest resident sets, where ours has filled the caches besides; goal: at most 1.
`trainer.train_step` beside `Bare.step`: the same two, in one process, in alternating blocks of --block steps.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from figures import Report, middle, parser
from turns import Contender, started, take_turns
from workloads import SHAPE, WORKLOADS, Workload, make

ROOT = Path(__file__).resolve().parents[1]
FOR_EVER = "1000000"
SCRIPTS = {
    "unet64": "unconditional_image_generation/train_unconditional.py",
    "mini-sd": "text_to_image/train_text_to_image.py",
    "mini-sdxl": "text_to_image/train_text_to_image_sdxl.py",
}
GOALS = {"bare": 0.97, "unet64": 1.05, "mini-sd": 1.35, "mini-sdxl": 1.1}
"""Ratios that are held to; unet64's is that with EMA."""
WARM = 2  # steps before the first turn


def options(workload: Workload, folder: Path, *, ema: bool, precision: str) -> list[str]:
    """The options of our trainer for a workload: one that goes on for ever and neither samples nor saves meanwhile."""
    shared = [
        "--output_dir", str(folder), "--train_data_dir", str(workload.images), "--resolution",
        str(workload.resolution), "--center_crop", "--global_batch_size", str(workload.batch), "--mixed_precision",
        precision, "--max_train_steps", FOR_EVER, "--checkpointing_steps", FOR_EVER, "--log_every", "1", "--report_to",
        "tensorboard", "--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--learning_rate", "1e-5",
        "--num_inference_steps", "1", "--num_images", "1", "--use_ema", str(ema).lower(),
    ]  # fmt: skip
    if not workload.pretrained:
        return [*shared, "--model.kind", "unet2d", "--block_out_channels", *map(str, SHAPE["block_out_channels"])]
    cache = ["--cache.latents", "--cache.text", "--cache.folder", str(workload.images.parent / "cache")]
    return [*shared, "--pretrained_model_name_or_path", str(workload.model), "--condition_dropout", "0", *cache]


def script_options(workload: Workload, folder: Path, *, ema: bool, precision: str) -> list[str]:
    """The same for the script of diffusers."""
    shared = [
        "--output_dir", str(folder), "--train_data_dir", str(workload.images), "--resolution",
        str(workload.resolution), "--center_crop", "--train_batch_size", str(workload.batch), "--mixed_precision",
        precision, "--checkpointing_steps", FOR_EVER, "--lr_scheduler", "constant", "--lr_warmup_steps", "0",
        "--learning_rate", "1e-5", *["--use_ema"] * ema,
    ]  # fmt: skip
    if workload.pretrained:
        return [*shared, "--pretrained_model_name_or_path", str(workload.model), "--max_train_steps", FOR_EVER]
    # its first epoch ends with pictures: one, in one step
    pictures = ["--eval_batch_size", "1", "--ddpm_num_inference_steps", "1", "--save_model_epochs", FOR_EVER]
    return [*shared, "--model_config_name_or_path", str(workload.model), "--num_epochs", FOR_EVER, *pictures]


def commands(workload: Workload, asked: argparse.Namespace) -> dict[str, Callable[[Path], list[str]]]:
    """The command of each contender by its name, as a function of its folder."""
    python, settings = sys.executable, {"precision": asked.precision}
    script = asked.diffusers and asked.diffusers / "examples" / SCRIPTS[workload.name]
    found: dict[str, Callable[[Path], list[str]]] = {}
    averages = {"": False} if workload.pretrained else {"": False, ", EMA": True}
    for words, ema in averages.items():
        found[f"ours{words}"] = lambda folder, ema=ema: [
            python, str(ROOT / "train_unet.py"), *options(workload, folder / "run", ema=ema, **settings)
        ]  # fmt: skip
        if script:
            found[f"{script.name}{words}"] = lambda folder, ema=ema: [
                python, str(script), *script_options(workload, folder / "run", ema=ema, **settings)
            ]  # fmt: skip
    found[f"bare{words}"] = lambda folder: [
        python, str(ROOT / "benchmarks" / "bare.py"), workload.name, "--root", str(workload.model.parent), "--events",
        str(folder / "run"), "--precision", asked.precision, *["--ema"] * ema,
    ]  # fmt: skip
    return found


def race(workload: Workload, folder: Path, asked: argparse.Namespace, report: Report) -> None:
    """The contenders of one workload as processes, in turns; adds a figure per opponent of ours."""
    env = {"OMP_NUM_THREADS": str(asked.threads), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}

    def start(name: str, command: Callable[[Path], list[str]]) -> Contender:
        place = folder / name.replace(", ", "-")
        return Contender(name, command(place), place, images=workload.batch, env=env)

    starts = {name: partial(start, command=command) for name, command in commands(workload, asked).items()}
    with started(starts, warm=WARM) as contenders:
        speeds = take_turns(contenders, rounds=asked.rounds, seconds=asked.seconds)
        peaks = {name: contender.peak_memory() for name, contender in contenders.items()}
    for name in speeds:
        if name.startswith("ours"):
            continue
        own = "ours, EMA" if name.endswith(", EMA") else "ours"
        add(report, f"{workload.name}: {own} over {name.removesuffix(', EMA')}", speeds[own], speeds[name],
            goal=goal(workload, name), ours_mb=peaks[own], memory=peaks[own] / peaks[name])  # fmt: skip


def goal(workload: Workload, opponent: str) -> float | str:
    """The ratio that is held to against `opponent`; empty if there is none."""
    if opponent.startswith("bare"):
        return GOALS["bare"]
    return GOALS[workload.name] if workload.pretrained or opponent.endswith("EMA") else ""


def add(report: Report, figure: str, ours: list[tuple], theirs: list[tuple], **more) -> None:
    """A figure of two contenders from their speeds by wall clock and by processor time, round by round."""
    wall, cpu = ([a[i] / b[i] for a, b in zip(ours, theirs, strict=True)] for i in (0, 1))
    speed = {"ours": statistics.median(s[0] for s in ours), "theirs": statistics.median(s[0] for s in theirs)}
    ratio = middle(wall)
    spread = {"ratio": ratio["median"], "lowest": ratio["lowest"], "highest": ratio["highest"]}
    report.add(figure, **speed, **spread, by_cpu_time=statistics.median(cpu), **more)


def side_by_side(workload: Workload, folder: Path, asked: argparse.Namespace, report: Report) -> None:
    """`trainer.train_step` and `Bare.step` in this process, in blocks in turns; adds a figure."""
    import torch

    from bare import Bare
    from finetune.batching import on_device
    from finetune.config_io import load
    from finetune.meter import Meter
    from finetune.trainer import Trainer
    from finetune.watchdog import patiently

    ema = not workload.pretrained
    trainer = Trainer(load(options(workload, folder / "side", ema=ema, precision=asked.precision)))
    meter = Meter(trainer.accelerator, trainer.modules.objective)
    batches = on_device(patiently(trainer.loader(), 600), trainer.accelerator.device)
    bare = Bare(workload, ema=ema, precision=asked.precision)
    steps = {"ours": lambda: trainer.train_step(batches, meter), "bare": bare.step}
    speeds: dict[str, list[tuple]] = {name: [] for name in steps}
    for number in range(1 + asked.rounds):  # the first is the warm-up
        for name in list(steps) if number % 2 == 0 else reversed(steps):
            begin, began = time.perf_counter(), time.process_time()
            for _ in range(asked.block):
                steps[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds, cpu = time.perf_counter() - begin, time.process_time() - began
            speeds[name].append((asked.block * workload.batch / seconds, asked.block * workload.batch / cpu))
    warm = {name: found[1:] for name, found in speeds.items()}
    add(report, f"{workload.name}: train_step over bare step", warm["ours"], warm["bare"], goal=GOALS["bare"])


def arguments() -> tuple[argparse.Namespace, str]:
    """The arguments, and the command in words."""
    made = parser(__doc__)
    made.add_argument("--diffusers", type=Path, help="a checkout of diffusers, whose examples/ are run")
    made.add_argument("--only", choices=tuple(WORKLOADS))
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--seconds", type=float, default=7.0, help="of a contender's turn")
    made.add_argument("--block", type=int, default=2, help="steps of a block, in one process")
    made.add_argument("--threads", type=int, default=1, help="of torch, per process")
    made.add_argument("--precision", default="no", choices=("no", "bf16"), help="of all networks")
    asked = made.parse_args()
    given = {"diffusers": asked.diffusers and "CHECKOUT", "only": asked.only, "rounds": asked.rounds}
    given |= {"threads": asked.threads, "precision": asked.precision}
    words = [f"--{name} {value}" for name, value in given.items() if value is not None]
    return asked, " ".join(["python benchmarks/throughput.py", *words])


def main() -> None:
    """Measure and print."""
    asked, command = arguments()
    report = Report("throughput", command)
    if asked.diffusers:
        asked.diffusers = asked.diffusers.resolve()
    import torch

    torch.set_num_threads(asked.threads)
    for name in [asked.only] if asked.only else WORKLOADS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            workload = make(name, folder / "work")
            race(workload, folder / "race", asked, report)
            shutil.rmtree(folder / "race")
            side_by_side(workload, folder, asked, report)
    report.finish(docs=asked.docs)


if __name__ == "__main__":
    main()

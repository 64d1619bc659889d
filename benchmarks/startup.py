"""The time before the first optimizer step: of our runs, of a resumed one, and of diffusers' scripts beside them.

    python benchmarks/startup.py [--repeats 5] [--diffusers CHECKOUT] [--docs]

start       seconds from the start of the process until its progress bar shows one step more than at first, on models
            of a few thousand parameters and with caches hit, and the CPU seconds until then; with --diffusers also of
            train_unconditional.py, train_text_to_image.py and train_text_to_image_sdxl.py on the same images and
            models, in alternation. Both write TensorBoard's files; both load in the process that trains.
light       CPU seconds of `--help`, of a mistake in the configuration, of what `accelerate launch` adds
imports     CPU seconds of all that the trainer imports, and of diffusers' UNet2DModel alone, which comes with its
            other models, peft, torchvision, scipy and transformers; the same with Python's garbage collector at work,
            which finetune.run lets rest meanwhile; the ten packages whose own code takes longest
The models are made here, in a temporary folder. Everything is read once before it is timed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import startup_work
from figures import Report, middle, parser

ROOT = Path(__file__).resolve().parents[1]
FRONT_DOOR = ROOT / "train_unet.py"
BATCH = 4
STEPS = startup_work.IMAGES // BATCH
COUNT = re.compile(rf"\b(\d+)/{STEPS} ".encode())
RECIPES = {
    "pixels": (
        "--resolution 32 --model.kind unet2d --model.block_out_channels 8 16 --layers_per_block 1 --norm_num_groups 4 "
        "--down_block_types DownBlock2D AttnDownBlock2D --up_block_types AttnUpBlock2D UpBlock2D"
    ),
    "text, cached": (
        "--resolution 64 --center_crop --cache.latents true --cache.text true --pretrained_model_name_or_path sd"
    ),
    "SDXL, cached": (
        "--resolution 64 --center_crop --cache.latents true --cache.text true --pretrained_model_name_or_path sdxl"
    ),
    "LoRA, cached": (
        "--resolution 64 --center_crop --cache.latents true --cache.text true --pretrained_model_name_or_path sd "
        "--lora.rank 4"
    ),
}
SHARED = (
    f"--train_data_dir images --train_batch_size {BATCH} --max_train_steps {STEPS} --learning_rate 1e-5 --log_every 1 "
    "--report_to tensorboard --dataloader_num_workers 0 --checkpointing_steps 2"
)
PEERS = {
    "pixels": (
        "unconditional_image_generation/train_unconditional.py",
        f"--model_config_name_or_path unet --resolution 32 --num_epochs 1 --train_batch_size {BATCH}",
    ),
    "text, cached": (
        "text_to_image/train_text_to_image.py",
        "--pretrained_model_name_or_path sd --resolution 64 --center_crop --report_to tensorboard "
        f"--max_train_steps {STEPS} --train_batch_size {BATCH}",
    ),
    "SDXL, cached": (
        "text_to_image/train_text_to_image_sdxl.py",
        "--pretrained_model_name_or_path sdxl --resolution 64 --center_crop --report_to tensorboard "
        f"--max_train_steps {STEPS} --train_batch_size {BATCH}",
    ),
}


class Folder:
    """A temporary folder with the work, and the processes that are started in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs = path, 0
        startup_work.make(path)
        threads = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(path / "home"), "TQDM_MININTERVAL": "0"}
        source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        self.environment = os.environ | threads | quiet | {"PYTHONPATH": source}

    def ours(self, recipe: str, *, resumed: Path | None = None) -> list[str]:
        """The command of a new run, or of one that goes on in a copy of the folder `resumed`."""
        self.runs += 1
        output = self.path / f"run-{self.runs}"
        if resumed:
            shutil.copytree(resumed, output)
        return [str(FRONT_DOOR), *RECIPES[recipe].split(), *SHARED.split(), "--output_dir", str(output)]

    def peer(self, checkout: Path, recipe: str) -> list[str]:
        """The command of diffusers' script for the same work."""
        self.runs += 1
        script, words = PEERS[recipe]
        command = [str(checkout / "examples" / script), "--train_data_dir", "images", *words.split()]
        return [*command, "--output_dir", str(self.path / f"run-{self.runs}")]

    def until_step(self, command: list[str], steps: int = 1) -> dict[str, float]:
        """Seconds and CPU seconds until the progress bar of `command` is so many steps on; then it is killed."""
        start, shown, first = time.perf_counter(), b"", None
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.path,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            shown += chunk
            counts = [int(count) for count in COUNT.findall(shown)]
            first = counts[0] if counts and first is None else first
            if counts and max(counts) >= first + steps:
                break
        else:
            raise RuntimeError(f"{' '.join(command)} took no step:\n{shown.decode(errors='replace')[-4000:]}")
        seconds = time.perf_counter() - start
        os.killpg(process.pid, signal.SIGKILL)
        _, _, used = os.wait4(process.pid, 0)
        process.returncode, _ = 0, process.stdout.close()
        return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime}

    def cpu(self, command: list[str]) -> float:
        """CPU seconds of a whole Python process and of those that it waited for."""
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, *command], cwd=self.path, env=self.environment, **silent)
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
        return used.ru_utime + used.ru_stime


def starts(report: Report, folder: Folder, repeats: int, checkout: Path | None) -> None:
    """Our runs and the peers', in alternation."""
    recipes = RECIPES if checkout else [name for name in RECIPES if name != "SDXL, cached"]
    commands = {f"start: {name}": lambda name=name: folder.ours(name) for name in recipes}
    begun = folder.ours("text, cached")  # fills the caches, too
    folder.until_step(begun, steps=5)
    commands["start: text, cached, resumed"] = lambda: folder.ours("text, cached", resumed=Path(begun[-1]))
    for name in PEERS if checkout else ():
        commands[f"start: {name}, {Path(PEERS[name][0]).name}"] = lambda name=name: folder.peer(checkout, name)
    taken: dict[str, list[dict[str, float]]] = {figure: [] for figure in commands}
    for turn in range(repeats + 1):
        for figure, command in commands.items():
            measured = folder.until_step(command())
            if turn:  # the first one reads files and fills caches
                taken[figure].append(measured)
    medians = {figure: middle([each["cpu"] for each in runs])["median"] for figure, runs in taken.items()}
    for figure, runs in taken.items():
        row = middle([each["seconds"] for each in runs]) | {"cpu_seconds": medians[figure]}
        name = figure.removeprefix("start: ").rpartition(", train_")[0]
        if name in PEERS and f"start: {name}" in taken:
            pairs = zip(taken[f"start: {name}"], runs, strict=True)
            row["ours/peer"] = middle([own["seconds"] / peer["seconds"] for own, peer in pairs])["median"]
            row["ours/peer, cpu"] = medians[f"start: {name}"] / medians[figure]
        report.add(figure, **row)


def light(report: Report, folder: Folder, repeats: int) -> None:
    """What needs no torch, and the launcher's own part."""
    (folder.path / "nothing.py").write_text("")
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "nothing.py"]
    commands = {
        "--help": [str(FRONT_DOOR), "--help"],
        "configuration error": [str(FRONT_DOOR), *RECIPES["pixels"].split(), "--train.max_train_step", "1"],
        "accelerate launch of an empty script": launch,
    }
    for figure, command in commands.items():
        seconds = middle([folder.cpu(command) for _ in range(repeats)])
        report.add(figure, cpu_seconds=seconds["median"], lowest_cpu=seconds["lowest"], highest_cpu=seconds["highest"])


def imports(report: Report, folder: Folder, repeats: int) -> None:
    """What is imported before training, as finetune.run does it: with the garbage collector at rest."""
    code = "import gc, os; gc.disable(); {}; os._exit(0)"
    for figure, statement in (
        ("import torch", "import torch"),
        ("import diffusers' UNet2DModel", "from diffusers import UNet2DModel"),
        ("import finetune.trainer", "import finetune.trainer"),
        ("import finetune.trainer, the collector at work", "gc.enable(); import finetune.trainer"),
    ):
        seconds = middle([folder.cpu(["-c", code.format(statement)]) for _ in range(repeats)])
        report.add(figure, cpu_seconds=seconds["median"], lowest_cpu=seconds["lowest"], highest_cpu=seconds["highest"])
    timed = [sys.executable, "-X", "importtime", "-c", code.format("import finetune.trainer")]
    listed = subprocess.run(timed, env=folder.environment, capture_output=True, text=True, check=True).stderr
    own: Counter[str] = Counter()
    for micros, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", listed, re.M):
        own[module.split(".")[0]] += int(micros)
    for package, micros in own.most_common(10):
        report.add(f"imports: {package}", cpu_seconds=micros / 1e6, share=micros / own.total())


def main() -> None:
    """Print all figures."""
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--diffusers", type=Path, help="a checkout of diffusers, for its examples")
    asked = arguments.parse_args()
    checkout = asked.diffusers and asked.diffusers.resolve()
    given = f" --repeats {asked.repeats}" if asked.repeats != 5 else ""
    report = Report("startup", f"python benchmarks/startup.py{given}{' --diffusers CHECKOUT' if checkout else ''}")
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(Path(name))
        light(report, folder, asked.repeats)
        imports(report, folder, min(3, asked.repeats))
        starts(report, folder, asked.repeats, checkout)
    report.finish(docs=asked.docs)


if __name__ == "__main__":
    main()

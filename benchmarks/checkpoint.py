"""What a checkpoint costs the loop: seconds that it stands still for a save, and that a resume takes to load one.

    python benchmarks/checkpoint.py [--repeats 5]

UNets of about 20 M and 200 M parameters, weights, two moments and one average of each; medians, at 200 M of fewer
repeats. The file system is that of the temporary folder (TMPDIR).

at_once       `Trainer.save`, written, flushed and read back before the next step
asynchronous  the same with checkpoint.asynchronous: the copy, while the rest is done in the background
written       until that one is on the disk, from the call, with nothing else to do meanwhile
copy          a copy of the same tensors to new memory
found         the newest whole checkpoint looked for, its checksums compared
loaded        the state taken over from it
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from figures import Report, parser
from finetune.config import TrainConfig
from finetune.meter import Meter
from finetune.resume import find_checkpoint, resume
from finetune.saving import Saver
from finetune.trainer import Trainer
from workloads import sized


def measure(cfg: TrainConfig, repeats: int) -> dict[str, float]:
    """Median seconds of each, and the size of what is saved."""
    trainer = Trainer(cfg)
    trainer.train_step(iter(trainer.loader()), Meter(trainer.accelerator, trainer.modules.objective))  # makes moments
    savers = {kind: Saver(Path(cfg.output_dir), replace(cfg.checkpoint, asynchronous=kind == "asynchronous"))
              for kind in ("at_once", "asynchronous")}  # fmt: skip
    times: dict[str, list[float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        times.setdefault(name, []).append(time.perf_counter() - begin)

    for _ in range(repeats + 1):
        with timed("at_once"):
            save(trainer, savers["at_once"])
        with timed("written"):
            with timed("asynchronous"):
                save(trainer, savers["asynchronous"])
            trainer.saver.wait()
        with timed("copy"):
            copies = of_all(trainer, torch.Tensor.clone)
        del copies
        with timed("found"):
            found = find_checkpoint(cfg)
        with timed("loaded"):
            resume(trainer, found)
    megabytes = sum(of_all(trainer, lambda tensor: tensor.numel() * tensor.element_size())) / 1e6
    return {"megabytes": megabytes} | {name: statistics.median(found[1:]) for name, found in times.items()}


def save(trainer: Trainer, saver: Saver) -> None:
    """A checkpoint of the next step, though none was made: what it holds is the same."""
    trainer.state.step += 1
    trainer.saver = saver
    trainer.save(required=False)


def of_all(trainer: Trainer, action: Callable) -> list:
    """`action` of each tensor that a checkpoint holds."""
    return [action(tensor) for part in trainer.state.parts().values() for tensor in part.values()]


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=5)
    asked = made.parse_args()
    report = Report("checkpoint", f"python benchmarks/checkpoint.py --repeats {asked.repeats}")
    torch.set_num_threads(1)
    for millions, repeats in ((20, asked.repeats), (200, max(1, asked.repeats // 2))):
        with tempfile.TemporaryDirectory() as folder:
            report.add(f"{millions} M parameters", **measure(sized(Path(folder), millions), repeats))
    report.finish(docs=asked.docs)


if __name__ == "__main__":
    main()

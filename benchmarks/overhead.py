"""What else a step costs: averages, clipping, logging, keyed randomness, the loader, Accelerate.

    python benchmarks/overhead.py [--steps 10] [--repeats 3]

Shares of the time of a step, as `Trainer.fit` makes it (by default with a line to metrics.jsonl and TensorBoard every
10 steps), medians over --repeats times --steps steps: of the digits recipe, of a Stable Diffusion of 20 M parameters
with cached latents and texts (workloads.mini-sd), and of a UNet2DModel of 50 M parameters. The functions that do these
things are timed inside the step, on a GPU between synchronisations.

ema         one average
clipping    the norm of the gradients, and their scaling
logging     the meter's sums, the lines, the progress bar
keyed       all draws by keys (order, crop, flip, caption, noise level, noise, posterior, condition dropout), of which
            hashing is the keys and the reseeding; the rest is the numbers, which any draw costs
loader      waiting for the batch: without loader processes, making it; what is keyed in it counts there too
accelerate  its wrappers of backward and of the optimizer, without what they wrap
together    ema, clipping, logging and keyed
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from figures import Report, parser
from finetune import data, images, order, seeding, tracking
from finetune.batching import on_device
from finetune.config import TrainConfig
from finetune.config_io import load
from finetune.meter import Meter
from finetune.trainer import Trainer
from finetune.watchdog import patiently
from throughput import options
from workloads import digits, make, sized

GOAL = 0.03  # of together, at 50 M parameters


class Stopwatch:
    """Adds up the time inside functions, replaced by timed ones; nested calls count once."""

    def __init__(self, within: "Stopwatch | None" = None) -> None:
        """within: count only what happens inside the functions of that one."""
        self.seconds, self.calls, self._depth, self._within = 0.0, 0, 0, within

    def timed(self, function: Callable) -> Callable:
        """`function`, with its time added up here."""

        def run(*args, **kwargs):
            if self._within is not None and not self._within._depth:
                return function(*args, **kwargs)
            start = now() if not self._depth else 0.0
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += now() - start
                    self.calls += 1

        return run


def now() -> float:
    """Seconds, when all that was given to the device is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@contextmanager
def replaced(watch: Stopwatch, *places: tuple[object, str]) -> Iterator[None]:
    """Inside, each attribute (owner, name) is timed by `watch`."""
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, watch.timed(function))
    try:
        yield
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


class Loop:
    """The steps of `Trainer.fit`, one at a time."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.trainer = trainer = Trainer(cfg)
        self.meter = Meter(trainer.accelerator, trainer.modules.objective)
        self.tracker = tracking.Tracker(trainer.accelerator, cfg, resumed_step=-1)
        self.bar = tqdm(total=trainer.steps, file=io.StringIO())
        self.loaded = on_device(patiently(trainer.loader(), 600), trainer.accelerator.device)

    def step(self) -> None:
        """One step, and its line if one is due."""
        taken = self.trainer.train_step(self.meter.waiting(iter(self.load, None)), self.meter)
        self.bar.update(self.trainer.step - self.bar.n)
        if taken and tracking.due(self.trainer.step, self.trainer.cfg.tracking.log_every, self.trainer.steps):
            self.tracker.log(tracking.line_of(self.trainer, self.meter, self.bar), step=self.trainer.step)

    def load(self) -> object:
        """The next batch."""
        return next(self.loaded)

    def places(self) -> dict[str, list[tuple[object, str]]]:
        """What does each part of a step; `accelerate` and `inside` it."""
        trainer, keys = self.trainer, [(module, "key") for module in (seeding, data, images)]
        drawn = [(seeding.PositionRandom, name) for name in ("normal", "uniform", "stratified", "integers")]
        wrapped = trainer.optimizer.optimizer
        return {
            "ema": [(trainer.ema, "step")],
            "clipping": [(trainer.accelerator, "clip_grad_norm_")],
            "logging": [*((self.meter, name) for name in ("add", "commit", "read")), (self.tracker, "log"),
                        (tracking, "line_of"), (self.bar, "update")],
            "keyed": [*drawn, *keys[1:], (order, "permutation")],
            "hashing": [*keys, (seeding.PositionRandom, "_at"), (order, "permutation")],
            "loader": [(self, "load")],
            "accelerate": [(trainer.accelerator, "backward"), (trainer.optimizer, "step"),
                           (trainer.optimizer, "zero_grad")],
            "inside": [(torch.Tensor, "backward"), (wrapped, "step"), (wrapped, "zero_grad")],
        }  # fmt: skip

    def shares(self, steps: int) -> dict[str, float]:
        """Of the time of `steps` steps, by part; and the milliseconds of one."""
        watches = {name: Stopwatch() for name in self.places()}
        watches["inside"] = Stopwatch(watches["accelerate"])
        with ExitStack() as stack:
            for name, places in self.places().items():
                stack.enter_context(replaced(watches[name], *places))
            begin = now()
            for _ in range(steps):
                self.step()
            seconds = now() - begin
        assert all(watch.calls for watch in watches.values()), "a part of a step is done by another function now"
        found = {name: watch.seconds / seconds for name, watch in watches.items()}
        found["accelerate"] -= found.pop("inside")
        together = sum(found[name] for name in ("ema", "clipping", "logging", "keyed"))
        return {"step_ms": 1e3 * seconds / steps} | found | {"together": together}


def measure(cfg: TrainConfig, *, steps: int, repeats: int) -> dict[str, float]:
    """Medians over `repeats`."""
    loop = Loop(cfg)
    for _ in range(2):
        loop.step()
    found = [loop.shares(steps) for _ in range(repeats)]
    size = sum(p.numel() for p in loop.trainer.modules.unet.parameters()) / 1e6
    return {"million_parameters": size} | {name: statistics.median(one[name] for one in found) for name in found[0]}


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--repeats", type=int, default=3)
    asked = made.parse_args()
    report = Report("overhead", f"python benchmarks/overhead.py --steps {asked.steps} --repeats {asked.repeats}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        report.add("digits recipe", **measure(digits(folder / "a"), steps=asked.steps, repeats=asked.repeats))
        workload = make("mini-sd", folder / "work")
        cached = load([*options(workload, folder / "b", ema=True, precision="no"), "--log_every", "10"])
        report.add("Stable Diffusion, 20 M", **measure(cached, steps=asked.steps, repeats=asked.repeats))
        large = measure(sized(folder / "c", 50), steps=asked.steps, repeats=asked.repeats)
        report.add("UNet2DModel, 50 M", **large, goal=GOAL)
    report.finish(docs=asked.docs)


if __name__ == "__main__":
    main()

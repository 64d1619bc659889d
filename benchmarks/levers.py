"""What each lever of the section `train` changes on this machine, and those that every run has: its time against off.

    python benchmarks/levers.py [--rounds 5] [--batch 4] [--compile] [--docs]

The UNet is of 18 M parameters with cross-attention, on latents of 16x16; what becomes of freed memory is measured with
`unet64` of workloads.py, whose activations are large. Of each lever, `off` and `on` take turns,
after one of each that is not counted; the ratio is on : off, below 1 where the lever saves time. What is timed is a
forward and backward pass, or the part of a step that the lever is about. --compile: train.compile too, which takes some
minutes before its first figure, unless what it compiled still lies in the cache.
"""

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from diffusers.training_utils import EMAModel

from figures import Report, middle, parser
from finetune.compilation import compile_network, eager
from finetune.config import Ema as EmaConfig
from finetune.config import Train
from finetune.ema import Ema
from finetune.errors import ConfigError
from finetune.host_memory import keep_freed_memory
from finetune.modules import check_attention, checkpoint_blocks
from finetune.processes import SDPA, set_kernels
from finetune.seeding import PositionRandom
from shapes import unet as build
from workloads import SHAPE

Pair = tuple[str, str, Callable[[], float], Callable[[], float]]
"""Name of the lever, what is timed, and its seconds with the lever off and on."""
SIDE, TOKENS = 16, 77


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Passes:
    """Forward and backward passes of one UNet over the same batch."""

    def __init__(self, unet: torch.nn.Module, batch: int) -> None:
        self.unet = unet.train()
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 4, SIDE, SIDE, generator=random)
        self.time = torch.randint(1000, (batch,), generator=random)
        self.text = torch.randn(batch, TOKENS, unet.config.cross_attention_dim, generator=random)

    def __call__(self) -> None:
        """One pass."""
        self.unet.zero_grad()
        self.unet(self.x, self.time, encoder_hidden_states=self.text).sample.square().mean().backward()

    def under(self, train: Train) -> Callable[[], float]:
        """Seconds of a pass with the levers of `train`, which are switched outside of them."""

        def run() -> float:
            layout = torch.channels_last if train.channels_last else torch.contiguous_format
            self.unet.to(memory_format=layout)
            self.unet.disable_gradient_checkpointing()
            checkpoint_blocks(self.unet, train.gradient_checkpointing)
            set_kernels(train)
            bf16 = train.mixed_precision == "bf16"
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                return seconds(self)

        return run


def of_a_pass(passes: Passes) -> Iterator[Pair]:
    """The levers that change the pass itself."""
    levers = {
        "channels_last": Train(channels_last=True),
        "mixed_precision bf16": Train(mixed_precision="bf16"),
        "gradient_checkpointing, all blocks": Train(gradient_checkpointing=True),
        "gradient_checkpointing, the last block": Train(gradient_checkpointing=("up_blocks.2",)),
    }
    levers |= {f"sdpa_backend {name}": Train(sdpa_backend=name) for name in SDPA}
    for name, train in levers.items():
        try:
            check_attention(passes.unet, train)
        except ConfigError:  # a kernel for GPUs
            continue
        yield name, "pass", passes.under(Train()), passes.under(train)


def compiled(passes: Passes, kind: str) -> Pair:
    """A pass of a copy of the UNet that is compiled, against one of it that is not."""
    train, other = Train(compile=kind), Passes(copy.deepcopy(passes.unet), len(passes.x))
    compile_network(other.unet, train)

    def uncompiled() -> float:
        with eager(train):
            return seconds(other)

    return f"compile {kind}", "pass", uncompiled, lambda: seconds(other)


class Apart:
    """A process of its own, for what cannot be taken back in one: called, it gives the seconds of a pass."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, __file__, "--apart", *options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> float:
        """Ask for a pass."""
        print(file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def apart(*, kept: bool) -> None:
    """What `Apart` starts: a pass for each line, until there are no more, of unet64 of workloads.py at its batch."""
    if kept:
        keep_freed_memory()
    unet, x = build("ddpm", **SHAPE).train(), torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for _ in sys.stdin:
        unet.zero_grad()
        print(seconds(lambda: unet(x, 500).sample.square().mean().backward()), flush=True)


def of_the_rest(passes: Passes) -> Iterator[Pair]:
    """What every run has, against what it has it instead of."""
    passes()
    parameters = list(passes.unet.parameters())
    ways = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    steps = {name: torch.optim.AdamW(parameters, lr=1e-9, **how).step for name, how in ways.items()}
    yield "fused AdamW against foreach", "optimizer", lambda: seconds(steps["foreach"]), lambda: seconds(steps["fused"])
    yield "fused AdamW against a loop", "optimizer", lambda: seconds(steps["loop"]), lambda: seconds(steps["fused"])
    theirs, ours = EMAModel(parameters), Ema(dict(passes.unet.named_parameters()), EmaConfig())
    yield (
        "our average against diffusers'", "EMA",
        lambda: seconds(lambda: theirs.step(parameters)), lambda: seconds(ours.step),
    )  # fmt: skip
    shape = tuple(passes.x.shape)
    random = PositionRandom(0, torch.arange(len(passes.x)))
    yield (
        "noise keyed by position against torch.randn", "draws",
        lambda: seconds(lambda: torch.randn(shape)), lambda: seconds(lambda: random.normal("noise", shape[1:])),
    )  # fmt: skip


def main() -> None:
    """Measure all of them."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--compile", action="store_true", help="compile unet and blocks too")
    arguments.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    arguments.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    if given.apart:
        return apart(kept=given.kept)
    command = "python benchmarks/levers.py" + " --compile" * given.compile
    report, passes = Report("levers", command), Passes(build("levers"), given.batch)
    pairs = [*of_a_pass(passes)]
    pairs += [("freed memory kept", "pass", Apart(), Apart("--kept"))]
    pairs += [compiled(passes, kind) for kind in ("unet", "blocks")] if given.compile else []
    for name, part, off, on in (*pairs, *of_the_rest(passes)):
        rounds = [(off(), on()) for _ in range(given.rounds + 1)][1:]
        ratios = middle([after / before for before, after in rounds])
        report.add(
            name,
            of=part,
            off_ms=1e3 * middle([before for before, _ in rounds])["median"],
            on_ms=1e3 * middle([after for _, after in rounds])["median"],
            ratio=ratios["median"],
            lowest=ratios["lowest"],
            highest=ratios["highest"],
        )
    report.finish(docs=given.docs)


if __name__ == "__main__":
    main()

"""The UNet compiled by torch.compile, whole or by the layers that it repeats; and when the time for that has paid off.

It is compiled for the training alone: samples come in other shapes, each of which would have to be compiled too. Shapes
are static; with data.buckets there are several, compiled when they first come. torch keeps what it compiled on the
disk, so that only the first start of a run pays for all of it.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune.errors import ConfigError
from finetune.frozen import home
from finetune.processes import UNITS

if TYPE_CHECKING:
    from finetune.batching import Batch
    from finetune.config import Train
    from finetune.failures import MicroBatch
    from finetune.trainer import Trainer

MOST_GRAPHS = 4096
"""Of one function. After torch's own limit, 8, it would go on uncompiled; it is a guard against functions whose inputs
never settle, but SDXL's residual blocks have 10 shapes, times those of data.buckets."""


def compile_network(unet: nn.Module, cfg: Train) -> None:
    """Have torch compile the UNet, or each of its UNITS, in place when it is first called; as cfg.compile says.

    The names of the weights stay. Equal layers share what is compiled of them.
    """
    if cfg.compile == "off":
        return
    # torch would put it into the system's temporary folder, which is empty after a restart of the machine.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "compiled"))
    import torch._dynamo.config as limits  # a second, which only a run that compiles has to spend

    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MOST_GRAPHS)
    options = {"fallback_random": True}  # the masks of dropout are those that are drawn without compiling
    if cfg.cuda_graphs:
        options |= torch._inductor.list_mode_options("reduce-overhead")  # torch takes a mode or options, not both
    whole = cfg.compile == "unet"
    for module in [unet] if whole else [m for m in unet.modules() if type(m).__name__ in UNITS]:
        module.compile(dynamic=False, options=options)


def eager(cfg: Train) -> contextlib.AbstractContextManager:
    """Inside, what is compiled computes as if it were not."""
    return contextlib.nullcontext() if cfg.compile == "off" else torch.compiler.set_stance("force_eager")


def tried_out(trainer: Trainer, loss: Callable[[Batch, int], tuple[MicroBatch, torch.Tensor]]) -> str:
    """Compile, and measure what it costs and gains, in words for the plan; empty if nothing is compiled.

    loss: of a micro-batch. That of the first one is computed, with its gradients, which are thrown away: with what it
    draws, being keyed, nothing of the run changes. Raises ConfigError if torch cannot compile it.
    """
    cfg, accelerator = trainer.cfg.train, trainer.accelerator
    if cfg.compile == "off" or trainer.step == trainer.steps:
        return ""
    loader = trainer.loader()
    batch = loader.collate_fn(loader.dataset.__getitems__(next(iter(loader.batch_sampler))))  # without its processes
    with eager(cfg):
        try:
            uncompiled = min(_seconds(trainer, loss, batch) for _ in range(3))
        except torch.OutOfMemoryError:  # which compiling may well be there to avoid
            uncompiled = math.inf
    with accelerator.local_main_process_first():  # the others find its graphs on the disk
        try:
            compiling = _seconds(trainer, loss, batch)
        except Exception as error:  # of many types, none of them public; uncompiled it has just been computed
            raise ConfigError(
                f"train.compile {cfg.compile}: torch cannot compile the UNet here: {_reason(error)}. Install what is "
                "missing (on a CPU a C++ compiler, such as g++), or set train.compile off"
            ) from error
    compiled = min(_seconds(trainer, loss, batch) for _ in range(3))  # CUDA graphs are recorded in the first of them
    shapes = len(trainer.data.facts["buckets"]["images"]) if trainer.data.facts.get("buckets") else 1
    words = f"{cfg.compile}: compiled in {compiling:.0f} s" + f" for each of {shapes} shapes" * (shapes > 1)
    if math.isinf(uncompiled):
        return f"{words}; uncompiled, a pass does not fit into the memory"
    saved, left = trainer.accumulation * (uncompiled - compiled), trainer.steps - trainer.step
    steps = math.ceil(shapes * compiling / saved) if saved > 0 else math.inf
    pays = f"pays off after {steps:,} of {left:,} steps"
    if math.isinf(steps):
        pays = "never pays off: set train.compile off"
    elif steps > left:
        pays = f"would pay off after {steps:,} steps, and {left:,} are to come: set train.compile off"
    return f"{words}, a forward and backward pass takes {compiled / uncompiled:.2f} of the uncompiled time: {pays}"


def _seconds(trainer: Trainer, loss: Callable[[Batch, int], tuple[MicroBatch, torch.Tensor]], batch: Batch) -> float:
    """How long a forward and backward pass of this process takes that leaves nothing behind."""
    with _to_the_end(trainer.accelerator.device) as seconds, trainer.accelerator.no_sync(trainer.network):
        _, mean = loss(batch, 0)
        # Not backward(), which would fill .grad, and start what hooks do there.
        torch.autograd.grad(mean, list(trainer.parameters.values()), allow_unused=True)
    return seconds[0]


@contextlib.contextmanager
def _to_the_end(device: torch.device) -> Iterator[list[float]]:
    """The seconds until the device is done with what is computed inside; torch's global random state stays."""
    on_gpu, seconds = device.type != "cpu", []
    with torch.random.fork_rng([device] if on_gpu else [], device_type=device.type if on_gpu else "cuda"):
        start = time.perf_counter()
        yield seconds
        if on_gpu:
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)


def _reason(error: Exception) -> str:
    """The first line of what made torch give up; it wraps the error of the compiler in one of its own."""
    from torch._dynamo.exc import BackendCompilerFailed

    cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"

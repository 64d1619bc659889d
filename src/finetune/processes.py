"""Devices and processes, as Accelerate gives them; and how processes wait for each other and tell when one is gone."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed import DistError, DistStoreError, PrefixStore, TCPStore
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune import tracking
from finetune.config import Train, TrainConfig
from finetune.errors import ConfigError, ProcessError
from finetune.host_memory import keep_freed_memory
from finetune.signals import SIGNALS
from finetune.watchdog import bounded

UNITS = {"ResnetBlock2D", "BasicTransformerBlock"}
"""The layers that a UNet repeats: FSDP2 gathers the parameters of each together, and what is in none of them first;
train.compile blocks compiles each."""
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""The kernels of attention by their names in train.sdpa_backend."""
COMPRESSION = {"none": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}
BEAT = 0.25
"""Seconds between two signs of life of a process."""


class Lifeline:
    """Signs of life of all processes and meetings of them, in the key-value store of the launcher.

    A collective counts how long a process is waited for; a meeting whether it lives. So the main process may check data
    or draw for hours, and one that was stopped or lost its machine is still noticed after `patience`.
    """

    def __init__(self, *, name: str, rank: int, processes: int, patience: float) -> None:
        """name: the same on all processes, and never used before in this store. patience: seconds."""
        self.rank, self.processes, self.patience = rank, processes, patience
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with self._asking():
            self._store, own = (PrefixStore(name, TCPStore(*address, is_master=False)) for _ in range(2))
        self._seen: dict[int, tuple[int, float]] = {}
        self._meetings = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(own,), daemon=True, name="lifeline")
        self._thread.start()
        atexit.register(self.close)

    def _asking(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the store is asked: it may be in a process that was stopped, and then no call of it returns."""
        return bounded(1.2 * self.patience + 5)

    def _beat(self, store: PrefixStore) -> None:
        with contextlib.suppress(DistError):  # the process that holds the store has ended, and so will this one
            while not self._closed.is_set():
                store.add(f"beat/{self.rank}", 1)
                self._closed.wait(BEAT)

    def close(self) -> None:
        """No signs of life any more."""
        self._closed.set()
        self._thread.join(timeout=1)  # at the interpreter's end, a thread that returns from C++ aborts the process
        atexit.unregister(self.close)

    def meet(self) -> None:
        """Wait for all processes, as long as they live. Raises ProcessError that names one that does not."""
        self._meetings += 1
        everybody = f"meeting/{self._meetings}"
        try:
            with self._asking():
                if self._store.add(f"{everybody}/arrived", 1) == self.processes:
                    self._store.set(everybody, b"here")
            while not self._met(everybody):
                if gone := self.gone(self.patience):
                    words = "; ".join(f"process {rank} {what}" for rank, what in gone.items())
                    raise ProcessError(f"process {self.rank} waits for nobody: {words}")
        except DistError as error:
            raise ProcessError(f"process 0 has ended, or its machine cannot be reached ({error})") from None

    def _met(self, everybody: str) -> bool:
        """Whether all processes came to the meeting, which is waited for a moment."""
        with self._asking(), contextlib.suppress(DistStoreError):  # not yet
            self._store.wait([everybody], timedelta(seconds=min(1.0, self.patience / 5)))
            return True
        return False

    def leave(self, reason: str) -> None:
        """Tell the others why this process ends."""
        with self._asking(), contextlib.suppress(DistError):
            self._store.set(f"left/{self.rank}", reason.encode())

    def gone(self, silence: float) -> dict[int, str]:
        """The processes that said that they end, or gave no sign of life for `silence` seconds, and which in words."""
        found = {}
        with self._asking():
            for rank in {*range(self.processes)} - {self.rank}:
                if self._store.check([f"left/{rank}"]):
                    found[rank] = f"ended: {self._store.get(f'left/{rank}').decode()}"
                elif self._silent(rank) > silence:
                    found[rank] = f"was killed or stopped: no sign of life for {self._silent(rank):.1f} s"
        return found

    def _silent(self, rank: int) -> float:
        """Seconds since a call saw a new sign of life of `rank`."""
        count, now = self._store.add(f"beat/{rank}", 0), time.monotonic()
        if self._seen.get(rank, (-1, 0.0))[0] != count:
            self._seen[rank] = count, now
        return now - self._seen[rank][1]

    def find_gone(self) -> dict[int, str]:
        """As `gone`, of a process that has just ended: watches for as long as it takes to be sure, a few BEATs."""
        try:
            end = time.monotonic() + 6 * BEAT
            while not (found := self.gone(4 * BEAT)) and time.monotonic() < end:
                time.sleep(BEAT / 2)
            return found
        except DistError:
            return {0: "has ended, or its machine cannot be reached"}


class Processes(Accelerator):
    """Accelerate's devices, processes and precision, where waiting for another process lasts as long as that lives."""

    def __init__(self, *, timeout: float, compression: str = "none", **settings: Any) -> None:
        """timeout: seconds after which a collective fails, and a process without a sign of life counts as dead.
        compression: of the gradients between processes, a key of COMPRESSION."""
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=COMPRESSION[compression])
        super().__init__(kwargs_handlers=[group, ddp], **settings)
        self._shard_on_the_cpu_too()
        self.lifeline: Lifeline | None = None
        if self.num_processes > 1:
            name = int(largest(self, secrets.randbits(62) if self.is_main_process else 0))  # restarts share a store
            ranks = {"rank": self.process_index, "processes": self.num_processes}
            self.lifeline = Lifeline(name=f"finetune/{name}", **ranks, patience=timeout)

    @property
    def shards(self) -> bool:
        """Whether the network's parameters, gradients and moments are sharded over the processes (FSDP2)."""
        return self.distributed_type == DistributedType.FSDP

    def _shard_on_the_cpu_too(self) -> None:
        """Accelerate shards on accelerators only, torch on CPUs as well: there it can be tried without any."""
        if self.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if self.shards and self.state.fsdp_plugin.fsdp_version == 2:
            # Accelerate's policy casts weights and inputs, hence timesteps and SDXL's sizes: of 1023 bfloat16 makes
            # 1024. Autocast casts what is multiplied, as it does without sharding.
            self.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)

    def interrupting(self) -> contextlib.AbstractContextManager:
        """Inside, a signal raises Interrupted; not with FSDP2, where no process may leave the others amid an
        evaluation of the network.
        """
        return contextlib.nullcontext() if self.shards else SIGNALS.interrupting()

    def prepare(self, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """As Accelerate's, for these two; with FSDP2 under autocast too."""
        if self.shards:
            # Accelerate's policy by size takes lists of modules for units, too, which torch refuses.
            plugin, classes = self.state.fsdp_plugin, {type(module).__name__ for module in network.modules()}
            plugin.auto_wrap_policy = transformer_auto_wrap_policy
            plugin.transformer_cls_names_to_wrap = list(UNITS & classes)
        prepared, optimizer = super().prepare(network, optimizer)
        if self.shards and self.mixed_precision == "bf16":
            prepared.forward = torch.autocast(self.device.type, torch.bfloat16)(prepared.forward)
        return prepared, optimizer

    def wait_for_everyone(self) -> None:
        """As Accelerate's, without its time limit. Raises ProcessError if a process ended or gives no sign of life."""
        if self.lifeline:
            self.lifeline.meet()
        super().wait_for_everyone()

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The other processes enter when the main one has left, however long that takes."""
        with self._first(self.is_main_process):
            yield

    @contextlib.contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """The other processes of each machine enter when the first of it has left, however long that takes."""
        with self._first(self.is_local_main_process):
            yield

    @contextlib.contextmanager
    def _first(self, first: bool) -> Iterator[None]:
        if not first:
            self.wait_for_everyone()
        try:
            yield
        except Exception as error:
            self.leave(error)
            raise
        if first:
            self.wait_for_everyone()

    @contextlib.contextmanager
    def all_together(self) -> Iterator[None]:
        """Each process does its share inside, and leaves when all have, however long that takes."""
        try:
            yield
        except Exception as error:
            self.leave(error)
            raise
        self.wait_for_everyone()

    def leave(self, error: Exception) -> None:
        """Tell the other processes that this one ends, and why."""
        if self.lifeline:
            self.lifeline.leave(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")

    def find_gone(self) -> dict[int, str]:
        """The processes that ended, hang or lost their machine, and which of it in words."""
        return self.lifeline.find_gone() if self.lifeline else {}

    def end_training(self) -> None:
        """As Accelerate's; the processes are not tied to each other any more."""
        if self.lifeline:
            self.lifeline.close()
        super().end_training()


def build_accelerator(cfg: TrainConfig) -> Processes:
    """Accelerate's devices, processes and precision. Raises ConfigError if it cannot give what cfg asks for."""
    try:
        accelerator = Processes(
            # Or torchrun and notebook_launcher without a GPU start separate runs of one process each.
            cpu=not torch.accelerator.is_available(),
            timeout=60 * cfg.train.timeout_minutes,
            compression=cfg.train.gradient_compression,
            mixed_precision=cfg.train.mixed_precision,
            log_with=tracking.trackers(cfg.tracking) or None,
            project_dir=Path(cfg.output_dir) / "logs",
        )
    except ValueError as error:  # such as a second precision in one Python process
        raise ConfigError(f"train.mixed_precision {cfg.train.mixed_precision}: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("train.mixed_precision: fp16 needs a GPU, and there is none here: use bf16 or no")
    single_or_ddp = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if not accelerator.shards and accelerator.distributed_type not in single_or_ddp:
        raise ConfigError(
            f"{accelerator.distributed_type.value}: only data-parallel training (DDP) and FSDP2 are supported; launch "
            "with configs/accelerate/multi_gpu.yaml or configs/accelerate/fsdp2.yaml"
        )
    if accelerator.shards:
        check_sharding(accelerator, cfg)
    check_levers(accelerator, cfg.train)
    accelerator.gradient_accumulation_steps = 1  # accumulated by the loop, in windows that do not end with an epoch
    return accelerator


def check_levers(accelerator: Processes, cfg: Train) -> None:
    """Raise ConfigError for what this launch cannot do, or could only do nothing with."""
    if cfg.gradient_compression != "none" and accelerator.num_processes == 1:
        raise ConfigError(
            f"train.gradient_compression {cfg.gradient_compression}: a single process sends no gradients: use none"
        )
    if cfg.cuda_graphs and accelerator.device.type != "cuda":
        raise ConfigError("train.cuda_graphs: there is no CUDA device here: use false")
    if cfg.cuda_graphs and (cfg.gradient_accumulation_steps or 1) > 1:
        raise ConfigError(
            f"train.cuda_graphs: with gradient_accumulation_steps {cfg.gradient_accumulation_steps} the replay of a "
            "micro-step would overwrite the gradients of the one before: use 1, or cuda_graphs false"
        )


def check_sharding(accelerator: Processes, cfg: TrainConfig) -> None:
    """Raise ConfigError for what does not go with FSDP2."""
    if accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError("fsdp_version 1 is not supported: set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does")
    if accelerator.mixed_precision == "fp16":
        raise ConfigError("train.mixed_precision: fp16 does not go with FSDP2: use bf16 or no")
    settings = {"train.compile": cfg.train.compile != "off", "train.channels_last": cfg.train.channels_last}
    settings |= {"train.gradient_compression": cfg.train.gradient_compression != "none"}
    settings |= {"ema.snapshot_every": cfg.ema.snapshot_every, "sample.autoguidance": cfg.sample.autoguidance}
    settings |= {"optimizer.kind": cfg.optimizer.kind != "adamw"}
    settings |= {"lora": cfg.lora, "train.train_text_encoder": cfg.train.train_text_encoder}
    if refused := [name for name, value in settings.items() if value]:
        raise ConfigError(f"{' and '.join(refused)}: does not go with FSDP2, remove it or launch without FSDP")


_ATTENTION = contextlib.ExitStack()
"""Closed, torch chooses the kernels of attention as it does by default: a process may train several times."""


def set_kernels(cfg: Train) -> None:
    """Let torch use the kernels that cfg.train allows, on every device of this process, and none of a run before."""
    if not torch.accelerator.is_available():
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.allow_tf32
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS, by its own error
    torch.use_deterministic_algorithms(cfg.deterministic)
    torch.backends.cudnn.benchmark = cfg.cudnn_benchmark
    _ATTENTION.close()
    if cfg.sdpa_backend != "auto":  # `modules.check_attention` shows that the UNet gets the first of them
        wanted = [SDPA[cfg.sdpa_backend], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        _ATTENTION.enter_context(sdpa_kernel(wanted, set_priority=True))


def average_gradients(accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients of parameters that DDP does not know by their means over the processes, all in one go.

    A parameter without a gradient, as of a layer that is not read, has none on any process.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if accelerator.num_processes > 1 and gradients:
        means = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def largest(accelerator: Accelerator, number: int) -> torch.Tensor:
    """The largest `number` of any process, for what all of them must decide alike: a scalar on the device, which is
    not waited for before it is read."""
    found = torch.full((), number, device=accelerator.device)  # torch.tensor would wait for the device
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return found

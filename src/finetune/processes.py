"""Devices and processes, as Accelerate gives them."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs

from finetune import tracking
from finetune.config import Train, TrainConfig
from finetune.errors import ConfigError


def build_accelerator(cfg: TrainConfig) -> Accelerator:
    """Accelerate's devices, processes and precision. Raises ConfigError if it cannot give what cfg asks for."""
    try:
        accelerator = Accelerator(
            # Or torchrun and notebook_launcher without a GPU start separate runs of one process each.
            cpu=not torch.accelerator.is_available(),
            # The main process alone checks the data and draws grids; torch gives up waiting for it after 10 minutes.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
            mixed_precision=cfg.train.mixed_precision,
            log_with=tracking.trackers(cfg.tracking) or None,
            project_dir=Path(cfg.output_dir) / "logs",
        )
    except ValueError as error:  # such as a second precision in one Python process
        raise ConfigError(f"train.mixed_precision {cfg.train.mixed_precision}: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("train.mixed_precision: fp16 needs a GPU, and there is none here: use bf16 or no")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ConfigError(
            f"{accelerator.distributed_type.value}: only data-parallel training (DDP) is supported so far; launch with "
            "configs/accelerate/multi_gpu.yaml"
        )
    accelerator.gradient_accumulation_steps = 1  # accumulated by the loop, in windows that do not end with an epoch
    return accelerator


def set_kernels(cfg: Train) -> None:
    """Let torch use the kernels that cfg.train allows, on every device of this process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.allow_tf32
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS, by its own error
    torch.use_deterministic_algorithms(cfg.deterministic)


def over_processes(accelerator: Accelerator, number: int) -> int:
    """The largest `number` of any process: all of them must decide alike."""
    if accelerator.num_processes == 1:
        return number
    largest = torch.tensor(int(number), device=accelerator.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)

"""The smallest run that has everything: 40 real digits, 8x8 pixels, classes, a UNet of 40 k parameters, averages."""

from pathlib import Path

from pydantic import TypeAdapter

from finetune.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


def config(output_dir: Path, **sections) -> TrainConfig:
    """The tiny run; `sections` are merged over its own, e.g. train={"max_train_steps": 3}."""
    settings = {
        "output_dir": str(output_dir),
        "data": {
            "dataset_name": str(ROOT / "assets" / "digits"),
            "max_train_samples": 20,
            "resolution": 8,
            "random_flip": True,
            "dataloader_num_workers": 0,
        },
        "conditioning": {"kind": "class_label"},
        "model": {
            "kind": "unet2d",
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "norm_num_groups": 4,
            "dropout": 0.1,
        },
        "train": {"max_train_steps": 9, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-3, "lr_warmup_steps": 2},
        "ema": {"use_ema": True, "ema_max_decay": [0.9, 0.5]},
        "checkpoint": {"checkpointing_steps": 2},
        "tracking": {"log_every": 1, "report_to": "none"},
        "sample": {"num_images": 2, "num_inference_steps": 2},
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values} if isinstance(values, dict) else values
    return TypeAdapter(TrainConfig).validate_python(settings)


def steps(trainer, n: int) -> float:
    """n steps of a trainer of this process; the gradient norm of the last."""
    from finetune.meter import Meter  # imports torch, which whoever wants a configuration only need not have

    meter = Meter(trainer.accelerator, trainer.modules.objective)
    batches = meter.waiting(iter(trainer.loader()))
    for _ in range(n):
        trainer.train_step(batches, meter)
    return meter.read()["grad_norm"]

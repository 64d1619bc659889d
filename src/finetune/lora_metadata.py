"""What a LoRA file in sd-scripts' naming says of its training: sd-scripts' own `ss_*` entries, and ModelSpec's.

All values are strings, as safetensors wants them; None is "None", as sd-scripts writes it. ModelSpec 1.0.1:
https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from diffusers import DiffusionPipeline

from finetune.config import TrainConfig
from finetune.config_launch import batch_plan
from finetune.lora_formats import Adapter
from finetune.lora_names import is_sdxl
from finetune.provenance import public_name, published_config


def tag_frequency(captions: Iterable[Sequence[str]]) -> dict[str, int]:
    """How many images have each tag: the parts of their captions between commas, the most frequent first."""
    counts: Counter[str] = Counter()
    for several in captions:
        counts.update({tag.strip() for caption in several for tag in caption.split(",")} - {""})
    return dict(counts.most_common())


def kohya_metadata(
    adapters: Mapping[str, Adapter],
    pipeline: DiffusionPipeline,
    *,
    cfg: TrainConfig,
    run: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    tags: Mapping[str, int],
) -> dict[str, str]:
    """The metadata of the file, without local paths. run: the content of run.json; metrics: the lines of metrics.jsonl;
    tags: as `tag_frequency` counts them."""
    public, steps = published_config(cfg), metrics[-1]["step"] if metrics else None
    train, optimizer, data = public.train, public.optimizer, run.get("data", {})
    global_batch = batch_plan(cfg, run.get("environment", {}).get("num_processes", 1))[0]
    images = data.get("rows")
    base = public_name(cfg.model.pretrained_model_name_or_path) if cfg.model.kind == "pretrained" else None
    values = {
        "ss_output_name": public.output_dir,
        "ss_sd_model_name": base,
        "ss_base_model_version": _version(pipeline),
        "ss_v2": _version(pipeline).startswith("sd_v2"),
        "ss_network_module": "networks.lora",
        **_network(adapters),
        "ss_learning_rate": optimizer.learning_rate,
        "ss_unet_lr": optimizer.learning_rate,
        "ss_text_encoder_lr": (optimizer.text_encoder_lr or optimizer.learning_rate) if len(adapters) > 1 else None,
        "ss_lr_scheduler": optimizer.lr_scheduler,
        "ss_lr_warmup_steps": optimizer.lr_warmup_steps,
        "ss_max_grad_norm": train.max_grad_norm,
        "ss_max_train_steps": steps,
        "ss_steps": steps,
        "ss_epoch": int(metrics[-1]["epoch"]) if metrics and "epoch" in metrics[-1] else None,
        "ss_num_train_images": images,
        "ss_num_batches_per_epoch": -(-images // global_batch) if images else None,
        "ss_total_batch_size": global_batch,
        "ss_gradient_checkpointing": bool(train.gradient_checkpointing),
        "ss_mixed_precision": train.mixed_precision or "no",
        "ss_resolution": f"({public.data.resolution}, {public.data.resolution})",
        "ss_seed": public.seed,
        "ss_tag_frequency": json.dumps({_data_name(public): dict(tags)}),
    }
    texts = {name: str(value) for name, value in values.items()}
    return texts | _model_spec(pipeline, public)


def _network(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Rank and alpha, as sd-scripts scales: of rsLoRA and of convolutions as well."""
    adapter = adapters.get("unet") or next(iter(adapters.values()))
    settings = adapter.settings()
    alpha = settings["lora_alpha"] * (settings["r"] ** 0.5 if adapter.use_rslora else 1)
    arguments: dict[str, Any] = {"dora_wd": True} if adapter.use_dora else {}
    if any(tensor.dim() == 4 and tensor.shape[-1] > 1 for tensor in adapter.tensors.values()):
        arguments |= {"conv_dim": settings["r"], "conv_alpha": alpha}
    return {"ss_network_dim": settings["r"], "ss_network_alpha": alpha, "ss_network_args": json.dumps(arguments)}


def _version(pipeline: DiffusionPipeline) -> str:
    """sd-scripts' name of the family."""
    if is_sdxl(pipeline.unet):
        return "sdxl_base_v1-0"
    if not pipeline.unet.config.use_linear_projection:  # in this, and in the width of its text, SD 2.x differs
        return "sd_v1"
    return "sd_v2_v" if _prediction(pipeline) == "v" else "sd_v2"


def _prediction(pipeline: DiffusionPipeline) -> str:
    kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
    return {"v_prediction": "v"}.get(kind, kind)


def _model_spec(pipeline: DiffusionPipeline, public: TrainConfig) -> dict[str, str]:
    names = {
        "sd_v1": "stable-diffusion-v1",
        "sd_v2": "stable-diffusion-v2-512",
        "sd_v2_v": "stable-diffusion-v2-768-v",
        "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
    }
    original = "https://github.com/Stability-AI/generative-models"  # whose names SDXL's layers have in the file
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{names[_version(pipeline)]}/lora",
        "implementation": original if is_sdxl(pipeline.unet) else "diffusers",
        "title": public.output_dir,
        "date": datetime.now(UTC).replace(microsecond=0, tzinfo=None).isoformat(),
        "prediction_type": _prediction(pipeline),
        "resolution": f"{public.data.resolution}x{public.data.resolution}",
    }
    return {f"modelspec.{name}": value for name, value in entries.items()}


def _data_name(public: TrainConfig) -> str:
    return public.data.train_data_dir or public.data.dataset_name or "data"

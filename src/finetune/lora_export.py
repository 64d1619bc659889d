"""The LoRA of a run as a folder: diffusers' file, on demand that of sd-scripts, each proved by a fresh process."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusers import DiffusionPipeline

from finetune.card import LoraWords, code, fenced, model_card
from finetune.config import TrainConfig
from finetune.config_choices import conditions
from finetune.config_export import LORA_FILE
from finetune.export import check_finite, replacing, write_record
from finetune.lora_formats import Adapter, adapters_of, kohya_names_of, write_diffusers, write_kohya
from finetune.lora_metadata import kohya_metadata, tag_frequency
from finetune.lora_pipeline import adaptable
from finetune.lora_proof import diffusers_loads, prove
from finetune.provenance import published_config

if TYPE_CHECKING:
    from finetune.data import TrainData

log = logging.getLogger(__name__)


def export_lora(
    pipeline: DiffusionPipeline,
    *,
    output_dir: Path,
    cfg: TrainConfig,
    run: dict[str, Any],
    samples: Path | None,
    metrics: Path | None,
    kohya: bool = False,
    tags: Mapping[str, int] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write `output_dir/pipeline` from the LoRA that the modules of `pipeline` hold at this moment; returns the folder.

    It holds pytorch_lora_weights.safetensors, with `kohya` also <name>_kohya.safetensors, and README.md, config.yaml,
    run.json, samples.png and loss.png; the base model is not in it. The other arguments are those of `export.export`;
    tags: how many images have each, for sd-scripts' metadata. An earlier export stays until every file of the new one
    was loaded in a fresh process and found to be the same LoRA. Raises NonFiniteError for a weight that is NaN or
    infinite, ConfigError for a layer that sd-scripts has no name for, FinetuneError if the proof fails.
    """
    check_finite(pipeline)
    modules = adaptable(pipeline)
    adapters = adapters_of(modules)
    if kohya:
        kohya_names_of(adapters, modules)
    name = re.sub(r"[^\w.-]", "_", published_config(cfg).output_dir)
    by_diffusers = {LORA_FILE: diffusers_loads(pipeline.unet)}
    with replacing(output_dir) as folder:
        write_diffusers(adapters, folder / LORA_FILE)
        lines = write_record(folder, cfg=cfg, run=run, samples=samples, metrics=metrics)
        if kohya:
            metadata = kohya_metadata(adapters, pipeline, cfg=cfg, run=run, metrics=lines, tags=tags or {})
            write_kohya(adapters, modules, folder / f"{name}_kohya.safetensors", metadata)
            # diffusers leaves DoRA's lengths out of such a file, with a warning
            by_diffusers[f"{name}_kohya.safetensors"] = not any(adapter.use_dora for adapter in adapters.values())
        card = model_card(
            cfg,
            run,
            pipeline=type(pipeline).__name__,
            samples=samples is not None,
            metrics=lines,
            repo_id=repo_id,
            lora=LoraWords(
                sentence=_sentence(adapters, cfg, lines),
                usage=_usage(by_diffusers, adapters, cfg, repo_id or cfg.hub.hub_model_id or "."),
            ),
        )
        (folder / "README.md").write_text(card)
        count = prove(pipeline, folder, by_diffusers, cfg, run)
        for file in by_diffusers:
            log.info("%s: loaded in a fresh process, %d of %d tensors matched, same outputs", file, count, count)
    return output_dir / "pipeline"


def tags_of(data: TrainData) -> dict[str, int]:
    """How many images have each tag in their captions; none for a stream, whose rows are read once only."""
    if not isinstance(data.rows, np.ndarray) or data.captions(int(data.rows[0])) is None:
        return {}
    return tag_frequency(data.captions(int(row)) for row in data.rows)


def _sentence(adapters: Mapping[str, Adapter], cfg: TrainConfig, lines: list[dict[str, Any]]) -> str:
    kind = "DoRA" if any(adapter.use_dora for adapter in adapters.values()) else "LoRA"
    parts = []
    for part, adapter in adapters.items():
        layer = next(iter(adapter.alphas))
        numbers = f"rank {adapter.rank(layer)}, scale {adapter.scale(layer):g}"
        parts.append(f"{len(adapter.alphas)} layers of the {code(part)} ({numbers})")
    length = f", trained for {lines[-1]['step']:,} optimizer steps" if lines else ""
    base = _base(cfg) or "the UNet that its config.yaml draws"
    return f"A {kind} for {code(base)}: small matrices beside {' and '.join(parts)}{length}."


def _base(cfg: TrainConfig) -> str | None:
    """What the card calls the model that the LoRA belongs to; None for a UNet that the run itself drew."""
    model = published_config(cfg).model
    return model.pretrained_model_name_or_path if model.kind == "pretrained" else None


def _usage(by_diffusers: Mapping[str, bool], adapters: Mapping[str, Adapter], cfg: TrainConfig, place: str) -> str:
    base, others = _base(cfg), [name for name in by_diffusers if name != LORA_FILE]
    text = conditions(cfg.conditioning).get("text")
    reads_as_diffusers = text is None or (not text.clip_skip and text.chunks == 1)
    if by_diffusers[LORA_FILE] and base and cfg.model.subfolder and reads_as_diffusers:
        usage = fenced(_snippet(cfg, place), "python")
    else:
        merge = f"\nfinetune merge {LORA_FILE} --base {base!r} --out merged" if base else ""
        usage = "diffusers alone does not load it, or reads prompts otherwise. In a checkout of finetune:\n\n"
        usage += fenced(f"finetune sample . --out pictures{merge}", "bash")
    scales = {adapter.scale(layer) for adapter in adapters.values() for layer in adapter.alphas}
    if scales != {1.0}:
        usage += "\n\nIts scale is not 1, which diffusers reads from version 0.34 on."
    for name in others:
        usage += f"\n\n{code(name)} is the same LoRA for AUTOMATIC1111, ComfyUI and others that read sd-scripts' files"
        usage += "." if by_diffusers[name] else "; diffusers cannot read DoRA from such a file."
    return usage


def _snippet(cfg: TrainConfig, place: str) -> str:
    """A program that draws a picture with the base model and the LoRA."""
    public = published_config(cfg)
    revision = f", revision={public.model.revision!r}" if public.model.revision else ""
    prompt = public.sample.prompts[0] if public.sample.prompts else "a prompt"
    inpaint = "inpaint" in conditions(public.conditioning)
    images = "image=Image.open('image.png'), mask_image=Image.open('mask.png'), " if inpaint else ""
    settings = f"{images}num_inference_steps={public.sampling_steps}, guidance_scale={public.sample.guidance_scale:g}"
    return "\n".join(
        [
            "import torch",
            *["from PIL import Image"] * inpaint,
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({_base(cfg)!r}{revision})",
            f"pipeline.load_lora_weights({place!r}, weight_name={LORA_FILE!r})",
            "generator = torch.Generator().manual_seed(0)",
            f"images = pipeline({prompt!r}, {settings}, generator=generator).images",
            'images[0].save("image.png")',
        ]
    )

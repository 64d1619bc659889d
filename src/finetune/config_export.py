"""What is written when training is done. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.config_types import section

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file of an exported LoRA that diffusers looks for."""


@section
class Export:
    """What output_dir/pipeline holds: a whole pipeline or, of a run with a LoRA, the LoRA in diffusers' format."""

    kohya: bool = False
    """Of a LoRA, write <name>_kohya.safetensors too, in the naming of sd-scripts, which AUTOMATIC1111 and ComfyUI read.
    Its metadata tell the settings of the training and how often each tag is in the captions."""


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds a pipeline or a LoRA."""
    return (folder / "model_index.json").is_file() or (folder / LORA_FILE).is_file()


def export_contradictions(export: Export, *, lora: bool) -> Iterator[tuple[str, str]]:
    """What is asked for and cannot be written, as (place, problem) pairs. lora: whether a LoRA is trained."""
    if export.kohya and not lora:
        yield "export.kohya", "the format is one of LoRAs, and none is trained: add a section lora, or use false"

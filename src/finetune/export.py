"""The finished model as a folder that diffusers loads: written aside, read back and compared, then put in place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    ConfigMixin,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from finetune.card import model_card, read_metrics
from finetune.compilation import eager
from finetune.config import TrainConfig
from finetune.config_io import dump
from finetune.durable import to_disk
from finetune.errors import FinetuneError, NonFiniteError
from finetune.pipeline_conditions import kinds_of
from finetune.pipelines import UNetPipeline
from finetune.pretrained import own_memory
from finetune.provenance import public_name, published_config, published_run

_FOLDER, _TEMPORARY, _OLD = "pipeline", ".pipeline-tmp-", ".pipeline-old-"


def export(
    pipeline: DiffusionPipeline,
    *,
    output_dir: Path,
    cfg: TrainConfig,
    run: dict[str, Any],
    samples: Path | None,
    metrics: Path | None,
    repo_id: str | None = None,
) -> Path:
    """Write `output_dir/pipeline` from the weights that `pipeline` holds at this moment; returns the folder.

    It holds what diffusers needs, README.md, config.yaml, run.json, samples.png and loss.png, and nothing else; no path
    of this machine is in it. run: the content of run.json; samples: a picture; metrics: metrics.jsonl; repo_id: the
    Hub repository that the card names. An earlier export stays until the new one is whole and proved to load as the
    same model. Raises NonFiniteError for a weight that is NaN or infinite, FinetuneError if the proof fails.
    """
    check_finite(pipeline)
    with replacing(output_dir) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        for path in folder.rglob("*config.json"):
            _scrub(path)
        _scrub(folder / "model_index.json")
        lines = write_record(folder, cfg=cfg, run=run, samples=samples, metrics=metrics)
        card = model_card(
            cfg, run, pipeline=type(pipeline).__name__, samples=samples is not None, metrics=lines, repo_id=repo_id
        )
        (folder / "README.md").write_text(card)
        with eager(cfg.train):
            verify(pipeline, folder, same_kernels=_same_kernels(pipeline, cfg))
    return output_dir / _FOLDER


@contextmanager
def replacing(output_dir: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `output_dir/pipeline` if nothing is raised inside."""
    output_dir.mkdir(parents=True, exist_ok=True)
    temporary = output_dir / f"{_TEMPORARY}{os.getpid()}"
    _tidy(output_dir)
    try:
        temporary.mkdir()
        yield temporary
        to_disk(temporary)
        _replace(output_dir / _FOLDER, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_finite(pipeline: DiffusionPipeline) -> None:
    """Raises NonFiniteError that names the first weight with a NaN or an infinity."""
    for component, module in _modules(pipeline):
        for name, tensor in module.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{component}: the weight {name} is NaN or infinite, so the model is not exported; an earlier "
                    "export is untouched. Export an earlier checkpoint, or train with a lower learning rate."
                )


def verify(pipeline: DiffusionPipeline, folder: Path, *, same_kernels: bool) -> None:
    """Load `folder` and compare it with `pipeline`: every weight bit for bit, every setting, and two short samples.

    same_kernels: whether both compute the same bits, so that the images must be equal; otherwise they must be finite.
    Raises FinetuneError that names what differs.
    """
    with without_loading_bars():
        plain = {"add_watermarker": False} if isinstance(pipeline, StableDiffusionXLPipeline) else {}
        loaded = type(pipeline).from_pretrained(folder, local_files_only=True, use_safetensors=True, **plain)
    originals, copies = dict(_modules(pipeline)), dict(_modules(loaded))
    _demand(originals.keys() == copies.keys(), f"it has the models {sorted(copies)}, not {sorted(originals)}")
    for component, original in originals.items():
        _same_weights(component, original.state_dict(), copies[component].state_dict())
    for component in [name for name, value in pipeline.components.items() if isinstance(value, ConfigMixin)]:
        _same_settings(component, pipeline.components[component], loaded.components[component])
    _same_settings("model_index.json", pipeline, loaded)
    for component, original in originals.items():
        if copies[component].dtype != original.dtype:  # diffusers loads half precision as float32
            copies[component].to(original.dtype)
        own_memory(copies[component])
        for mine, theirs in zip(original.parameters(), copies[component].parameters(), strict=True):
            theirs.requires_grad = mine.requires_grad  # torch.matmul looks at it, and then sums in another order
    images = _draw(pipeline)
    # Beside the state of the optimizer, a device may have no room for both.
    devices = {component: next(original.parameters()).device for component, original in originals.items()}
    try:
        _exchange(originals, copies, devices)
        again = _draw(loaded)
    finally:
        _exchange(copies, originals, devices)
    _demand(bool(np.isfinite(again).all()), "its samples are not finite")
    _demand(not same_kernels or np.array_equal(images, again), "its samples differ from those of the trained model")


def _exchange(
    away: Mapping[str, torch.nn.Module], here: Mapping[str, torch.nn.Module], devices: Mapping[str, torch.device]
) -> None:
    """Let the ones wait in the memory of the host and the others compute on the device."""
    for module in away.values():
        module.to("cpu")
    for name, module in here.items():
        module.to(devices[name])


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Inside, diffusers and transformers show no bars for reading and writing files; downloads and sampling do.

    They are over before they can be read, and tear the screen of a training apart.
    """
    downloads = not are_progress_bars_disabled()
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    if downloads:  # transformers has switched them off too
        enable_progress_bars()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def write_record(
    folder: Path, *, cfg: TrainConfig, run: dict[str, Any], samples: Path | None, metrics: Path | None
) -> list[dict[str, Any]]:
    """Write config.yaml, run.json, samples.png and loss.png, as they may be shown; returns the lines of `metrics`."""
    (folder / "config.yaml").write_text(dump(published_config(cfg)))
    (folder / "run.json").write_text(json.dumps(published_run(run, cfg), indent=1))
    if samples is not None:
        shutil.copyfile(samples, folder / "samples.png")
    lines = read_metrics(metrics) if metrics is not None else []
    if lines:
        from finetune.plots import draw_loss  # matplotlib: only who draws pays

        draw_loss(lines, folder / "loss.png")
    return lines


def _scrub(path: Path) -> None:
    """Replace the local paths that diffusers and transformers note in their JSON (`_name_or_path` and the like)."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            named = {"_name_or_path", "name_or_path"} & value.keys()
            return {k: public_name(v) if k in named and v else clean(v) for k, v in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, str) and re.match(r"(/|[A-Za-z]:\\)[^/\\]+[/\\]", value):
            return public_name(value)
        return value

    text = path.read_text()
    cleaned = clean(json.loads(text))
    if cleaned != json.loads(text):  # untouched files stay as the libraries wrote them
        path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")


def _modules(pipeline: DiffusionPipeline) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module))


def _same_kernels(pipeline: DiffusionPipeline, cfg: TrainConfig) -> bool:
    """Whether the modules as trained and as loaded compute the same bits: plain float32 on a CPU."""
    train = cfg.train
    changed = train.mixed_precision in ("fp16", "bf16") or train.channels_last
    return pipeline.device.type == "cpu" and not changed


def _same_weights(component: str, original: dict[str, torch.Tensor], copy: dict[str, torch.Tensor]) -> None:
    _demand(original.keys() == copy.keys(), f"{component} has other weights: {sorted(original.keys() ^ copy.keys())}")
    for name, tensor in original.items():
        # Compared as bytes, in the original's dtype: loading may have widened it, which is exact.
        ours = tensor.detach().cpu().contiguous()
        theirs = copy[name].detach().cpu().to(ours.dtype).contiguous()
        same = ours.shape == theirs.shape and torch.equal(
            ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8)
        )
        _demand(same, f"the weight {name} of {component} is another one")


def _same_settings(component: str, original: ConfigMixin, copy: ConfigMixin) -> None:
    ours, theirs = ({k: _plain(v) for k, v in part.config.items() if k[0] != "_"} for part in (original, copy))
    changed = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    _demand(not changed, f"{component} has other settings: {sorted(changed)}")


def _plain(value: Any) -> Any:
    """As JSON brings it back: tuples as lists."""
    return json.loads(json.dumps(value, default=str))


def _draw(pipeline: DiffusionPipeline) -> np.ndarray:
    """Two images of two steps (one, if two do not divide the training steps, as ddim wants): [2, H, W, C]."""
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"batch_size": 2}
    if vae := pipeline.components.get("vae"):
        vae.enable_slicing()  # decodes one image at a time: large ones take gigabytes
    stock = (StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusionInpaintPipeline)
    kinds = {"text"} if isinstance(pipeline, stock) else set()
    if isinstance(pipeline, StableDiffusionInpaintPipeline):
        side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        options["image"], options["mask_image"] = torch.full((2, 3, side, side), 0.5), torch.ones(2, 1, side, side)
    if isinstance(pipeline, UNetPipeline):
        kinds = set(kinds_of(pipeline))
    if "class_label" in kinds:
        options["class_labels"] = [0, pipeline.config.num_classes - 1]
    if "low_res" in kinds:
        channels, side = pipeline.unet.config.in_channels - pipeline.space().channels, pipeline.config.low_res_side
        options["image"] = torch.linspace(0, 1, 2 * channels * side**2).reshape(2, channels, side, side)
    if kinds & {"text", "pooled_text"}:
        options["prompt"] = ["a picture", ""]
        options.pop("batch_size")  # a stock pipeline has no such argument
    steps = 1 if pipeline.scheduler.config.num_train_timesteps % 2 else 2
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    try:
        return pipeline(num_inference_steps=steps, generator=generator, output_type="np", **options).images
    finally:
        if vae:
            vae.disable_slicing()


def _demand(condition: bool, difference: str) -> None:
    if not condition:
        raise FinetuneError(
            f"the exported pipeline does not load as the model that was trained: {difference}. It is not kept; the "
            "checkpoint is. Check the disk, and the versions of diffusers and transformers."
        )


def _replace(target: Path, new: Path) -> None:
    """Put `new` in the place of `target`. Whoever looks sees the old one, for a moment none, or the new one."""
    old = target.with_name(f"{_OLD}{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _tidy(output_dir: Path) -> None:
    """Undo what an export that was killed left: put the old folder back if the new one never came, delete the rest."""
    for old in sorted(output_dir.glob(f"{_OLD}*")):
        if not (output_dir / _FOLDER).exists():
            old.rename(output_dir / _FOLDER)
    for stale in [*output_dir.glob(f"{_OLD}*"), *output_dir.glob(f"{_TEMPORARY}*")]:
        shutil.rmtree(stale)

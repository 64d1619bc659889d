"""Drawing images from a pipeline, and grids of them. Imports no torch until it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config_export import LORA_FILE, is_exported
from finetune.errors import ConfigError
from finetune.grids import grid
from finetune.pretrained import commit_of, resolve_source
from finetune.small_images import small_of, triples

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from finetune.batching import Batch
    from finetune.conditions import Inpaint
    from finetune.config import TrainConfig

FURTHER = ("respacing", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "guidance_rescale", "guidance_interval")
"""Settings of config_sample.Sampling that UNetPipeline alone takes."""

DEFAULT_IMAGES = 16  # of an unconditional or class-conditional pipeline
BATCH_PIXELS = 1 << 19  # drawn at a time by default: 16 images of 128 pixels, 2 of 512


def generate(
    pipeline: DiffusionPipeline,
    *,
    num_images: int,
    seed: int,
    prompts: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    images: Sequence[Image] | Tensor | None = None,
    masks: Tensor | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    rank: int = 0,
    processes: int = 1,
    **further: Any,
) -> list[Image]:
    """Draw num_images images from a UNetPipeline or a stock DDPM, DDIM, StableDiffusion or StableDiffusionXL pipeline.

    Image i takes all its noise from a CPU generator seeded with seed + i, so it does not depend on batch_size, on the
    other images or on the device, and torch's global random state is not touched. Prompts, class labels and images (the
    small ones of super-resolution: PIL, or [n, C, H, W] in [0, 1]; or, with masks [n, 1, H, W], those to be painted in)
    are repeated to fill num_images; without labels, a class-conditional pipeline draws each class in turn.
    num_inference_steps, guidance_scale: unset for the pipeline's own. further: those of FURTHER, for a UNetPipeline. Of
    several processes each draws, and gets, every so many of the batches. Raises ConfigError for what the pipeline
    cannot take.
    """
    import torch

    if num_images < 1:
        raise ConfigError(f"num_images must be at least 1, got {num_images}")
    wanted = wanted_conditions(pipeline, num_images, prompts=prompts, class_labels=class_labels, images=images)
    if masks is not None:
        wanted["mask_image"] = list(masks)
    options = _options(pipeline, num_inference_steps, guidance_scale, further)
    batch_size = batch_size or batch_for(pipeline)
    drawn: list[Image] = []
    for start in range(rank * batch_size, num_images, processes * batch_size):
        n = min(batch_size, num_images - start)
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(n)]
        given: dict[str, Any] = {name: values[start : start + n] for name, values in wanted.items()}
        drawn += pipeline(**(given or {"batch_size": n}), **options, generator=generators).images
    return drawn


def wanted_conditions(
    pipeline: DiffusionPipeline,
    num_images: int,
    *,
    prompts: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    images: Sequence[Image] | Tensor | None = None,
) -> dict[str, list]:
    """What the pipeline's call takes per image, repeated to num_images: prompt, class_labels and image, or nothing."""
    kind = conditioning_of(pipeline)
    kinds = set(kind.split("+"))
    if prompts and not kinds & {"text", "pooled_text"}:
        raise ConfigError(f"this pipeline takes no prompts (conditioning {kind}): leave them out")
    if class_labels and "class_label" not in kinds:
        raise ConfigError(f"this pipeline takes no class labels (conditioning {kind}): leave them out")
    if images is not None and not kinds & {"low_res", "inpaint"}:
        raise ConfigError(f"this pipeline takes no images (conditioning {kind}): leave them out")
    given: dict[str, list] = {}
    if "class_label" in kinds:
        given["class_labels"] = list(class_labels or range(pipeline.config.num_classes))
    if kinds & {"text", "pooled_text"}:
        given["prompt"] = list(prompts or ())
        if not prompts:
            raise ConfigError("this pipeline draws from text: give at least one prompt")
    if kinds & {"low_res", "inpaint"}:
        given["image"] = [] if images is None else list(images)
        if not given["image"]:
            raise ConfigError("this pipeline starts from images: give at least one")
    return {name: [values[i % len(values)] for i in range(num_images)] for name, values in given.items()}


def captions_of(pipeline: DiffusionPipeline, wanted: Mapping[str, list]) -> list[str] | None:
    """What to write under each image: its class name or number, its prompt, both, or nothing."""
    names = pipeline.config.class_names if "class_labels" in wanted else None
    labels = [[names[each] if names else str(each) for each in wanted.get("class_labels", ())]]
    lines = [each for each in (*labels, wanted.get("prompt", [])) if each]
    return [", ".join(parts) for parts in zip(*lines, strict=True)] if lines else None


def conditioning_of(pipeline: DiffusionPipeline) -> str:
    """none, or the conditions joined by "+". Raises ConfigError for a pipeline that this package cannot draw from."""
    name = type(pipeline).__name__
    if name == "UNetPipeline":
        return pipeline.config.conditioning
    kinds = {"DDPMPipeline": "none", "DDIMPipeline": "none", "StableDiffusionPipeline": "text"}
    kinds |= {"StableDiffusionXLPipeline": "pooled_text+text+size", "StableDiffusionInpaintPipeline": "text+inpaint"}
    if name not in kinds:
        raise ConfigError(f"cannot draw from a {name}: it must be a UNetPipeline or one of {', '.join(kinds)}")
    return kinds[name]


def batch_for(pipeline: DiffusionPipeline) -> int:
    """How many images to draw at a time: 1 to 16, fewer the larger they are."""
    side = pipeline.unet.config.sample_size
    vae = pipeline.components.get("vae")
    if vae is not None:
        side *= 2 ** (len(vae.config.block_out_channels) - 1)
    return max(1, min(16, BATCH_PIXELS // side**2))


def _options(
    pipeline: DiffusionPipeline, steps: int | None, guidance: float | None, further: dict[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call that do not differ between images."""
    name = type(pipeline).__name__
    if name == "UNetPipeline":
        return {"num_inference_steps": steps, "guidance_scale": guidance, **further}
    from finetune.conversion import check_stable_diffusion_guidance
    from finetune.schedulers import check_steps

    if unknown := [each for each, value in further.items() if value is not None]:
        raise ConfigError(
            f"a {name} takes no {', '.join(unknown)}: finetune.conversion.as_unet_pipeline makes it one that does"
        )
    options: dict[str, Any] = {}
    if steps is not None:
        check_steps(pipeline.scheduler, steps)
        options["num_inference_steps"] = steps
    if name in ("DDPMPipeline", "DDIMPipeline"):
        if guidance not in (None, 0, 1):
            raise ConfigError(f"there is no condition to guide with: guidance_scale must be 1, got {guidance}")
    elif guidance is not None:
        options["guidance_scale"] = guidance
    if name.startswith("StableDiffusion") and guidance is not None:
        check_stable_diffusion_guidance(guidance)
    if name == "DDIMPipeline":
        options["use_clipped_model_output"] = True  # as in UNetPipeline
    return options


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Training samples that a run's pictures begin from: enlarged by their own captions and classes or, with `inpaint`,
    painted anew in their middle."""

    batch: Batch
    inpaint: Inpaint | None

    @property
    def masks(self) -> Tensor | None:
        """[n, 1, H, W], 1 where is painted."""
        pixels = self.batch.pixel_values
        return self.inpaint.masks(len(pixels), pixels.shape[-2:]) if self.inpaint else None

    def given(self, pipeline: DiffusionPipeline) -> Tensor:
        """What the pictures are drawn from, as it is shown beside them: [n, C, h, w] in [-1, 1]."""
        return small_of(pipeline, self.batch) if self.inpaint is None else self.batch.pixel_values * (self.masks < 0.5)


def draw(
    pipeline: DiffusionPipeline, cfg: TrainConfig, shown: Shown | None = None, *, rank: int = 0, processes: int = 1
) -> dict[int, Image]:
    """The images that cfg.sample asks for, by their number from 0; of several processes, the share of one.

    Shares are whole batches: an image comes out bit for bit alike however many processes there are. pipeline: that of
    build_pipeline for this cfg. shown: what super-resolution and inpainting begin from.
    """
    ours = type(pipeline).__name__ == "UNetPipeline"  # which has the settings itself
    n, batch_size = number_of(cfg, shown), batch_for(pipeline)
    images = generate(
        pipeline,
        num_images=n,
        seed=cfg.sample.sample_seed,
        num_inference_steps=None if ours else cfg.sampling_steps,
        guidance_scale=None if ours else cfg.sample.guidance_scale,
        batch_size=batch_size,
        rank=rank,
        processes=processes,
        **_asked(pipeline, cfg, shown),
        **({"masks": shown.masks} if shown and shown.inpaint else {}),
    )
    return dict(zip((i for i in range(n) if i // batch_size % processes == rank), images, strict=True))


def number_of(cfg: TrainConfig, shown: Shown | None = None) -> int:
    """How many images `draw` draws."""
    return cfg.sample.num_images if shown is None else len(shown.batch)


def _asked(pipeline: DiffusionPipeline, cfg: TrainConfig, shown: Shown | None) -> dict[str, Any]:
    """The conditions of a run's pictures, as `generate` takes them."""
    if shown is None:
        return {"prompts": cfg.sample.prompts, "class_labels": cfg.sample.class_labels}
    batch = shown.batch
    labels = None if batch.class_labels is None else batch.class_labels.tolist()
    images = batch.pixel_values if shown.inpaint else small_of(pipeline, batch)
    return {"prompts": batch.captions, "class_labels": labels, "images": (images / 2 + 0.5).clamp(0, 1)}


def write_grid(
    pipeline: DiffusionPipeline, cfg: TrainConfig, path: Path, images: Sequence[Image], shown: Shown | None = None
) -> None:
    """Write all images of `draw` to `path` as one labelled grid.

    With `shown`, each is what it began from, drawn image and truth, side by side.
    """
    labels = captions_of(pipeline, wanted_conditions(pipeline, len(images), **_asked(pipeline, cfg, shown)))
    columns = columns_for(labels)
    if shown is not None:
        given, columns = shown.given(pipeline), 6
        images, first = triples(given, images, shown.batch.pixel_values), "masked" if shown.inpaint else "small"
        labels = [text for label in labels or [""] * len(given) for text in (first, label or "drawn", "truth")]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(images, labels, columns=columns).save(path.with_suffix(".tmp"), format="PNG")
    path.with_suffix(".tmp").replace(path)  # a picture that is there is whole


def columns_for(labels: Sequence[str] | None) -> int | None:
    """One column per prompt or class where that fits a screen."""
    distinct = len(set(labels or ()))
    return distinct if 2 <= distinct <= 12 else None


def load_pipeline(source: str, *, to_draw: bool = True) -> DiffusionPipeline:
    """The pipeline of a finished run (its output_dir), of a pipeline folder or of a Hub repository.

    to_draw: a pipeline for inpainting is refused. Safetensors only, and no code from the repository. Raises ConfigError
    if there is none that this package can use.
    """
    source = pipeline_source(source)
    at = {} if Path(source).is_dir() else {"revision": commit_of(source, setting="finetune sample")}
    from diffusers import (
        DDIMPipeline,
        DDPMPipeline,
        DiffusionPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from safetensors import SafetensorError

    from finetune.pipelines import UNetPipeline

    if Path(source, LORA_FILE).is_file() and not Path(source, "model_index.json").is_file():
        from finetune.lora_pipeline import lora_pipeline

        pipeline = lora_pipeline(Path(source))
        if to_draw and type(pipeline) is StableDiffusionInpaintPipeline:
            raise ConfigError(f"{source} is for inpainting: `finetune merge` makes a pipeline of it, for diffusers")
        return pipeline
    stock = (DDPMPipeline, DDIMPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline)
    stock += () if to_draw else (StableDiffusionInpaintPipeline,)
    classes = {cls.__name__: cls for cls in (UNetPipeline, *stock)}
    try:
        index = DiffusionPipeline.load_config(source, **at)
    except (OSError, ValueError) as error:
        advice = "" if Path(source).is_dir() else " Check the name, your login (`hf auth login`) and the network."
        raise ConfigError(f"no pipeline (model_index.json) could be read from {source}: {error}{advice}") from error
    name = str(index.get("_class_name"))
    if name not in classes:
        raise ConfigError(f"{source} holds a {name}: only {', '.join(classes)} can be drawn from")
    settings = {"class_names", "guidance_interval"}  # the lists that name no library
    libraries = {value[0] for key, value in index.items() if isinstance(value, list) and not key.startswith("_")
                 and key not in settings}  # fmt: skip
    if foreign := libraries - {"diffusers", "transformers", "stable_diffusion", None}:
        raise ConfigError(f"{source} wants classes of {', '.join(map(str, foreign))}, which are not loaded: no code is "
                          "taken from a model repository")  # fmt: skip
    try:
        at |= {"add_watermarker": False} if name == "StableDiffusionXLPipeline" else {}
        return classes[name].from_pretrained(source, use_safetensors=True, **at)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"the {name} of {source} could not be loaded: {' '.join(str(error).split())}") from error


def pipeline_source(source: str) -> str:
    """The folder or Hub id that holds model_index.json, or the folder of a LoRA."""
    source = resolve_source(source, setting="finetune sample")
    folder = Path(source)
    if folder.is_dir() and not is_exported(folder):
        if not is_exported(folder / "pipeline"):
            raise ConfigError(
                f"{source} holds no pipeline: looked for model_index.json and pipeline/model_index.json, of a LoRA for "
                f"{LORA_FILE}; give the output_dir of a finished run or the folder of a pipeline"
            )
        return str(folder / "pipeline")
    return source

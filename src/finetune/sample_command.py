"""The command `finetune sample`. Imports no torch until its arguments are known to be right."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config_sample import ALL_SAMPLERS
from finetune.config_yaml import plain_mapping
from finetune.errors import ConfigError
from finetune.grids import grid
from finetune.sample import (
    DEFAULT_IMAGES,
    FURTHER,
    captions_of,
    columns_for,
    conditioning_of,
    generate,
    load_pipeline,
    pipeline_source,
    wanted_conditions,
)
from finetune.small_images import image_files, read_images

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def _run_defaults(source: str, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Steps and guidance of the run that a stock pipeline belongs to, which has no place for them itself."""
    for path in (Path(source) / "config.yaml", Path(source).parent / "config.yaml"):
        if path.is_file():
            section = plain_mapping(path.read_text("utf-8"), str(path)).get("sample") or {}
            given = {k: section.get(k) for k in ("num_inference_steps", "guidance_scale")}
            return {"num_inference_steps": pipeline.scheduler.config.num_train_timesteps} | {
                name: value for name, value in given.items() if value is not None
            }
    return {}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "finetune sample", description="Draw images from a finished run, a pipeline folder or a Hub repository."
    )
    parser.add_argument("source", metavar="RUN_OR_FOLDER_OR_REPO", help="output_dir of a run, pipeline folder, Hub id")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder: 0000.png, ... and grid.png")
    parser.add_argument("--prompt", nargs="+", action="extend", default=[], help="one or several prompts")
    parser.add_argument("--class_label", nargs="+", action="extend", default=[], help="class numbers or names")
    parser.add_argument("--image", nargs="+", action="extend", default=[], type=Path,
                        metavar="FILE_OR_DIR", help="small images to enlarge (super-resolution)")  # fmt: skip
    parser.add_argument("--num_images", type=int, help=f"default: one per prompt, label or image, or {DEFAULT_IMAGES}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the next take the next seeds")
    parser.add_argument("--steps", type=int, help="sampling steps; default: the pipeline's, or the run's")
    parser.add_argument("--guidance_scale", type=float, help="1 is none; default: the pipeline's, or the run's")
    parser.add_argument("--scheduler", choices=ALL_SAMPLERS, help="default: the pipeline's")
    parser.add_argument("--respacing", help='timesteps of ddpm and ddim, not --steps: "250", "ddim50", "10,20,30"')
    parser.add_argument("--eta", type=float, help="noise of ddim: 0 none, 1 as ddpm; default: the pipeline's")
    churn = "of edm_euler and edm_heun; default: the pipeline's"
    parser.add_argument("--s_churn", type=float, help=f"noise added before each step {churn}")
    parser.add_argument("--s_tmin", type=float, help=f"smallest sigma at which it is added {churn}")
    parser.add_argument("--s_tmax", type=float, help=f"largest sigma at which it is added {churn}")
    parser.add_argument("--s_noise", type=float, help=f"its standard deviation {churn}")
    parser.add_argument("--guidance_rescale", type=float, help="0 to 1; default: the pipeline's (Lin et al. 2023)")
    parser.add_argument("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="guide at these sigma / alpha only (Kynkäänniemi et al. 2024)")  # fmt: skip
    parser.add_argument("--autoguidance", metavar="PATH", help="guide by this weaker model: a run, a pipeline or UNet "
                        "folder, or a checkpoint step-... of a run (Karras et al. 2024)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, help="images drawn at a time; changes no image")
    args = parser.parse_args(argv)
    for name in ("num_images", "steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.seed < 0:
        raise ConfigError(f"--seed must be at least 0, got {args.seed}")
    if args.guidance_scale is not None and not (args.guidance_scale >= 0 and math.isfinite(args.guidance_scale)):
        raise ConfigError(f"--guidance_scale must be at least 0, got {args.guidance_scale}")
    args.image = image_files(args.image)
    given = max(len(args.prompt), len(args.class_label), len(args.image))
    if args.num_images is not None and args.num_images < given:
        raise ConfigError(f"--num_images {args.num_images} is less than the {given} prompts, labels or images: raise "
                          "it")  # fmt: skip
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"--out {args.out} is a file or not empty: name a new folder")
    return args


def _labels(pipeline: DiffusionPipeline, words: list[str]) -> list[int] | None:
    """Class labels from numbers or class names."""
    if not words:
        return None
    if "class_label" not in conditioning_of(pipeline).split("+"):
        raise ConfigError(f"this pipeline takes no class labels (conditioning {conditioning_of(pipeline)})")
    names = list(pipeline.config.class_names or ())
    if unknown := [word for word in words if word not in names and not word.isdecimal()]:
        known = f" or one of {', '.join(names)}" if names else ""
        raise ConfigError(f"--class_label {unknown[0]} is not a number{known}")
    return [names.index(word) if word in names else int(word) for word in words]


def _changed(pipeline: DiffusionPipeline, args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline as a UNetPipeline, with another sampler or a guide if they are asked for."""
    from finetune.autoguidance import load_guide
    from finetune.conversion import as_unet_pipeline, set_sampler

    pipeline = as_unet_pipeline(pipeline)
    if args.scheduler:
        set_sampler(pipeline, args.scheduler)
    if args.autoguidance:
        pipeline.register_modules(guide=load_guide(args.autoguidance, pipeline.unet, pipeline.scheduler))
        if (pipeline.config.guidance_scale if args.guidance_scale is None else args.guidance_scale) == 1:
            raise ConfigError("--autoguidance needs a --guidance_scale other than 1, which is no guidance: raise it")
    return pipeline


def sample_main(argv: list[str] | None = None) -> None:
    """The command `finetune sample`. Raises ConfigError for arguments that cannot work, most before torch is loaded."""
    args = _arguments(argv)
    source = pipeline_source(args.source)

    import torch

    pipeline = load_pipeline(source)
    defaults = {} if type(pipeline).__name__ == "UNetPipeline" else _run_defaults(source, pipeline)
    further = {name: value for name in FURTHER if (value := vars(args)[name]) is not None}
    if args.scheduler or args.autoguidance or further:
        pipeline = _changed(pipeline, args)
    if args.respacing:
        defaults.pop("num_inference_steps", None)
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    pipeline.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    given: dict[str, Any] = {"prompts": args.prompt, "class_labels": _labels(pipeline, args.class_label)}
    given["images"] = read_images(args.image, pipeline) if args.image else None
    n = args.num_images or max(len(args.prompt), len(args.class_label), len(args.image)) or DEFAULT_IMAGES
    images = generate(
        pipeline,
        num_images=n,
        seed=args.seed,
        num_inference_steps=defaults.get("num_inference_steps") if args.steps is None else args.steps,
        guidance_scale=defaults.get("guidance_scale") if args.guidance_scale is None else args.guidance_scale,
        batch_size=args.batch_size,
        **given,
        **further,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(args.out / f"{i:04d}.png")
    labels = captions_of(pipeline, wanted_conditions(pipeline, n, **given))
    grid(images, labels, columns=columns_for(labels)).save(args.out / "grid.png")
    print(f"{n} image{'s' * (n > 1)} and grid.png in {args.out}")

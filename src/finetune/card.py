"""The model card: front matter, pictures, a snippet that runs, data, numbers, and all that is needed to repeat the run.

Captions, prompts and names come from anywhere. In prose they go through `prose`, in code through repr() or YAML, and
every block of code has a fence longer than any run of backticks inside: nothing can break out of its place.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from finetune.config import TrainConfig
from finetune.config_choices import conditions
from finetune.config_io import batch_plan, dump
from finetune.provenance import is_local, published_config, published_run

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$:@^=])")
_MOST_NAMES = 20


@dataclass(frozen=True, kw_only=True)
class LoraWords:
    """What the card of a LoRA says where that of a pipeline speaks of the pipeline; Markdown."""

    sentence: str
    usage: str


def model_card(
    cfg: TrainConfig,
    run: Mapping[str, Any],
    *,
    pipeline: str,
    samples: bool,
    metrics: Sequence[Mapping[str, Any]],
    repo_id: str | None = None,
    lora: LoraWords | None = None,
) -> str:
    """README.md of an exported pipeline or LoRA. Holds no local path, host or user name.

    run: the content of run.json; pipeline: the name of the pipeline's class; samples: whether samples.png lies beside;
    metrics: the lines of metrics.jsonl (with any, loss.png lies beside); repo_id: where it will be published; lora: of
    a LoRA, what is said of it instead.
    """
    public, run = published_config(cfg), published_run(dict(run), cfg)
    name = repo_id or public.hub.hub_model_id or public.output_dir
    parts = [
        _front_matter(cfg, lora=lora is not None),
        f"# {prose(name.split('/')[-1])}",
        lora.sentence if lora else _sentence(public, pipeline, metrics),
        _samples(public) if samples else "",
        "## Use\n\n" + (lora.usage if lora else _usage(public, run, pipeline, name)),
        "## Data\n\n" + _table(_data_rows(cfg, run)),
        "## Training\n\n" + _table(_training_rows(public, run)),
        _results(metrics) if metrics else "",
        "## Reproduce\n\n" + _reproduce(public, run),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def prose(text: object) -> str:
    """`text` as one line that Markdown shows as it is: no HTML, no markup, no link, no control character."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(line.split()), quote=False))


def code(text: object) -> str:
    """`text` as a span of code, without what could end it or a cell of a table."""
    return f"`{''.join(c for c in str(text) if c.isprintable() and c not in '`|')}`"


def fenced(text: str, language: str) -> str:
    """A block of code that `text` cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold a loss; empty if there is no such file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line.get("loss") is not None]


def draw_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the loss, and the learning rate below it, over the optimizer steps to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: its state belongs to the user's notebook
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [line["step"] for line in metrics]
    marker = "o" if len(steps) == 1 else None
    upper.plot(steps, [line["loss"] for line in metrics], linewidth=1, marker=marker)
    upper.set(ylabel="loss", yscale="log" if all(line["loss"] > 0 for line in metrics) else "linear")
    lower.plot(steps, [line.get("lr") for line in metrics], linewidth=1, marker=marker, color="tab:gray")
    lower.set(ylabel="learning rate", xlabel="optimizer step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3, which="both" if axes is upper else "major")
    figure.savefig(path, dpi=120, metadata={"Software": None})


# -- the parts -----------------------------------------------------------------------------------------------------


def _front_matter(cfg: TrainConfig, *, lora: bool) -> str:
    """YAML that the Hub accepts: it refuses the whole push for a local path in base_model or an unknown licence."""
    kinds = conditions(cfg.conditioning).keys()
    task = "unconditional-image-generation"  # the Hub has no task "by class"
    task = "text-to-image" if kinds & {"text", "pooled_text"} else "image-to-image" if "low_res" in kinds else task
    by_class = ["class-conditional"] if _by_class(cfg) else []
    values: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": task,
        "tags": ["diffusers", "finetune-unet", task, *by_class, *["lora"] * lora],
    }
    dataset, base = cfg.data.dataset_name, _base(cfg)
    if dataset and not is_local(dataset):
        values["datasets"] = [dataset]
    if base and not is_local(base):
        values["base_model"] = base
        values |= {"base_model_relation": "adapter"} if lora else {}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _sentence(cfg: TrainConfig, pipeline: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    side, kinds = cfg.data.resolution, conditions(cfg.conditioning)
    images = f"{side}×{side} {'images' if cfg.data.channels == 3 else 'grey images'}"
    words = {"class_label": "by class", "low_res": "from small images"}
    names = dict.fromkeys(words.get(kind, "from text") for kind in kinds if kind != "size")
    condition = " and ".join(names) or "without a condition"
    what = {"unet2d": "UNet2DModel", "unet2d_condition": "UNet2DConditionModel", "pretrained": "UNet"}[cfg.model.kind]
    space = f"in the latent space of {code(cfg.space.vae)}" if cfg.space.kind == "latent" else "in pixel space"
    start = f"fine-tuned from {code(base)}" if (base := _base(cfg)) else "trained from scratch"
    length = f" for {metrics[-1]['step']:,} optimizer steps" if metrics else ""
    return (
        f"A diffusion model that draws {images} {condition}: a `{what}` {space}, {start}{length} and packed as a "
        f"diffusers `{pipeline}`."
    )


def _samples(cfg: TrainConfig) -> str:
    sample = cfg.sample
    how = f"Drawn with {cfg.sampler}, {cfg.sampling_steps} steps, guidance scale {sample.guidance_scale:g}"
    if "low_res" in conditions(cfg.conditioning):
        how += "; side by side: small image, drawn image, training image"
    prompts = "; ".join(f"“{prose(prompt)}”" for prompt in sample.prompts)
    return f"![samples](samples.png)\n\n{how}" + (f"; prompts, row by row: {prompts}" if prompts else "") + "."


def _usage(cfg: TrainConfig, run: Mapping[str, Any], pipeline: str, name: str) -> str:
    ours = pipeline == "UNetPipeline"
    place = name if "/" in name else "."
    parts, given = conditions(cfg.conditioning), []
    several = len(parts.keys() - {"size"}) > 1
    if parts.keys() & {"text", "pooled_text"}:
        given.append(repr(cfg.sample.prompts[0]) if cfg.sample.prompts else "'a prompt'")
    if _by_class(cfg):
        classes = parts["class_label"].num_classes or len(run.get("data", {}).get("classes", ())) or 1
        given.append("class_labels=0" if several else f"class_labels={list(range(min(4, classes)))}")
    if "low_res" in parts:
        given.append('image=Image.open("small.png")')
    arguments = ", ".join(given) or "batch_size=4"
    if not ours:  # ours keeps these two as its defaults
        arguments += f", num_inference_steps={cfg.sampling_steps}"
        if pipeline.startswith("StableDiffusion"):
            arguments += f", guidance_scale={cfg.sample.guidance_scale:g}"
        if pipeline == "DDIMPipeline":
            arguments += ", use_clipped_model_output=True"
    snippet = "\n".join(
        [
            "import torch",
            *["from PIL import Image"] * ("low_res" in parts),
            f"from {'finetune.pipelines' if ours else 'diffusers'} import {pipeline}",
            "",
            f"pipeline = {pipeline}.from_pretrained({place!r})"
            + ("" if place != "." else "  # this folder, or its name on the Hub"),
            "generator = torch.Generator().manual_seed(0)",
            f"images = pipeline({arguments}, generator=generator).images",
            'images[0].save("image.png")',
        ]
    )
    if not ours:
        return fenced(snippet, "python")
    install = f"# in a checkout of finetune {run.get('finetune', '')}, which has the pipeline\npip install -e ."
    return fenced(install, "bash") + "\n\n" + fenced(snippet, "python")


def _data_rows(cfg: TrainConfig, run: Mapping[str, Any]) -> dict[str, str]:
    facts, name = run.get("data", {}), cfg.data.dataset_name
    rows = {}
    if name and not is_local(name):
        rows["source"] = f"[{name}](https://huggingface.co/datasets/{name}), split {prose(cfg.data.split)}"
    else:
        rows["source"] = prose(_source(cfg))
    if "rows" in facts:
        held_out = facts.get("held_out", 0)
        rows["images"] = f"{facts['rows'] - held_out:,} used, {facts.get('left_out', 0):,} left out"
        rows["images"] += f", {held_out:,} held out for validation" if held_out else ""
    if subsets := facts.get("subsets"):
        shown = ", ".join(f"{prose(one['name'])} ({one['images']:,} × {one['repeats']:,})" for one in subsets)
        rows["repeats"] = f"{shown}: each image counts once for each of its repeats"
    for side in [side for side in ("width", "height") if side in facts]:
        sizes = facts[side]
        several = f"{sizes['min']} to {sizes['max']}, median {sizes['median']}"
        rows[side] = f"{sizes['min'] if sizes['min'] == sizes['max'] else several} pixels"
    if facts.get("upscaled"):
        rows["upscaled"] = f"{facts['upscaled']:,}, as they are smaller than what is trained on"
    if classes := facts.get("classes"):
        shown = ", ".join(f"{prose(name)} ({count:,})" for name, count in list(classes.items())[:_MOST_NAMES])
        rows["classes"] = f"{len(classes)}: {shown}" + (", …" if len(classes) > _MOST_NAMES else "")
    if captions := facts.get("captions"):
        rows["captions"] = f"{captions['count']:,}, {captions['different']:,} different, {captions['empty']:,} empty"
        if captions.get("truncated"):
            tokens = captions["tokens"]
            cut = f"{captions['truncated']:,} cut to {tokens['limit']} of up to {tokens['longest']} tokens"
            rows["captions"] += f", {cut}"
    if cfg.captions.trigger_word:
        rows["trigger word"] = f"{code(cfg.captions.trigger_word)}, in front of every caption"
    centred = cfg.data.center_crop or cfg.data.preparation == "iddpm"
    crop, flip = "centre crop" if centred else "random crop", ", random flip" * cfg.data.random_flip
    about = f"{len(facts['buckets']['images'])} shapes of about " if "buckets" in facts else ""
    rows["prepared as"] = f"{about}{cfg.data.resolution}×{cfg.data.resolution}, {crop}{flip}"
    if "data_fingerprint" in run:
        rows["fingerprint"] = code(run["data_fingerprint"])
    return rows


def _source(cfg: TrainConfig) -> str:
    """What the card calls data that is not on the Hub."""
    public = published_config(cfg).data
    name = public.train_data_dir or public.dataset_config or public.dataset_name
    return f"{name}, local" if name else "a data set passed from Python"


def _training_rows(cfg: TrainConfig, run: Mapping[str, Any]) -> dict[str, str]:
    objective, optimizer, environment = cfg.objective, cfg.optimizer, run.get("environment", {})
    if objective.kind == "custom":
        described = f"{objective.target}, code that is not part of this model"
    elif objective.kind == "ddpm":
        levels = f"{objective.beta_schedule} schedule, {objective.num_train_timesteps} levels"
        described = f"ddpm, {objective.prediction_type}, {levels}"
    else:
        described = f"{objective.kind}, {objective.prediction_type}, levels {objective.levels.kind}"
    last = "average of the optimizer" if optimizer.kind == "schedule_free_adamw" else "of the last step"
    rows = {
        "objective": described,
        "optimizer": f"{optimizer.title}, learning rate {optimizer.learning_rate:g}, {optimizer.details}",
        "schedule": f"{optimizer.lr_scheduler}, {optimizer.lr_warmup_steps} steps of warm-up",
        "weights": f"average with {cfg.ema.averages[0]}" if cfg.ema.use_ema else last,
        "precision": cfg.train.mixed_precision if cfg.train.mixed_precision in ("fp16", "bf16") else "float32",
        "seed": str(cfg.seed),
    }
    if run.get("commits"):
        named = (f"{code(name)} {code(commit)}" for name, commit in run["commits"].items())
        rows["loaded from the Hub"] = ", ".join(named)
    if environment:
        rows["global batch"] = f"{batch_plan(cfg, environment['num_processes'])[0]} images"
        rows["device"] = f"{environment['num_processes']} × {prose(environment['device'])}"
    return {name: prose(value) if name == "objective" else value for name, value in rows.items()}


def _results(metrics: Sequence[Mapping[str, Any]]) -> str:
    last = metrics[-1]
    rows = {"optimizer steps": f"{last['step']:,}", "loss (last)": f"{last['loss']:.5g}"}
    if "samples_seen" in last:
        rows["images seen"] = f"{last['samples_seen']:,}"
    if speeds := [line["images_per_second"] for line in metrics if "images_per_second" in line]:
        rows["images per second (median)"] = f"{median(speeds):.4g}"
    if "peak_memory_mb" in last:
        rows["peak memory"] = f"{last['peak_memory_mb']:,.0f} MB"
    if last.get("nonfinite_steps"):
        rows["steps skipped as non-finite"] = str(last["nonfinite_steps"])
    return "## Results\n\n![loss](loss.png)\n\n" + _table(rows)


def _reproduce(cfg: TrainConfig, run: Mapping[str, Any]) -> str:
    versions = run.get("versions", {})
    command = fenced("accelerate launch train_unet.py --config config.yaml", "bash")
    text = f"{command}\n\nLocal paths in config.yaml are shortened to their last part: set them to yours."
    if versions:
        text += " Made with " + ", ".join(f"{prose(name)} {code(version)}" for name, version in versions.items()) + "."
    if "command" in run:
        text += "\n\nThe command as it was given:\n\n" + fenced(" ".join(str(run["command"]).split()), "bash")
    return f"{text}\n\nconfig.yaml:\n\n{fenced(_visible_yaml(cfg), 'yaml')}"


def _visible_yaml(cfg: TrainConfig) -> str:
    """The configuration as YAML in which no character hides, such as one that turns the direction of writing."""
    text = dump(cfg)
    if all(c.isprintable() for c in text.replace("\n", "")):
        return text
    return yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False, allow_unicode=False)


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(chain(["| | |", "|---|---|"], (f"| {name} | {value} |" for name, value in rows.items())))


def _base(cfg: TrainConfig) -> str | None:
    return cfg.model.pretrained_model_name_or_path if cfg.model.kind == "pretrained" else None


def _by_class(cfg: TrainConfig) -> bool:
    return "class_label" in conditions(cfg.conditioning)

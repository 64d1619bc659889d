"""What follows from the name of a pretrained pipeline: its space, its conditioning, and the noise of the objective.

Read off model_index.json and the scheduler's configuration. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from finetune.config import TrainConfig
from finetune.config_choices import (
    SDXL,
    AutoConditioning,
    ClassLabel,
    Conditioning,
    InpaintCondition,
    LabelCondition,
    LatentSpace,
    LowRes,
    LowResCondition,
    PixelSpace,
    PooledText,
    SequenceCondition,
    Several,
    SizeCondition,
    Space,
    TextCondition,
    TextSequence,
    Unconditional,
    conditions,
)
from finetune.config_objective import PLAIN, Objective
from finetune.errors import ConfigError
from finetune.pretrained import commit_of, resolve_source
from finetune.single_file import is_single_file, unpacked

if TYPE_CHECKING:
    from finetune.data import TrainData

log = logging.getLogger(__name__)

SETTING = "model.pretrained_model_name_or_path"
FAMILY = {
    **dict.fromkeys(("DDPM", "DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete"), "ddpm"),
    **dict.fromkeys(("HeunDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"), "ddpm"),
    **dict.fromkeys(("DEISMultistep", "KDPM2Discrete", "KDPM2AncestralDiscrete"), "ddpm"),
    "EDMEuler": "edm",
    "FlowMatchEulerDiscrete": "flow",
}
"""diffusers' scheduler (without that word) -> the objective.kind whose noise it removes."""
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
OTHERWISE = "model.change_objective true trains another objective from these weights, which takes long to learn"
MOST_PROMPTS = 4  # of the data, where none are given: as many as num_validation_images of diffusers' scripts


def resolve(cfg: TrainConfig) -> TrainConfig:
    """`cfg` with nothing left open: what is not written of space, conditioning and noise is the pretrained pipeline's.

    Of a folder that holds only a UNet nothing is known: then it is as for a new model. A single file is unpacked into
    output_dir: let one process of a machine go first. Raises ConfigError for a pipeline of another kind, and for a
    prediction or noise that is written, is not the pipeline's, and is not asked for by model.change_objective.
    """
    if cfg.model.kind != "pretrained":
        return cfg
    if is_single_file(cfg.model):
        cfg = unpacked(cfg)
    index = _read(cfg, "model_index.json")
    try:
        if index is None:
            return _of_lone_unet(cfg)
        known = _Pipeline(cfg, index)
        conditioning = known.conditioning() if cfg.conditioning.kind == "auto" else cfg.conditioning
        space = known.space() if cfg.space.kind == "auto" else cfg.space
        return replace(cfg, space=space, conditioning=conditioning, objective=_objective(cfg))
    except ValidationError as error:
        reasons = [str(one.get("ctx", {}).get("error", one["msg"])) for one in error.errors()]
        decided = any(reason.startswith(("space", "conditioning", "objective", "sample")) for reason in reasons)
        note = f"\n({SETTING} {cfg.model.pretrained_model_name_or_path} says what is not written)" if decided else ""
        raise ConfigError("\n".join(reasons) + note) from None


def with_prompts(cfg: TrainConfig, data: TrainData) -> TrainConfig:
    """`cfg` with the first captions of the data as its prompts, if it samples from text and names none."""
    from finetune.batching import first_batch

    parts = conditions(cfg.conditioning)
    if cfg.sample.prompts or not {"text", "pooled_text"} & parts.keys() or {"low_res", "inpaint"} & parts.keys():
        return cfg
    captions = first_batch(data, min(MOST_PROMPTS, cfg.sample.num_images)).captions
    return replace(cfg, sample=replace(cfg.sample, prompts=tuple(dict.fromkeys(captions))))


def _of_lone_unet(cfg: TrainConfig) -> TrainConfig:
    auto = cfg.conditioning.kind == "auto"
    if auto and cfg.conditioning != AutoConditioning():
        raise ConfigError(
            f"{SETTING}: {cfg.model.pretrained_model_name_or_path} is no pipeline (it has no model_index.json) that "
            "would say what it is conditioned on: choose conditioning.kind"
        )
    objective = cfg.objective
    if objective.kind == "ddpm" and objective.unset:
        log.warning(
            "%s is no pipeline, so that nothing says with which noise and prediction its UNet was trained: taken is %s",
            cfg.model.pretrained_model_name_or_path,
            ", ".join(f"{name} {PLAIN[name]}" for name in objective.unset),
        )
        objective = objective.filled()
    space = PixelSpace() if cfg.space.kind == "auto" else cfg.space
    return replace(cfg, space=space, conditioning=Unconditional() if auto else cfg.conditioning, objective=objective)


class _Pipeline:
    """A pipeline by its model_index.json."""

    def __init__(self, cfg: TrainConfig, index: Mapping[str, Any]) -> None:
        self.cfg, self.model, self.index = cfg, cfg.model, index
        self.name = self.model.pretrained_model_name_or_path
        self.kind = str(index.get("_class_name"))
        kinds = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionInpaintPipeline")
        kinds += ("DDPMPipeline", "DDIMPipeline", "UNetPipeline")
        if self.kind not in kinds:
            raise ConfigError(
                f"{SETTING}: {self.name} is a {self.kind}: what it is trained with is known of {', '.join(kinds)} "
                "only. Name the folder of its UNet alone, with model.subfolder null, and write space, conditioning and "
                "objective"
            )

    def space(self) -> Space:
        """Latents of its VAE, or pixels if it has none."""
        if not self._class_of("vae"):
            return PixelSpace()
        return LatentSpace(kind="latent", vae=self.name, subfolder="vae", **self._at)

    def conditioning(self) -> Conditioning:
        """The conditions that it samples by."""
        auto, ours = self.cfg.conditioning, self.kind == "UNetPipeline"
        kinds = {"StableDiffusionPipeline": "text", "StableDiffusionXLPipeline": "pooled_text+text+size"}
        kinds["StableDiffusionInpaintPipeline"] = "text+inpaint"
        joined = self.index.get("conditioning", "none") if ours else kinds.get(self.kind, "none")
        parts = [] if joined == "none" else joined.split("+")
        if auto.inpaint and self.kind not in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
            raise ConfigError(f"conditioning.inpaint: only a StableDiffusionPipeline can be made one, {self.name} is a "
                              f"{self.kind}: remove it")  # fmt: skip
        parts += ["inpaint"] if auto.inpaint and "inpaint" not in parts else []
        written = {name: getattr(auto, name) for name in ("clip_skip", "chunks")}
        for name in (name for name, value in written.items() if value is not None and "text" not in parts):
            raise ConfigError(f"conditioning.{name}: {self.name} reads no token sequence (its conditioning is "
                              f"{joined}): remove it")  # fmt: skip
        known = {"clip_skip": self.index.get("clip_skip"), "chunks": self.index.get("chunks", 1)}
        reads = known | {name: value for name, value in written.items() if value is not None}
        if auto.condition_dropout is not None and not parts:
            raise ConfigError(f"conditioning.condition_dropout: {self.name} has no condition to drop: remove it")
        dropout = {} if auto.condition_dropout is None else {"condition_dropout": auto.condition_dropout}
        if "text" in parts and self._class_of("text_encoder_2") == "CLIPTextModelWithProjection":
            if not self._class_of("text_encoder"):
                raise ConfigError(f"{SETTING}: {self.name} lacks text_encoder, as the refiner of XL does: use the base")
            zeros = self._zero("text", stock=self.index.get("force_zeros_for_empty_prompt", True))
            null = "zero" if zeros else "empty_prompt"
            return SDXL(kind="sdxl", pipeline=self.name, null=null, **reads, **dropout, **self._at)
        single = {"class_label": ClassLabel, "pooled_text": PooledText, "text": TextSequence, "low_res": LowRes}
        several = {"class_label": LabelCondition, "pooled_text": TextCondition, "text": SequenceCondition}
        several |= {"low_res": LowResCondition, "size": SizeCondition, "inpaint": InpaintCondition}
        made = {}
        for part in parts:
            undropped = ("low_res", "size", "inpaint")
            arguments = self._arguments(part, reads) | (dropout if part not in undropped else {})
            if len(parts) == 1 and part in single:
                return single[part](kind=part, **arguments)
            made[part] = several[part](**arguments)
        return Several(kind="several", **made) if made else Unconditional()

    def _arguments(self, part: str, reads: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of one condition that the pipeline decides."""
        if part == "size":
            return {}
        if part == "inpaint":
            return vars(self.cfg.conditioning.inpaint or InpaintCondition())
        if part == "low_res":
            factor, rest = divmod(self.cfg.data.resolution, side := self.index["low_res_side"])
            if rest or factor < 2:
                raise ConfigError(
                    f"data.resolution must be a multiple of the small image's side, {side}, of {self.name}: got "
                    f"{self.cfg.data.resolution}"
                )
            return {"factor": factor}
        if part == "class_label":
            return {"num_classes": self.index["num_classes"], "null": "zero" if self._zero(part) else "index"}
        second = "_2" if part == "pooled_text" and self._class_of("text_encoder_2") else ""
        return {
            "text_encoder": self.name,
            "tokenizer": self.name,
            "text_encoder_subfolder": f"text_encoder{second}",
            "tokenizer_subfolder": f"tokenizer{second}",
            "null": "zero" if self._zero(part) else "empty_prompt",
            **(reads if part == "text" else {}),
            **self._at,
        }

    def _zero(self, part: str, stock: bool = False) -> bool:
        """Whether zeros stand for the absence of a condition. stock: whether they do in diffusers' own pipeline."""
        return part in self.index["zero_nulls"].split("+") if self.kind == "UNetPipeline" else stock

    def _class_of(self, component: str) -> str | None:
        return (self.index.get(component) or (None, None))[1]

    @property
    def _at(self) -> dict[str, str | None]:
        return {"revision": self.model.revision, "variant": self.model.variant}


def _objective(cfg: TrainConfig) -> Objective:
    """cfg's objective, with the prediction and the noise of the pipeline's scheduler for what is unset."""
    objective, name = cfg.objective, cfg.model.pretrained_model_name_or_path
    scheduler = _read(cfg, "scheduler/scheduler_config.json")
    if objective.kind == "custom":
        return objective
    if scheduler is None:
        raise ConfigError(f"{SETTING}: {name} has no scheduler/scheduler_config.json, which says what it was trained "
                          "with: the pipeline is incomplete")  # fmt: skip
    kind = FAMILY.get(str(scheduler.get("_class_name")).removesuffix("Scheduler"))
    noise = {one: scheduler.get(one, plain) for one, plain in PLAIN.items()}
    if kind is None or (kind == "ddpm" and not _is_known(scheduler)):
        raise ConfigError(
            f"{SETTING}: the noise of the scheduler of {name} ({scheduler.get('_class_name')}, beta_schedule "
            f"{scheduler.get('beta_schedule')}) is not known here: name its UNet's folder alone, and write objective"
        )
    if objective.kind != kind:
        if not cfg.model.change_objective:
            raise ConfigError(f"objective.kind is {objective.kind}, but {name} was trained with {kind}: write {kind}. "
                              + OTHERWISE)  # fmt: skip
        return objective.filled() if objective.kind == "ddpm" else objective
    if kind != "ddpm":
        noise = {"sigma_data": scheduler["sigma_data"]} if kind == "edm" else {}
    elif noise["beta_schedule"] == "squaredcos_cap_v2":  # which has neither
        noise |= {"beta_start": PLAIN["beta_start"], "beta_end": PLAIN["beta_end"]}
    written = {one: _written(objective, one) for one in noise}
    changed = [one for one in noise if written[one] is not None and not _same(written[one], noise[one])]
    if changed and not cfg.model.change_objective:
        raise ConfigError(
            "\n".join(f"objective.{one}: {written[one]}, but {name} was trained with {noise[one]}" for one in changed)
            + "\nLeave it out to train on as before. "
            + OTHERWISE
        )
    if objective.kind != "ddpm":
        return objective
    betas = () if not objective.scale_betas else ("beta_start", "beta_end")  # theirs are scaled already
    return objective.filled(**{one: value for one, value in noise.items() if one not in betas})


def _written(objective: Any, name: str) -> Any:
    """What the objective says of `name` itself, as a scheduler would state it; None if it is open, or not its own."""
    value = getattr(objective, name, None)
    if name in ("beta_start", "beta_end") and getattr(objective, "scale_betas", False):
        return (PLAIN[name] if value is None else value) * objective.beta_scale
    return value


def _same(one: Any, other: Any) -> bool:
    both_floats = isinstance(one, float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=1e-6) if both_floats else one == other


def _is_known(scheduler: Mapping[str, Any]) -> bool:
    """Whether the betas of a scheduler are those of its settings."""
    stated = {"num_train_timesteps", "beta_schedule", "beta_start", "beta_end"} <= scheduler.keys()
    own = scheduler.get("trained_betas") is not None and scheduler.get("beta_schedule") != "sigmoid"
    return stated and scheduler["beta_schedule"] in SCHEDULES and not own


def _read(cfg: TrainConfig, name: str) -> dict[str, Any] | None:
    """A JSON file of the pipeline, or None if it has none of that name."""
    model = cfg.model
    source = resolve_source(model.pretrained_model_name_or_path, setting=SETTING, revision=model.revision)
    path = Path(source, name) if Path(source).is_dir() else _downloaded(source, name, model.revision)
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{SETTING}: {name} of {source} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{SETTING}: {name} of {source} is no JSON object")
    return found


def _downloaded(repo: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    commit = commit_of(repo, setting=SETTING, revision=revision)
    cached = try_to_load_from_cache(repo, name, revision=commit)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # else the Hub has been asked before, and has none
    try:
        return Path(hf_hub_download(repo, name, revision=commit))
    except Exception as error:  # the Hub client, the HTTP library and offline mode share no base class
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"{SETTING}: {name} of the Hub repository {repo} cannot be loaded: {reason}") from error

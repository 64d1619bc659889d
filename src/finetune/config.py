"""Every setting of a run, as nested frozen sections. Imports no torch; the text under a field is its only help text.

Names are those of diffusers and Accelerate. Choices are unions told apart by `kind` (config_choices.py,
config_objective.py, config_optimizer.py); Data stands in config_data.py, Sample in config_sample.py, and so on. A
default names its source; "train_unconditional" is the diffusers script of that name, whose defaults hold when only data
and resolution are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from finetune.config_cache import Cache, cache_contradictions
from finetune.config_captions import Captions, caption_contradictions
from finetune.config_choices import (
    AutoConditioning,
    AutoSpace,
    Conditioning,
    Model,
    PixelSpace,
    Space,
    Unconditional,
    UNet2D,
    conditions,
    low_res_contradictions,
    unet2d_contradictions,
)
from finetune.config_data import Data
from finetune.config_export import Export, export_contradictions
from finetune.config_lora import Lora, lora_contradictions
from finetune.config_objective import DDPM, ZERO_SNR, Objective
from finetune.config_optimizer import AdamW, Optimizer, optimizer_contradictions
from finetune.config_prior import Prior, prior_contradictions
from finetune.config_sample import GUIDANCE, Sample, contradictions, few_steps_suit, sampler_of, steps_of
from finetune.config_train import Train, fused_backward_contradictions, train_contradictions
from finetune.config_types import Count, CountOrZero, Decay, Int, Positive, Width, Words, section
from finetune.config_validation import Validation, validation_contradictions


@section
class Ema:
    """Exponential moving averages of the trained weights, in float32, stepped on real optimizer steps only."""

    use_ema: bool = False
    """Keep averages; sampling and export use the first one: of ema_max_decay, or of relative_widths without any."""
    ema_max_decay: tuple[Decay, ...] = (0.9999,)
    """Decay of each average (0.9999 as in train_unconditional); may be empty beside relative_widths."""
    ema_warmup: Literal["power", "ratio", "none"] = "power"
    """Decay of update n (from 1) until it reaches ema_max_decay: power: 1 - (1 + (n-1) / ema_inv_gamma) ** -ema_power
    (train_unconditional); ratio: (1 + n) / (10 + n) (generative-models); none: constant (improved-diffusion)."""
    ema_inv_gamma: Positive = 1.0
    """Inverse gamma of the warm-up."""
    ema_power: Positive = 0.75
    """Power of the warm-up (3/4 as in train_unconditional)."""
    update_every: Count = 1
    """Optimizer steps between two moves of the averages, each by what as many single ones would come to if the weights
    stood still: cheaper. What is saved or drawn in between, and at the end, takes the averages as they moved last."""
    relative_widths: tuple[Width, ...] = ()
    """Averages by power functions (Karras et al. 2024), each by its width as a share of the steps done so far, such as
    0.05 and 0.1; at most 12**-0.5, which counts all steps alike."""
    snapshot_every: Count | None = None
    """Optimizer steps between snapshots of the relative_widths, also kept at the end, from which `finetune ema` makes
    other widths after the training; unset: none. Each takes 4 bytes per parameter and width."""

    def __post_init__(self) -> None:
        if not self.averages:
            raise ValueError("ema_max_decay needs at least one value, or set relative_widths")
        if len(set(self.ema_max_decay)) < len(self.ema_max_decay):
            raise ValueError(f"ema_max_decay names a decay twice: {list(self.ema_max_decay)}")
        if len(set(self.relative_widths)) < len(self.relative_widths):
            raise ValueError(f"relative_widths names a width twice: {list(self.relative_widths)}")
        if self.relative_widths and not self.use_ema:
            raise ValueError(f"relative_widths {list(self.relative_widths)} need use_ema true")
        if self.update_every > 1 and not self.use_ema:
            raise ValueError(f"update_every {self.update_every} has nothing to move: set use_ema true, or remove it")
        if self.snapshot_every and self.snapshot_every % self.update_every:
            multiple = max(1, self.snapshot_every // self.update_every) * self.update_every
            raise ValueError(
                f"snapshot_every {self.snapshot_every} is no multiple of update_every {self.update_every}: some "
                f"snapshots would be those before again; use such as {multiple}"
            )
        if self.snapshot_every and not self.relative_widths:
            raise ValueError(
                f"snapshot_every {self.snapshot_every} has nothing to keep: set relative_widths, such as [0.05, 0.1]"
            )

    @property
    def averages(self) -> list[str]:
        """The averages in words, the first being the one that is sampled and exported."""
        decays = [f"decay {decay:g}" for decay in self.ema_max_decay]
        return decays + [f"relative width {width:g}" for width in self.relative_widths]


@section
class Checkpoint:
    """What is saved to resume from."""

    checkpointing_steps: Count = 500
    """Save every so many optimizer steps (500 as in train_unconditional), and at the end."""
    checkpoints_total_limit: Annotated[Int, Field(ge=2)] = 2
    """Newest checkpoints kept; at least 2, so that one whole checkpoint exists at any moment."""
    milestone_steps: Count | None = None
    """Besides, keep for good the checkpoint of every so many optimizer steps; a multiple of checkpointing_steps."""
    best_metric: str | None = None
    """Besides, keep the checkpoint at which this number of metrics.jsonl, as logged last, was lowest: such as loss."""
    asynchronous: bool = False
    """Write in the background, from a copy in host memory, while the training goes on; the last one is waited for."""

    def __post_init__(self) -> None:
        every = self.checkpointing_steps
        if self.milestone_steps and self.milestone_steps % every:
            raise ValueError(
                f"milestone_steps {self.milestone_steps} is no multiple of checkpointing_steps {every}, hence never "
                f"saved: use such as {max(1, round(self.milestone_steps / every)) * every}"
            )


@section
class Tracking:
    """Numbers written while training."""

    log_every: Count = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    report_to: str | Words = "tensorboard"
    """Trackers that Accelerate knows, by name; "none" for metrics.jsonl alone."""
    tracker_project_name: str = "finetune"
    """Project name for the trackers that have one."""


@section
class Hub:
    """Publishing the exported pipeline. The token is taken from HF_TOKEN or the stored login, never from here."""

    push: bool = False
    """Push output_dir/pipeline when training is done; login and permission are checked before it."""
    hub_model_id: str | None = None
    """Repository: "name" or "owner/name"; unset: the name of output_dir."""
    private: bool = True
    """Create the repository as private."""
    push_budget_minutes: Positive = 30.0
    """How long a push may retry before the run ends with exit code 5."""


@section
class TrainConfig:
    """Every setting of a run."""

    output_dir: str
    """Where everything goes."""
    seed: CountOrZero = 0
    """Seed of every draw."""
    resume_from_checkpoint: str = "latest"
    """"latest": go on where output_dir stopped, if it did; or the path of one checkpoint."""
    allow_change: Words = ()
    """What may differ from the checkpoint that is gone on from: a setting such as optimizer.learning_rate, a section
    such as optimizer, or data.content. What nothing hangs on, such as sample.*, may always."""
    data: Data
    captions: Captions = Field(default_factory=Captions)
    space: Space = Field(default_factory=AutoSpace)
    conditioning: Conditioning = Field(default_factory=AutoConditioning)
    model: Model = Field(default_factory=UNet2D)
    lora: Lora | None = None
    objective: Objective = Field(default_factory=DDPM)
    train: Train = Field(default_factory=Train)
    optimizer: Optimizer = Field(default_factory=AdamW)
    ema: Ema = Field(default_factory=Ema)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)
    sample: Sample = Field(default_factory=Sample)
    validation: Validation = Field(default_factory=Validation)
    cache: Cache = Field(default_factory=Cache)
    export: Export = Field(default_factory=Export)
    hub: Hub = Field(default_factory=Hub)
    prior: Prior | None = None

    def __post_init__(self) -> None:
        if not (found := list(self._unsettled())):
            if self.model.kind != "pretrained":
                self._settle()
            if self.sample.guidance_scale is None and "auto" not in (self.space.kind, self.conditioning.kind):
                self._settle_guidance()
            found = list(self._contradictions())
        if problems := [f"{place}: {problem}" for place, problem in found]:
            raise ValueError("\n".join(problems))

    @property
    def is_open(self) -> bool:
        """Whether the pretrained pipeline has still to say something: see `foundation.resolve`."""
        unset = self.objective.kind == "ddpm" and self.objective.unset
        return "auto" in (self.space.kind, self.conditioning.kind) or bool(unset)

    def _unsettled(self) -> Iterator[tuple[str, str]]:
        """What a new model leaves open and cannot, as (place, problem) pairs."""
        if self.model.kind == "pretrained":
            return
        objective = self.objective
        if objective.kind == "ddpm" and objective.rescale_betas_zero_snr and objective.prediction_type is None:
            yield "objective", ZERO_SNR
        for name in ("condition_dropout", "clip_skip", "chunks", "inpaint"):
            if self.conditioning.kind == "auto" and getattr(self.conditioning, name) is not None:
                yield f"conditioning.{name}", "there is no condition: choose one by conditioning.kind"

    def _settle(self) -> None:
        """What a new model is, where nothing is said."""
        if self.space.kind == "auto":
            object.__setattr__(self, "space", PixelSpace())  # frozen for everybody else
        if self.conditioning.kind == "auto":
            object.__setattr__(self, "conditioning", Unconditional())
        if self.objective.kind == "ddpm":
            object.__setattr__(self, "objective", self.objective.filled())

    def _settle_guidance(self) -> None:
        """How strongly samples are guided, where nothing is said."""
        text, guided = {"pooled_text", "text"} & conditions(self.conditioning).keys(), not self.sample.autoguidance
        scale = GUIDANCE if text and guided and self._published else 1.0
        object.__setattr__(self, "sample", replace(self.sample, guidance_scale=scale))

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Rules between sections, as (place, problem) pairs; those about what is open wait until it is not."""
        if self.conditioning.kind != "auto":
            yield from self._conditions_contradict()
        wanted = max(len(self.sample.prompts), len(self.sample.class_labels))
        if wanted > self.sample.num_images:
            yield "sample.num_images", f"{self.sample.num_images} cannot show {wanted} prompts or labels: raise it"
        known = None if self.conditioning.kind == "auto" else conditions(self.conditioning)
        changing = {
            "words_change": self.captions.shuffle or self.captions.tag_dropout > 0,
            "text_trained": self.train.train_text_encoder,
        }
        yield from cache_contradictions(self.cache, self.data, self.space.kind, known, **changing)
        streaming, best_metric = self.data.streaming, self.checkpoint.best_metric
        yield from validation_contradictions(self.validation, streaming=streaming, best_metric=best_metric)
        objective = self.objective
        if objective.kind == "ddpm" and self.space.kind == "latent" and objective.variance.vb_loss != "none":
            yield "objective.variance.vb_loss", (
                "the variational bound is a likelihood of 8-bit pixels and has no meaning for space.kind latent: use "
                "variance.kind fixed_small or fixed_large with vb_loss none"
            )
        if self.data.masked and objective.kind == "ddpm" and objective.variance.vb_loss != "none":
            yield "objective.variance.vb_loss", (
                "the variational bound is a likelihood of whole images, which has no masked form: use variance.kind "
                "fixed_small or fixed_large with vb_loss none, or remove "
                f"{'data.alpha_mask' if self.data.alpha_mask else 'data.mask_column'}"
            )
        if not self.is_open:
            yield from contradictions(self.sample, objective, few_steps=self._few_steps)
        yield from export_contradictions(self.export, lora=self.lora is not None)
        yield from optimizer_contradictions(self.optimizer, self.ema)
        yield from fused_backward_contradictions(self.train, self.optimizer)
        yield from train_contradictions(self.train, self.data.buckets)
        yield from prior_contradictions(self, conditions(self.conditioning))

    def _conditions_contradict(self) -> Iterator[tuple[str, str]]:
        """Rules between the conditions and other sections."""
        kind, parts, pretrained = self.conditioning.kind, conditions(self.conditioning), self.model.kind == "pretrained"
        reads = kind if kind != "several" else " + ".join(parts)
        text = {"pooled_text", "text"} & parts.keys()
        if self.model.kind == "unet2d":
            yield from unet2d_contradictions(parts)
        if self.sample.prompts and not text:
            yield "sample.prompts", f"conditioning.kind is {reads}, which takes no prompts: remove them"
        if self.sample.class_labels and "class_label" not in parts:
            yield "sample.class_labels", f"conditioning.kind is {reads}, which takes no labels: remove them"
        if text and not self.sample.prompts and not {"low_res", "inpaint"} & parts.keys() and not pretrained:
            yield "sample.prompts", f"conditioning.kind {reads} needs at least one prompt to sample with"
        if "inpaint" in parts and (parts.keys() != {"text", "inpaint"} or self.space.kind == "pixel"):
            yield "conditioning.inpaint", "it goes with a text alone and space.kind latent, as in Stable Diffusion"
        data, asked = self.data, bool(self.sample.prompts or self.sample.class_labels)
        yield from caption_contradictions(self.captions, bool(text), data.dataset_config is not None)
        yield from low_res_contradictions(parts, data.resolution, data.low_res_column, data.preparation, asked)
        if data.buckets != "none" and "low_res" in parts:
            yield "data.buckets", "the small images of conditioning low_res are square: set data.buckets none"
        yield from lora_contradictions(self, text=bool(text))
        if self.sample.guidance_scale not in (None, 0.0, 1.0) and self.sample.autoguidance is None:
            if kind == "none":
                yield "sample.guidance_scale", "there is no condition to guide with: use 1"
            elif not pretrained and not any(part.condition_dropout for part in parts.values()):
                yield "sample.guidance_scale", (
                    f"guidance {self.sample.guidance_scale} needs the unconditional case, which conditioning."
                    "condition_dropout 0 never trains: use a dropout such as 0.1, or guidance_scale 1"
                )

    @property
    def sampler(self) -> str:
        """sample.scheduler, or the default of objective.kind or of a pretrained model."""
        return sampler_of(self.sample, self.objective.kind, few_steps=self._few_steps)

    @property
    def sampling_steps(self) -> int:
        """How many steps the sampler takes."""
        return steps_of(self.sample, self.objective, few_steps=self._few_steps)

    @property
    def _published(self) -> bool:
        """Whether the model is one such as Stable Diffusion, whose users expect what its own pipeline does."""
        return self.model.kind == "pretrained" and self.space.kind == "latent"

    @property
    def _few_steps(self) -> bool:
        return self._published and few_steps_suit(self.objective)

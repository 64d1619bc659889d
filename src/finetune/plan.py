"""The first screen of a run: what will be done, before any of it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.config import TrainConfig
from finetune.config_choices import SequenceCondition, conditions

if TYPE_CHECKING:
    from torch import nn

    from finetune.config_levels import Levels, Loss, Weighting
    from finetune.modules import Modules
    from finetune.resume import Resumed
    from finetune.trainer import Trainer

MOST_SUBSETS = 4  # that the plan names


def plan_text(trainer: Trainer) -> str:
    """The plan of `trainer` as an aligned table of at most 22 lines."""
    cfg, modules, processes = trainer.cfg, trainer.modules, trainer.accelerator.num_processes
    return table(
        {
            "data": data_line(trainer.data.facts, cfg),
            "buckets": buckets_line(trainer.data.facts, trainer.global_batch),
            "captions": captions_line(trainer.data.facts, cfg),
            "classes": classes_line(trainer.data.facts),
            "prior": prior_line(trainer.data.facts, cfg),
            "space": f"{cfg.space.kind}, x0 {modules.space.channels}x{modules.space.size}x{modules.space.size}",
            "conditioning": conditioning_line(cfg),
            "cache": trainer.cached,
            "model": model_line(modules),
            "adapter": adapter_line(cfg, modules.unet),
            "objective": objective_line(cfg),
            "batch": f"{trainer.global_batch} images = {trainer.micro_batch} per micro-step x {trainer.accumulation} "
            f"accumulated x {processes} process{'es' * (processes > 1)}",
            "steps": f"{trainer.steps:,} of the optimizer = {trainer.steps * trainer.global_batch:,} images = "
            f"{trainer.steps * trainer.global_batch / len(trainer.data):.4g} epochs",
            "optimizer": optimizer_line(cfg),
            "averages": averages_line(cfg),
            "memory": memory_line(modules, cfg, sharded_over=processes if trainer.accelerator.shards else 1),
            "device": f"{processes} x {trainer.accelerator.device.type}"
            f"{', the weights sharded over them (FSDP2)' * trainer.accelerator.shards}, network in "
            f"{trainer.accelerator.mixed_precision.replace('no', 'float32')}, seed {cfg.seed}",
            "compile": trainer.compiled,
            "start": start_line(trainer.resumed),
            "changed": changed_line(trainer.resumed),
            "checkpoints": checkpoints_line(modules, cfg),
            "snapshots": snapshots_line(modules, cfg, trainer.steps),
            "validation": validation_line(trainer),
            "samples": samples_line(cfg),
            "output": str(trainer.output_dir),
            "push": push_line(cfg, trainer.output_dir.resolve().name),
        }
    )


def start_line(resumed: Resumed | None) -> str:
    """Where the run begins and, if it goes on, how exactly."""
    return "at step 0" if resumed is None else f"resumes at step {resumed.found.step:,}, {resumed.promise}"


def changed_line(resumed: Resumed | None) -> str:
    """The settings that differ from those of the checkpoint; empty if none do."""
    return "" if resumed is None else ", ".join(line.strip() for line in resumed.changed)


def table(rows: Mapping[str, str]) -> str:
    """One line per row, values aligned; rows with an empty value are left out, control characters are not shown."""
    width = max(map(len, rows))
    shown = {name: "".join(c if c.isprintable() else " " for c in value) for name, value in rows.items() if value}
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in shown.items())


def data_line(facts: Mapping[str, Any], cfg: TrainConfig) -> str:
    """Source, rows, sizes, and what happens to them."""
    source = cfg.data.train_data_dir or cfg.data.dataset_config or cfg.data.dataset_name or "from Python"
    parts = [f"{source}: {facts['rows']:,} images"]
    if subsets := facts.get("subsets"):
        shown = ", ".join(f"{one['name']} {one['images']:,} x {one['repeats']:,}" for one in subsets[:MOST_SUBSETS])
        parts[0] += f" by repeats ({shown}{', ...' * (len(subsets) > MOST_SUBSETS)})"
    if facts["left_out"]:
        parts.append(f"{facts['left_out']:,} left out")
    if "shards" in facts:
        parts.append(f"streamed from {facts['row_groups']:,} row groups of {facts['shards']:,} shards")
        return ", ".join([*parts, f"-> {cfg.data.resolution}x{cfg.data.resolution}"])
    width, height = facts["width"], facts["height"]
    smallest, largest = f"{width['min']}x{height['min']}", f"{width['max']}x{height['max']}"
    sizes = smallest if smallest == largest else f"{smallest} to {largest}"
    about = "about " if "buckets" in facts else ""
    parts.append(f"{sizes} -> {about}{cfg.data.resolution}x{cfg.data.resolution}")
    if facts["upscaled"]:
        parts.append(f"{facts['upscaled']:,} upscaled")
    if cfg.data.masked:
        parts.append(f"loss masked by {'alpha' if cfg.data.alpha_mask else cfg.data.mask_column}")
    if "captions" in facts:
        parts.append(f"{facts['captions']['count']:,} captions ({facts['captions']['empty']:,} empty)")
    return ", ".join(parts)


def buckets_line(facts: Mapping[str, Any], global_batch: int) -> str:
    """How many shapes, how much of the images they cut off, how many are smaller than a batch; empty without."""
    found = facts.get("buckets")
    if not found:
        return ""
    images, cropped = found["images"], found["cropped"]
    shapes, fewest = list(images), min(images, key=images.get)
    line = (
        f"{len(images)} from {shapes[-1]} to {shapes[0]} by {found['step']}, {cropped['mean']:.1%} cropped "
        f"({cropped['max']:.1%} at most), fewest images {images[fewest]:,} ({fewest})"
    )
    if small := sum(count < global_batch for count in images.values()):
        line += f"; {small} with less than a batch, which then repeats some"
    return line


def captions_line(facts: Mapping[str, Any], cfg: TrainConfig) -> str:
    """What is made of the captions, and how many are cut; empty if nothing is."""
    captions, found = cfg.captions, facts.get("captions", {})
    parts = [f"{name} {text!r}" for name in ("trigger_word", "prefix", "suffix") if (text := getattr(captions, name))]
    parts += ["tags shuffled"] * captions.shuffle
    parts += [f"{captions.tag_dropout:.4g} of the tags dropped"] * bool(captions.tag_dropout)
    if found.get("truncated"):
        tokens, several = found["tokens"], cfg.conditioning.kind == "several"
        raisable = isinstance(conditions(cfg.conditioning).get("text"), SequenceCondition)
        remedy = f"; raise conditioning.{'text.' * several}chunks" if raisable else ""
        parts.append(
            f"{found['truncated']:,} of {found['texts']:,} different captions are cut to {tokens['limit']} tokens, the "
            f"longest has {tokens['longest']}{remedy}"
        )
    return ", ".join(parts)


def classes_line(facts: Mapping[str, Any], *, most: int = 8) -> str:
    """The classes with their numbers of images, at most `most` of them; empty without classes."""
    classes = facts.get("classes")
    if not classes:
        return ""
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(classes.items())[:most])
    return f"{len(classes)}: {shown}" + (", ..." if len(classes) > most else "")


def prior_line(facts: Mapping[str, Any], cfg: TrainConfig) -> str:
    """The class images; empty without."""
    if cfg.prior is None:
        return ""
    return f"{facts['class_images']:,} class images, every other sample, counting {cfg.prior.weight:g}"


def conditioning_line(cfg: TrainConfig) -> str:
    """Kind and dropout."""
    parts = conditions(cfg.conditioning)
    if not parts:
        return "none"
    if len(parts) == 1:
        [(kind, part)] = parts.items()
        return f"{kind}, dropped for {part.condition_dropout:.4g} of the samples"
    rates = ", ".join(f"{kind} ({part.condition_dropout:.4g})" for kind, part in parts.items())
    return f"{rates} by the share of samples that each is dropped for, {cfg.conditioning.dropout_draws} draws"


def model_line(modules: Modules) -> str:
    """Class and numbers of parameters, those of VAE and text encoders included."""
    frozen = modules.parameters_frozen + sum(p.numel() for p in modules.unet.parameters() if not p.requires_grad)
    beside = ", the text encoder too" * bool(modules.text)
    trained = f"{count(count_of(modules.averaged))} parameters trained{beside}"
    name = type(modules.unet).__name__.removeprefix("FSDP")
    return f"{name}, {trained}, {count(frozen)} frozen"


def count_of(parameters: Mapping[str, nn.Parameter]) -> int:
    """How many numbers they are."""
    return sum(p.numel() for p in parameters.values())


def adapter_line(cfg: TrainConfig, unet: nn.Module) -> str:
    """What is trained of the UNet instead of its own weights; empty without a LoRA."""
    if (lora := cfg.lora) is None:
        return ""
    kind = "LoRA" + ", rank-stabilised" * lora.use_rslora + ", weight-decomposed (DoRA)" * lora.use_dora
    layers = sum(name.endswith(".lora_A") for name, _ in unet.named_modules())
    return f"{kind}, of rank {lora.rank} and scale {lora.scale:g} on {layers} layers ({lora.target})"


def count(n: int) -> str:
    """12_345_678 -> "12.3 M"."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return str(n)


def objective_line(cfg: TrainConfig) -> str:
    """Process, what is predicted, how levels are drawn, and how the loss is weighted; only what is not the default."""
    objective = cfg.objective
    if objective.kind == "custom":
        return objective.target
    parts = [objective.kind] + [objective.prediction_type] * (objective.prediction_type != objective.kind)
    if objective.kind == "ddpm":
        respaced = f" respaced to {objective.respacing}" if objective.respacing else ""
        parts.append(f"{objective.num_train_timesteps} levels{respaced}")
        parts.append(f"{objective.beta_schedule} schedule" + ", zero terminal SNR" * objective.rescale_betas_zero_snr)
        if objective.variance.kind == "learned_range" or objective.variance.vb_loss != "none":
            parts.append(f"{objective.variance.kind} variance, vb loss {objective.variance.vb_loss}")
    stratified = objective.levels.kind != "custom" and objective.levels.stratified
    parts.append(f"levels {_named(objective.levels)}" + " stratified" * stratified)
    if objective.weighting.kind != "none":
        parts.append(f"weighting {_named(objective.weighting)}")
    if objective.loss.kind != "l2":
        parts.append(f"loss {_named(objective.loss)}")
    noise = {"noise offset": objective.noise_offset, "input perturbation": objective.input_perturbation}
    noise["pyramid noise"] = objective.pyramid_noise_discount
    return ", ".join([*parts, *(f"{name} {strength:g}" for name, strength in noise.items() if strength)])


def _named(choice: Levels | Weighting | Loss) -> str:
    return choice.target if choice.kind == "custom" else choice.kind


def optimizer_line(cfg: TrainConfig) -> str:
    """The optimizer, its learning rate and schedule, and clipping."""
    optimizer, norm = cfg.optimizer, cfg.train.max_grad_norm
    warmup = f", {optimizer.lr_warmup_steps} warm-up steps" if optimizer.lr_warmup_steps else ""
    clipping = f", gradient norm at most {norm:g}" if norm else ""
    text = f" (text encoder {optimizer.text_encoder_lr:g})" if optimizer.text_encoder_lr else ""
    rate = f"learning rate {optimizer.learning_rate:g}{text}, {optimizer.lr_scheduler}"
    return f"{optimizer.title}, {rate}{warmup}{clipping}"


def averages_line(cfg: TrainConfig) -> str:
    """The averages, or that there are none."""
    if cfg.optimizer.kind == "schedule_free_adamw":
        return "the optimizer's own, which samples and export use"
    if not cfg.ema.use_ema:
        return "none: samples and export use the last weights"
    ema, parts = cfg.ema, []
    if ema.ema_max_decay:
        parts.append(f"decay {', '.join(f'{d:g}' for d in ema.ema_max_decay)} ({ema.ema_warmup} warm-up)")
    if ema.relative_widths:
        parts.append(f"relative width {', '.join(f'{w:g}' for w in ema.relative_widths)}")
    often = f", moved every {ema.update_every:,} steps" * (ema.update_every > 1)
    return f"{', '.join(parts)}{often}; samples and export use the first"


def optimizer_size(modules: Modules, cfg: TrainConfig) -> int:
    """Bytes of the optimizer's state."""
    return sum(cfg.optimizer.state_size(tuple(p.shape)) for p in modules.trained.values())


def averages_size(modules: Modules, cfg: TrainConfig) -> int:
    """Bytes of the averages."""
    return 4 * (len(cfg.ema.averages) if cfg.ema.use_ema else 0) * count_of(modules.averaged)


def memory_line(modules: Modules, cfg: TrainConfig, *, sharded_over: int = 1) -> str:
    """What lies on each device whatever the batch; frozen models whose output is cached do not.

    sharded_over: processes that share all but the frozen models.
    """
    weights = {module: sum(p.numel() * p.element_size() for p in module.parameters()) for module in modules.resident}
    unet = weights.pop(modules.unet)
    sizes = {
        "weights": unet / sharded_over + sum(weights.values()),
        "gradients": 0 if cfg.train.fused_backward else 4 * count_of(modules.trained) / sharded_over,
        "optimizer": optimizer_size(modules, cfg) / sharded_over,
        "averages": averages_size(modules, cfg) / sharded_over,
    }
    parts = ", ".join(f"{name} {size / 1e9:,.3g}" for name, size in sizes.items() if size)
    return f"{sum(sizes.values()) / 1e9:,.3g} GB on each device ({parts}), and activations on top"


def checkpoints_line(modules: Modules, cfg: TrainConfig) -> str:
    """How often, how many, and the space on the disk they will take: weights, state of the optimizer, averages."""
    parts = modules.states().values()
    weights = sum(tensor.numel() * tensor.element_size() for tensors in parts for tensor in tensors.values())
    size = (weights + optimizer_size(modules, cfg) + averages_size(modules, cfg)) / 1e6
    kept = cfg.checkpoint.checkpoints_total_limit
    # One more than are kept: the oldest goes only when the newest is whole.
    return (
        f"every {cfg.checkpoint.checkpointing_steps:,} steps, the last {kept} kept: {kept} x {size:,.1f} MB, "
        f"{(kept + 1) * size:,.1f} MB while one is written"
    )


def snapshots_line(modules: Modules, cfg: TrainConfig, steps: int) -> str:
    """How often the averages by relative width are kept for good, and the space they will take; empty if never."""
    every = cfg.ema.snapshot_every
    if not every:
        return ""
    size = len(cfg.ema.relative_widths) * 4 * count_of(modules.averaged) / 1e6
    return f"of the averages every {every:,} steps, all kept: {-(-steps // every):,} x {size:,.1f} MB"


def validation_line(trainer: Trainer) -> str:
    """How many images are held out, what is measured of them and when, and what it costs; empty without any."""
    if trainer.validation is None:
        return ""
    cfg, (held_out, trained) = trainer.cfg.validation, map(len, trainer.validation.rows)
    return (
        f"{len(trainer.data.held_out):,} images held out; {held_out:,} of them and {trained:,} others measured every "
        f"{cfg.every:,} steps in {(held_out + trained) * cfg.levels:,} evaluations of the network"
    )


def samples_line(cfg: TrainConfig) -> str:
    """How many images, how, and when."""
    sample = cfg.sample
    often = "before the first step, " * sample.at_start
    often += f"every {sample.sample_every:,} steps and at the end" if sample.sample_every else "at the end"
    return f"{sample.num_images} images {often}, {cfg.sampler} in {cfg.sampling_steps} steps"


def push_line(cfg: TrainConfig, name: str) -> str:
    """The repository, or no; name: that of output_dir, which is the default."""
    if not cfg.hub.push:
        return "no"
    return f"{cfg.hub.hub_model_id or name} ({'private' if cfg.hub.private else 'public'}) when training is done"

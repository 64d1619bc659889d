"""diffusers' flag names: what those that are not ours are called here, and why the others are refused.

Covers the training scripts train_unconditional, train_text_to_image (plain, LoRA, SDXL, LoRA SDXL), train_autoencoderkl
and the three train_dreambooth_lora_*_advanced. A flag that has the name of one of our settings needs no line.
"""

from __future__ import annotations

RENAMED = {
    "num_epochs": "train.num_train_epochs",
    "push_to_hub": "hub.push",
    "hub_private_repo": "hub.private",
    "logger": "tracking.report_to",
    "ddpm_num_steps": "objective.num_train_timesteps",
    "ddpm_beta_schedule": "objective.beta_schedule",
    "ddpm_num_inference_steps": "sample.num_inference_steps",
    "eval_batch_size": "sample.num_images",
    "num_validation_images": "sample.num_images",
    "validation_prompt": "sample.prompts",
    "validation_prompts": "sample.prompts",
    "validation_steps": "sample.sample_every",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "proportion_empty_prompts": "conditioning.condition_dropout",
    "cache_latents": "cache.latents",
    "revision": "model.revision",
    "variant": "model.variant",
    "pretrained_vae_model_name_or_path": "space.vae",
    "instance_data_dir": "data.train_data_dir",
    "prior_loss_weight": "prior.weight",
    "optimizer": "optimizer.kind",
    "prodigy_beta3": "optimizer.beta3",
    "prodigy_decouple": "optimizer.decouple",
    "prodigy_use_bias_correction": "optimizer.use_bias_correction",
    "prodigy_safeguard_warmup": "optimizer.safeguard_warmup",
}

SELECTS = {
    "pretrained_model_name_or_path": ("model.kind", "pretrained"),
    "pretrained_vae_model_name_or_path": ("space.kind", "latent"),
    "snr_gamma": ("objective.weighting.kind", "min_snr"),
}
"""Flags that exist in one kind only and stand for the choice of it."""

SWITCHES = {
    "use_8bit_adam": ("optimizer.kind", "adamw", "adamw_8bit"),
    "with_prior_preservation": ("prior", {}, {}),
}
"""Flags without a setting of their own, which turn a kind, given or not, into another; or ask for a section."""

ALREADY = {
    "enable_xformers_memory_efficient_attention": "changes nothing: PyTorch's scaled_dot_product_attention, which "
    "needs as little memory, is always used",
    "set_grads_to_none": "changes nothing: gradients are always set to None",
    "validation_epochs": "is not in optimizer steps, as everything is here: pictures are drawn at the end, and with "
    "sample.sample_every every so many steps",
}
"""Flags of diffusers' documented commands that ask for what is done in any case, or at another time; this is said of
them."""

_LAYERS = "not offered: lora.target chooses the layers, attention by default"
_TOKENS = "new tokens are not offered: train.train_text_encoder trains the encoder with the tokens that it has"
_VAE = "the VAE stays frozen: only the UNet is trained"
_BIAS = "not offered: objective.levels chooses which timesteps are drawn, objective.weighting how much each counts"
_FLUX = "for Flux transformers; this toolkit trains UNets"
_DREAM = "DREAM training is not offered"

REFUSED = {
    # data
    "cache_dir": "an environment matter: set HF_HOME, or HF_HUB_CACHE and HF_DATASETS_CACHE",
    "preserve_input_precision": "not offered: images are read with 8 bits per channel; remove it",
    "repeats": "remove it: train.num_train_epochs and train.max_train_steps set how often an image is seen",
    # model and adapters
    "model_config_name_or_path": "write the architecture in the model section (model.block_out_channels, ...)",
    "non_ema_revision": "use model.revision",
    "lora_layers": _LAYERS,
    "lora_unet_blocks": _LAYERS,
    "use_blora": _LAYERS,
    "train_text_encoder_ti": _TOKENS,
    "train_text_encoder_frac": "not offered: train.train_text_encoder trains it to the end",
    "train_text_encoder_ti_frac": _TOKENS,
    "train_transformer_frac": _FLUX,
    "token_abstraction": _TOKENS,
    "num_new_tokens_per_abstraction": _TOKENS,
    "initializer_concept": _TOKENS,
    "enable_t5_ti": _FLUX,
    "max_sequence_length": _FLUX,
    "decoder_only": _VAE,
    # objective and loss
    "dream_training": _DREAM,
    "dream_detail_preservation": _DREAM,
    "timestep_bias_strategy": _BIAS,
    "timestep_bias_multiplier": _BIAS,
    "timestep_bias_begin": _BIAS,
    "timestep_bias_end": _BIAS,
    "timestep_bias_portion": _BIAS,
    "do_edm_style_training": "use objective.kind edm",
    "prior_generation_precision": "remove it: class images are drawn in train.mixed_precision",
    "weighting_scheme": "use objective.kind flow with objective.levels.kind and objective.weighting.kind",
    "rec_loss": _VAE,
    "kl_scale": _VAE,
    "perceptual_scale": _VAE,
    "disc_start": _VAE,
    "disc_factor": _VAE,
    "disc_scale": _VAE,
    "disc_loss": _VAE,
    "debug_loss": "remove it: metrics.jsonl holds the loss of every logged step",
    # optimisation
    "disc_learning_rate": _VAE,
    "scale_lr": "remove it, and write the learning rate of the global batch into optimizer.learning_rate",
    "disc_lr_scheduler": _VAE,
    "adam_weight_decay_text_encoder": "not offered: optimizer.adam_weight_decay holds for all that is trained",
    # precision and speed
    "enable_npu_flash_attention": "remove it: PyTorch's scaled_dot_product_attention is used already",
    "upcast_before_saving": "remove it: weights are trained and saved in float32",
    # EMA
    "offload_ema": "not offered: the averages stay on the training device; remove it",
    "foreach_ema": "remove it: how the averages are updated is not a setting",
    # distributed
    "local_rank": "remove it: `accelerate launch` tells every process its rank",
    # checkpoints and logging
    "overwrite_output_dir": "remove it: a run goes on where output_dir stopped; a new output_dir starts afresh",
    "save_model_epochs": "remove it: the model is exported at the end; checkpoint.checkpointing_steps saves between",
    "logging_dir": "remove it: logs are always in output_dir/logs",
    # validation and sampling
    "save_images_epochs": "counted in optimizer steps here: use sample.sample_every",
    "validation_image": _VAE,
    # Hub
    "hub_token": "the token comes from HF_TOKEN or `hf auth login`, never from an option, which others can read",
}

"""What docs/migrate.md says of the flags of other scripts is so, and every command in it is one."""

import re
import shlex
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from finetune.config_flags import ALREADY, REFUSED, RENAMED, SELECTS, SWITCHES
from finetune.config_io import load
from finetune.config_tree import LEAVES, SECTIONS, SETTINGS
from finetune.errors import ConfigError

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "migrate.md").read_text()
DIFFUSERS, KOHYA = PAGE.split("\n## sd-scripts\n")
FLAGS = """dataset_name dataset_config_name train_data_dir cache_dir image_column caption_column max_train_samples
resolution center_crop random_flip image_interpolation_mode dataloader_num_workers train_batch_size
proportion_empty_prompts pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant
non_ema_revision rank train_text_encoder prediction_type snr_gamma noise_offset input_perturbation dream_training
dream_detail_preservation timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin timestep_bias_end
timestep_bias_portion debug_loss learning_rate scale_lr lr_scheduler lr_warmup_steps num_train_epochs max_train_steps
gradient_accumulation_steps gradient_checkpointing max_grad_norm use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay
adam_epsilon seed mixed_precision allow_tf32 enable_xformers_memory_efficient_attention enable_npu_flash_attention
use_ema offload_ema foreach_ema local_rank output_dir checkpointing_steps checkpoints_total_limit
resume_from_checkpoint report_to logging_dir tracker_project_name validation_prompt validation_prompts
num_validation_images validation_epochs push_to_hub hub_token hub_model_id""".split()
"""Of train_text_to_image.py, _lora, _sdxl and _lora_sdxl, as their parsers have them in diffusers 0.40."""
KOHYA_FLAGS = """pretrained_model_name_or_path v2 v_parameterization vae train_data_dir dataset_config reg_data_dir
resolution train_batch_size max_train_steps max_train_epochs learning_rate unet_lr text_encoder_lr network_module
network_dim network_alpha network_dropout network_args network_weights network_train_unet_only optimizer_type
optimizer_args use_8bit_adam lr_scheduler lr_warmup_steps lr_scheduler_num_cycles mixed_precision save_precision
gradient_checkpointing gradient_accumulation_steps fused_backward_pass xformers sdpa cache_latents
cache_latents_to_disk cache_text_encoder_outputs enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps
bucket_no_upscale shuffle_caption keep_tokens caption_extension caption_dropout_rate caption_tag_dropout_rate clip_skip
max_token_length flip_aug random_crop noise_offset multires_noise_discount min_snr_gamma zero_terminal_snr
ip_noise_gamma debiased_estimation_loss loss_type prior_loss_weight masked_loss alpha_mask seed output_dir output_name
save_every_n_steps save_state resume log_with logging_dir sample_prompts sample_every_n_steps sample_sampler
max_data_loader_n_workers huggingface_repo_id huggingface_token""".split()


def table(text: str) -> dict[str, list[str]]:
    """The rows of the table of flags: flag -> the other cells."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "| `--" in line]
    found = {row[0].strip("`").removeprefix("--"): row[1:] for row in rows}
    assert len(found) == len(rows)
    return found


OURS, THEIRS = table(DIFFUSERS), table(KOHYA)
COMMANDS = [
    shlex.split(block.replace("\\\n", " "))
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    if "train_unet.py" in block
]


def path_of(flag: str) -> str | None:
    """The setting that a flag of diffusers names."""
    return RENAMED.get(flag) or (LEAVES[flag][0] if len(LEAVES.get(flag, ())) == 1 else None)


def answer(flag: str) -> str:
    """What the page must say of a flag of diffusers."""
    if flag in ALREADY:
        return f"taken; it {ALREADY[flag]}"
    if flag in REFUSED:
        return f"refused: {REFUSED[flag]}"
    path, _, value = SWITCHES[flag] if flag in SWITCHES else (path_of(flag), None, None)
    selects = "".join(f", and `{at}`: `{kind}`" for at, kind in [SELECTS[flag]]) if flag in SELECTS else ""
    return f"`{path}`" + (f": `{value}`" if value else "") + selects


def shown(default: object) -> str:
    """A default as the page writes it."""
    if default is PydanticUndefined:
        return "required"
    if default is None or default == ():
        return "unset"
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_the_tables_hold_every_flag():
    assert list(OURS) == FLAGS and list(THEIRS) == KOHYA_FLAGS


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_diffusers_are_what_the_page_says(flag):
    scripts, _, here, default = (*OURS[flag], "")[:4]
    assert set(scripts.split()) <= {"T", "L", "X", "XL"} and here.rstrip(" |") == answer(flag)
    assert default.rstrip(" |") == (shown(SETTINGS[path_of(flag)][0].default) if path_of(flag) else "")


def test_a_refused_flag_is_refused():
    for flag in FLAGS:
        refused = "refused" in OURS[flag][2]
        words = ["--output_dir=o", "--resolution=8", "--train_data_dir=d", f"--{flag}=1"]
        try:
            load(words, env={})
            message = ""
        except ConfigError as error:
            message = str(error)
        assert (f"--{flag}: {REFUSED.get(flag)}" in message) == refused, flag


NAMES = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)(?:: (\w+))?`")


@pytest.mark.parametrize("flag", KOHYA_FLAGS)
def test_settings_that_stand_for_flags_of_sd_scripts_exist(flag):
    here = THEIRS[flag][0].rstrip(" |")
    if here.startswith("none: "):
        assert "`" not in here
        return
    ((name, value),) = NAMES.findall(here)
    assert f"`{name}" in here and name in SETTINGS and name not in SECTIONS
    if value:
        choices = {str(choice) for setting in SETTINGS[name] for choice in setting.choices} or {"true", "false"}
        assert value in choices


def test_settings_in_the_text_exist():
    named = [(name, value) for name, value in NAMES.findall(PAGE) if "." in name]
    assert len(named) > 60
    files = {"sdxl.md", "lora.md", "text2image.md", "dreambooth.md"}
    assert not [name for name, _ in named if name not in {*SETTINGS, *SECTIONS, *files} and ".py" not in name]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[-1])
def test_commands_are_taken_as_they_stand(words):
    argv = words[words.index("train_unet.py") + 1 :]
    cfg = load(argv, env={})
    assert cfg.model.kind == "pretrained" and (cfg.lora is not None) == any("rank=" in word for word in argv)
    assert (cfg.prior is not None) == ("--with_prior_preservation" in argv)
    assert cfg.hub.push == ("--push_to_hub" in argv)
    with pytest.raises(ConfigError, match="no such option"):
        load([*argv, "--no_such_flag=1"], env={})


def test_the_scripts_commands_are_there():
    assert len(COMMANDS) == 10
    cfgs = [load(words[words.index("train_unet.py") + 1 :], env={}) for words in COMMANDS]
    assert [cfg.lora is not None for cfg in cfgs] == [False, False, True, False, True, True, False, False, True, True]
    assert cfgs[1].objective.weighting.kind == "min_snr" and cfgs[1].sample.prompts == ("yoda", "a robot")
    assert cfgs[3].optimizer.kind == "adamw_8bit" and cfgs[3].conditioning.condition_dropout == 0.2
    assert cfgs[7].train.train_text_encoder and cfgs[7].sample.sample_every == 100
    assert cfgs[9].data.dataset_config == "dataset.toml" and cfgs[9].export.kohya

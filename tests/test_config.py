"""Recipes, options, diffusers' flag names, the launcher's part, and writing a config back."""

import json
import random
import re
from dataclasses import replace

import pytest
import yaml

from finetune import config as c
from finetune import config_choices as cc
from finetune import config_optimizer as co
from finetune import config_prior as cp
from finetune.config_flags import ALREADY, REFUSED, RENAMED, SWITCHES
from finetune.config_io import (
    config_main,
    dump,
    is_main_process,
    load,
    load_or_exit,
    load_text,
    read,
    resolved,
    schema,
)
from finetune.config_launch import batch_plan, launch_settings
from finetune.config_tree import ALL_SETTINGS, LEAVES, SECTIONS, help_text
from finetune.errors import ConfigError

BASE = ["--output_dir", "out", "--train_data_dir", "pics", "--resolution", "64"]
RECIPE = """\
output_dir: out
data: {train_data_dir: pics, resolution: 64}
train:
  mixed_precision: no
  max_train_steps: 10
optimizer:
  learning_rate: 1e-3
space:
  kind: latent
  vae: some/vae
"""


def load_options(*options, env=None):
    return load([*BASE, *options], env=env or {})


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return str(file)


# --- reading -------------------------------------------------------------------------------------------------------


def test_recipe_alone(recipe):
    cfg = load(["--config", recipe], env={})
    assert cfg == c.TrainConfig(
        output_dir="out",
        data=c.Data(train_data_dir="pics", resolution=64),
        train=c.Train(mixed_precision="no", max_train_steps=10, gradient_accumulation_steps=1),
        optimizer=c.AdamW(learning_rate=1e-3),
        space=cc.LatentSpace(kind="latent", vae="some/vae"),
    )


def test_command_line_wins_over_recipe(recipe):
    cfg = load(["--learning_rate", "2e-4", f"--config={recipe}", "--train.max_train_steps=20", "--vae", "v"], env={})
    assert (cfg.optimizer.learning_rate, cfg.train.max_train_steps) == (2e-4, 20)
    assert cfg.space == cc.LatentSpace(kind="latent", vae="v")
    assert cfg.data.resolution == 64  # the recipe's rest stays


def test_kind_on_the_command_line_drops_the_recipes_section(recipe):
    assert load(["--config", recipe, "--space.kind", "pixel"], env={}).space == cc.PixelSpace()
    assert load(["--config", recipe, "--space.kind", "latent"], env={}).space.vae == "some/vae"  # the same kind


@pytest.mark.parametrize(
    ("options", "path", "value"),
    [
        (["--center_crop"], "data.center_crop", True),
        (["--center_crop", "false"], "data.center_crop", False),
        (["--center_crop=false"], "data.center_crop", False),
        (["--data.center_crop", "true", "--seed", "3"], "data.center_crop", True),
        (["--objective.clip_sample"], "objective.clip_sample", True),
        (["--objective.clip_sample", "null"], "objective.clip_sample", None),
        (["--learning_rate", "1E-5"], "optimizer.learning_rate", 1e-5),
        (["--learning_rate", ".5"], "optimizer.learning_rate", 0.5),
        (["--seed", "010"], "seed", 10),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--max_pixels", "64_000"], "data.max_pixels", 64000),
        (["--channels", "1"], "data.channels", 1),
        (["--block_out_channels", "32", "64"], "model.block_out_channels", (32, 64)),
        (["--model.block_out_channels=[32, 64]"], "model.block_out_channels", (32, 64)),
        (["--ema_max_decay", "0.999"], "ema.ema_max_decay", (0.999,)),
        (["--caption_column", "text"], "data.caption_column", "text"),
        (["--caption_column", "a", "b"], "data.caption_column", ("a", "b")),
        (["--caption_column", "[a, b]"], "data.caption_column", ("a", "b")),
        (["--caption_column", "a,b"], "data.caption_column", "a,b"),
        (["--data.revision", "1e5"], "data.revision", "1e5"),  # text stays as it is written
        (["--data.revision", "0123456"], "data.revision", "0123456"),
        (["--background", "#fff"], "data.background", "#fff"),
        (["--data", "{center_crop: true, background: black}"], "data.background", "black"),
        (["--data", '{"resolution": 32}'], "data.resolution", 32),
        (["--model", "{kind: pretrained, pretrained_model_name_or_path: x}"], "model.kind", "pretrained"),
        (["--mixed_precision", "no"], "train.mixed_precision", "no"),
        (["--attention_head_dim", "null"], "model.attention_head_dim", None),
        (["--report_to", "wandb"], "tracking.report_to", "wandb"),
        (["--resume_from_checkpoint", "latest"], "resume_from_checkpoint", "latest"),
    ],
)
def test_options(options, path, value):
    found = load_options(*options)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_prompts_are_taken_word_for_word():
    prompts = ['a cat, asleep [2] "{', "no", "null", "1e5", "it's: fine # here"]
    text = ["--conditioning.kind", "pooled_text", "--text_encoder", "t", "--tokenizer", "t"]
    assert load_options(*text, "--prompts", *prompts).sample.prompts == tuple(prompts)
    assert load_options(*text, f"--prompts={json.dumps(prompts)}").sample.prompts == tuple(prompts)
    assert load_options(*text, "--validation_prompt=--a dashed one").sample.prompts == ("--a dashed one",)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("+.5e1", 5.0), ("3", 3.0), ("0x10", 16.0), ("6.02e23", 6.02e23)],
)
def test_numbers_of_yaml_1_2(text, value):
    assert load_text(RECIPE + f"ema: {{ema_power: {text}}}").ema.ema_power == value


def test_words_of_yaml_1_1_stay_words():
    text = RECIPE.replace("pics,", "pics, split: on, label_column: 12:30, revision: 2024-01-02,")
    cfg = load_text(text)
    assert (cfg.data.split, cfg.data.label_column, cfg.data.revision) == ("on", "12:30", "2024-01-02")
    assert cfg.train.mixed_precision == "no"


def test_aliases_are_followed():
    cfg = load_text("output_dir: &x pics\ndata: {train_data_dir: *x, resolution: 8}")
    assert cfg.data.train_data_dir == "pics"


# --- diffusers' names ----------------------------------------------------------------------------------------------

README_COMMANDS = [  # of diffusers' examples/unconditional_image_generation/README.md
    '--dataset_name="huggan/flowers-102-categories" --resolution=64 --center_crop --random_flip '
    '--output_dir="ddpm-ema-flowers-64" --train_batch_size=16 --num_epochs=100 --gradient_accumulation_steps=1 '
    "--use_ema --learning_rate=1e-4 --lr_warmup_steps=500 --mixed_precision=no --push_to_hub",
    '--dataset_name="huggan/pokemon" --resolution=64 --center_crop --random_flip '
    '--output_dir="ddpm-ema-pokemon-64" --train_batch_size=16 --num_epochs=100 --gradient_accumulation_steps=1 '
    "--use_ema --learning_rate=1e-4 --lr_warmup_steps=500 --mixed_precision=no --push_to_hub",
    '--dataset_name="huggan/pokemon" --resolution=64 --center_crop --random_flip '
    '--output_dir="ddpm-ema-pokemon-64" --train_batch_size=16 --num_epochs=100 --gradient_accumulation_steps=1 '
    '--use_ema --learning_rate=1e-4 --lr_warmup_steps=500 --mixed_precision="fp16" --logger="wandb"',
]


@pytest.mark.parametrize("command", README_COMMANDS)
def test_readme_commands_of_train_unconditional(command):
    cfg = load(command.replace('"', "").split(), env={})
    assert cfg.data.dataset_name.startswith("huggan/") and cfg.data.resolution == 64
    assert cfg.data.center_crop and cfg.data.random_flip and cfg.ema.use_ema
    assert cfg.train.num_train_epochs == 100 and batch_plan(cfg, 2).global_batch == 32
    assert cfg.hub.push == ("--push_to_hub" in command)
    assert cfg.train.mixed_precision == ("fp16" if "fp16" in command else "no")
    assert cfg.tracking.report_to == ("wandb" if "wandb" in command else "tensorboard")


SEVERAL = """\
output_dir: out
data: {train_data_dir: pics, resolution: 64}
conditioning:
  kind: several
  class_label: {}
  low_res: {factor: 8}
"""


def several(tmp_path, *options):
    (tmp_path / "several.yaml").write_text(SEVERAL)
    return load(["--config", str(tmp_path / "several.yaml"), *options], env={})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"class_label": cc.LabelCondition(), "low_res": cc.LowResCondition(factor=8)}),
        ("--conditioning.class_label.condition_dropout 0.2",
         {"class_label": cc.LabelCondition(condition_dropout=0.2), "low_res": cc.LowResCondition(factor=8)}),
        ("--conditioning.class_label null --conditioning.low_res.factor 4", {"low_res": cc.LowResCondition(factor=4)}),
        ("--conditioning.low_res null --conditioning.low_res.noise_augmentation 0.1",
         {"class_label": cc.LabelCondition(), "low_res": cc.LowResCondition(noise_augmentation=0.1)}),
        ("--conditioning.size {} --model.kind unet2d_condition --conditioning.dropout_draws independent",
         {"class_label": cc.LabelCondition(), "low_res": cc.LowResCondition(factor=8), "size": cc.SizeCondition()}),
    ],
)  # fmt: skip
def test_sections_of_several_conditions_are_there_if_they_are_given(tmp_path, options, expected):
    cfg = several(tmp_path, *options.split())
    assert cc.conditions(cfg.conditioning) == expected and list(cc.conditions(cfg.conditioning)) == list(expected)
    assert load_text(dump(cfg)) == cfg
    assert cfg.conditioning.dropout_draws == ("independent" if "independent" in options else "joint")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--conditioning.class_label null --conditioning.low_res null", "several needs at least one of class_label"),
        ("--conditioning.low_res.factr 3", "did you mean --conditioning.low_res.factor"),
        ("--conditioning.class_label.null zro", "class_label.null: expected one of index, zero, got 'zro'"),
        ("--conditioning.text.revision x", "conditioning.text.text_encoder: required"),
        ("--conditioning.size {}", "--conditioning.size: conditioning.size: a UNet2DModel has no embedding of sizes"),
        ("--conditioning.low_res.factor 5", "64 must be a multiple of the factor of conditioning low_res, 5: use 65"),
        ("--conditioning.low_res null --data.low_res_column x", "no condition low_res, which would read it"),
        ("--sample.class_labels 1", "drawn by their own captions and classes"),
        ("--condition_dropout 0.2", "conditioning.kind is several, which does not have it"),
        ("--conditioning.kind class_label --conditioning.low_res.factor 2", "conditioning.kind several does"),
    ],
)
def test_mistakes_within_several_conditions(tmp_path, options, message):
    with pytest.raises(ConfigError) as error:
        several(tmp_path, *options.split())
    assert message in str(error.value)


def test_readme_command_with_a_folder():
    cfg = load(["--train_data_dir", "my/pictures", "--resolution=64", "--output_dir=out"], env={})
    assert cfg.data.train_data_dir == "my/pictures"


def test_pretrained_name_selects_its_kind(recipe):
    cfg = load(["--config", recipe, "--pretrained_model_name_or_path=a/b", "--revision=main", "--variant=fp16"], env={})
    assert cfg.model == cc.Pretrained(
        kind="pretrained", pretrained_model_name_or_path="a/b", revision="main", variant="fp16"
    )
    assert load_options("--pretrained_vae_model_name_or_path", "v").space == cc.LatentSpace(kind="latent", vae="v")


def test_optimizer_of_diffusers():
    """Their two choices in any case, the switch for 8 bits, and false that means false (theirs reads it as true)."""
    assert load_options("--optimizer", "AdamW", "--adam_beta1", "0.9").optimizer == c.AdamW(adam_beta1=0.9)
    assert load_options("--optimizer=AdamW", "--use_8bit_adam").optimizer.kind == "adamw_8bit"
    flags = ("--prodigy_beta3", "0.5", "--prodigy_decouple", "False", "--prodigy_safeguard_warmup", "True")
    found = load_options("--optimizer", "prodigy", *flags).optimizer
    assert (found.kind, found.beta3, found.decouple, found.safeguard_warmup) == ("prodigy", 0.5, False, True)
    assert found.learning_rate == 1
    recipe = load_text("output_dir: o\ndata: {resolution: 8}\noptimizer: {kind: lion, beta2: 0.98}\n")
    assert recipe.optimizer == co.Lion(kind="lion", beta2=0.98)


def test_dreambooth_of_diffusers():
    subject = ("--pretrained_model_name_or_path=x", "--instance_data_dir=dogs", "--instance_prompt", "a sks dog")
    plain = load(["--output_dir=o", "--resolution=8", *subject], env={})
    assert (plain.data.train_data_dir, plain.data.instance_prompt, plain.prior) == ("dogs", "a sks dog", None)
    classes = ("--class_data_dir=c", "--class_prompt", "a dog", "--prior_loss_weight=0.5", "--num_class_images=200")
    cfg = load(["--output_dir=o", "--resolution=8", *subject, "--with_prior_preservation", *classes], env={})
    assert cfg.prior == cp.Prior(class_prompt="a dog", class_data_dir="c", weight=0.5, num_class_images=200)
    assert cfg == load(["--output_dir=o", "--resolution=8", *subject, *classes], env={})
    with pytest.raises(ConfigError, match="prior.class_prompt: required"):
        load(["--output_dir=o", "--resolution=8", *subject, "--with_prior_preservation"], env={})


FLAGS = """dataset_name dataset_config_name train_data_dir instance_data_dir class_data_dir cache_dir image_column
caption_column max_train_samples resolution center_crop random_flip image_interpolation_mode preserve_input_precision
dataloader_num_workers repeats train_batch_size proportion_empty_prompts pretrained_model_name_or_path
pretrained_vae_model_name_or_path model_config_name_or_path revision variant non_ema_revision rank lora_alpha
lora_dropout lora_layers lora_unet_blocks use_dora use_blora train_text_encoder train_text_encoder_ti
train_text_encoder_frac train_text_encoder_ti_frac train_transformer_frac token_abstraction
num_new_tokens_per_abstraction initializer_concept enable_t5_ti instance_prompt class_prompt clip_skip
max_sequence_length decoder_only prediction_type snr_gamma noise_offset input_perturbation dream_training
dream_detail_preservation timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin timestep_bias_end
timestep_bias_portion do_edm_style_training with_prior_preservation prior_loss_weight num_class_images
sample_batch_size prior_generation_precision weighting_scheme logit_mean logit_std mode_scale guidance_scale
ddpm_num_steps ddpm_beta_schedule rec_loss kl_scale perceptual_scale disc_start disc_factor disc_scale disc_loss
debug_loss learning_rate text_encoder_lr disc_learning_rate scale_lr lr_scheduler disc_lr_scheduler lr_warmup_steps
lr_num_cycles lr_power num_epochs num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing
max_grad_norm optimizer use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_weight_decay_text_encoder
adam_epsilon prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup set_grads_to_none
seed mixed_precision allow_tf32 enable_xformers_memory_efficient_attention enable_npu_flash_attention cache_latents
upcast_before_saving use_ema offload_ema foreach_ema ema_inv_gamma ema_power ema_max_decay local_rank output_dir
overwrite_output_dir checkpointing_steps checkpoints_total_limit resume_from_checkpoint save_model_epochs logger
report_to logging_dir tracker_project_name validation_prompt validation_prompts num_validation_images
validation_epochs validation_steps validation_image eval_batch_size save_images_epochs ddpm_num_inference_steps
push_to_hub hub_token hub_model_id hub_private_repo""".split()


def test_every_flag_is_accounted_for():
    assert len(set(FLAGS)) == 141
    assert {*RENAMED, *SWITCHES, *REFUSED, *ALREADY} <= set(FLAGS)
    for flag in FLAGS:  # exactly one answer to each: our own name, another name, or a reason
        answers = sum(flag in names for names in (RENAMED, SWITCHES, REFUSED, ALREADY))
        assert (len(LEAVES.get(flag, ())) == 1) + answers == 1, flag


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_is_read_or_refused_with_its_reason(flag):
    try:
        read([*BASE, f"--{flag}=1"], env={})
    except ConfigError as error:
        lines = str(error).splitlines()
    else:
        lines = []
    about = [line for line in lines if line.startswith(f"--{flag}: ")]
    if flag in REFUSED:
        assert about == [f"--{flag}: {REFUSED[flag]}"]
    assert not (about and flag in ALREADY) and not any("no such option" in line for line in lines)


def test_flags_of_documented_commands_that_change_nothing_are_told(caplog):
    flags = {"enable_xformers_memory_efficient_attention": [], "set_grads_to_none": [], "validation_epochs": ["5"]}
    assert flags.keys() == ALREADY.keys()
    words = [word for flag, value in flags.items() for word in (f"--{flag}", *value)]
    assert load([*BASE, *words], env={}) == load(BASE, env={})
    assert [record.getMessage() for record in caplog.records] == [f"--{flag} {ALREADY[flag]}" for flag in flags]


# --- the launcher --------------------------------------------------------------------------------------------------

PRECISION, ACCUMULATION = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


@pytest.mark.parametrize(
    ("options", "env", "precision", "accumulation"),
    [
        ([], {}, "no", 1),
        ([], {PRECISION: "bf16", ACCUMULATION: "4"}, "bf16", 4),
        (["--mixed_precision=fp16"], {PRECISION: "no"}, "fp16", 1),  # the launcher's "no" means unsaid
        (["--mixed_precision=fp16"], {PRECISION: "fp16"}, "fp16", 1),
        (["--gradient_accumulation_steps=2"], {ACCUMULATION: "2"}, "no", 2),
    ],
)
def test_launcher_decides_what_is_open(options, env, precision, accumulation):
    train = load_options(*options, env=env).train
    assert (train.mixed_precision, train.gradient_accumulation_steps) == (precision, accumulation)


def test_launcher_and_config_must_agree():
    cfg = load_options("--mixed_precision=no", "--gradient_accumulation_steps=2")
    with pytest.raises(ConfigError) as caught:
        launch_settings(cfg, {PRECISION: "bf16", ACCUMULATION: "4"})
    assert str(caught.value).splitlines() == [
        "train.mixed_precision: no here, but bf16 from `accelerate launch` (ACCELERATE_MIXED_PRECISION): make them the "
        "same, or leave one out",
        "train.gradient_accumulation_steps: 2 here, but 4 from `accelerate launch` "
        "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS): make them the same, or leave one out",
    ]


@pytest.mark.parametrize(
    ("train", "world", "plan"),
    [
        ({}, 1, (16, 1, 16)),
        ({}, 4, (64, 1, 16)),
        ({"train_batch_size": 2, "gradient_accumulation_steps": 3}, 4, (24, 3, 2)),
        ({"global_batch_size": 96, "gradient_accumulation_steps": 3}, 8, (96, 3, 4)),
        ({"global_batch_size": 8}, 8, (8, 1, 1)),
    ],
)
def test_batch_plan(train, world, plan):
    cfg = replace(load_options(), train=c.Train(**train))
    assert batch_plan(cfg, world) == plan
    assert plan[0] == plan[1] * plan[2] * world


@pytest.mark.parametrize(
    ("total", "accumulation", "world", "choices"),
    [
        (100, 3, 8, "use a global_batch_size of 96 or 120"),
        (96, 5, 8, "use a global_batch_size of 80 or 120, or gradient_accumulation_steps 1, 2, 3, 4, 6, 12"),
        (3, 1, 4, "use a global_batch_size of 4"),
    ],
)
def test_indivisible_batch_names_the_choices(total, accumulation, world, choices):
    train = c.Train(global_batch_size=total, gradient_accumulation_steps=accumulation)
    cfg = replace(load_options(), train=train)
    with pytest.raises(ConfigError) as caught:
        batch_plan(cfg, world)
    assert str(caught.value) == (
        f"train.global_batch_size: {total} images do not split evenly over {world} processes x {accumulation} "
        f"gradient_accumulation_steps: {choices}"
    )
    for size in map(int, re.findall(r"\d+", re.search(r"global_batch_size of ([\d or]+)", choices)[1])):
        batch_plan(replace(cfg, train=replace(train, global_batch_size=size)), world)  # each choice works
    for steps in map(int, re.findall(r"\d+", choices.partition("accumulation_steps")[2])):
        batch_plan(replace(cfg, train=replace(train, gradient_accumulation_steps=steps)), world)


# --- writing -------------------------------------------------------------------------------------------------------

TEXTS = ["no", "1e5", "null", "", " a ", "a: b", "#fff", "[x", "'", '"', "é 🐈 \x85", "12:30", "=", "<<", "true", "1_0",
         "line\nline\n", "\ttab", "-", "~", "2024-01-02", "0o7", ".5", "!x", "&a", "*a", "%", "x" * 300, "\u2028", "\\"]


def random_config(seed):
    rng = random.Random(seed)

    def text():
        return rng.choice(TEXTS)

    def number():
        some = rng.uniform(0.1, 1) * 10.0 ** rng.randint(-300, 300)
        return rng.choice([some, 5e-324, 1.7976931348623157e308, 0.1, 3.0])

    conditioning = rng.choice(
        [
            cc.Unconditional(),
            cc.ClassLabel(kind="class_label", num_classes=rng.choice([None, 7]), condition_dropout=rng.random()),
            cc.PooledText(kind="pooled_text", text_encoder=text(), tokenizer=text(), revision=text()),
            cc.LowRes(kind="low_res", factor=2, noise_augmentation=rng.random()),
            cc.Several(
                kind="several",
                class_label=cc.LabelCondition(null=rng.choice(["index", "zero"]), condition_dropout=rng.random()),
                low_res=rng.choice([None, cc.LowResCondition(factor=2)]),
                dropout_draws=rng.choice(["joint", "independent"]),
            ),
        ]
    )
    prompts = [text() for _ in range(rng.randint(1, 5))] if conditioning.kind == "pooled_text" else ()
    model = rng.choice(
        [
            cc.UNet2D(attention_head_dim=rng.choice([None, 8]), block_out_channels=(32,) * rng.randint(1, 9)),
            cc.Pretrained(kind="pretrained", pretrained_model_name_or_path=text(), subfolder=rng.choice([None, "u"])),
        ]
    )
    return c.TrainConfig(
        output_dir=text(),
        seed=rng.choice([0, 2**63]),
        data=c.Data(resolution=2 * rng.randint(1, 499), dataset_name=rng.choice([None, text()]),
                    center_crop=seed % 2 == 0, caption_column=rng.choice([text(), [text(), text()]]),
                    max_aspect_ratio=number()),
        space=rng.choice([cc.PixelSpace(), cc.LatentSpace(kind="latent", vae=text(), subfolder=text())]),
        conditioning=conditioning,
        model=model,
        sample=c.Sample(prompts=prompts, class_labels=[1, 2] if conditioning.kind == "class_label" else ()),
        optimizer=c.AdamW(learning_rate=number(), adam_beta1=rng.random()),
        train=c.Train(mixed_precision=rng.choice([None, "no", "bf16"]), max_train_steps=rng.choice([None, 5])),
    )


@pytest.mark.parametrize("seed", range(150))
def test_round_trip(seed):
    cfg = random_config(seed)
    assert load_text(dump(cfg)) == cfg


def test_dump_is_plain_yaml_for_others_too():
    loaded = yaml.safe_load(dump(random_config(1)))  # YAML 1.1, as most tools read it
    assert loaded["train"]["mixed_precision"] in (None, "no", "bf16") and "!!" not in dump(random_config(1))
    assert yaml.safe_load(dump(load_options("--mixed_precision=no")))["train"]["mixed_precision"] == "no"


def test_resolved_says_where_every_value_is_from(recipe):
    env = {PRECISION: "no", ACCUMULATION: "2"}
    lines = resolved(read(["--config", recipe, "--seed", "5", "--num_epochs=3"], env=env)).splitlines()
    found = {line.split(":")[0]: [part.strip() for part in line.split(": ", 1)[1].split("  # ")] for line in lines}
    assert found["optimizer.learning_rate"] == ["0.001", f"{recipe}:7"]
    assert found["seed"] == ["5", "--seed"]
    assert found["train.num_train_epochs"] == ["3", "--num_epochs"]
    assert found["train.gradient_accumulation_steps"] == ["2", "launcher"]
    assert found["train.mixed_precision"] == ['"no"', f"{recipe}:4"]
    assert found["data.center_crop"] == ["false", "default"]


def test_schema_describes_every_setting():
    definitions = schema()["$defs"]
    for setting in ALL_SETTINGS:
        if setting.owner in definitions:
            assert definitions[setting.owner]["properties"][setting.leaf]["description"], setting.path
    assert definitions["Prodigy"]["properties"]["learning_rate"]["description"].startswith("Factor of")
    assert definitions["AdamW"]["properties"]["learning_rate"]["description"] == "Peak learning rate."
    assert definitions["TextSequence"]["properties"]["tokenizer"]["description"]
    assert definitions["Data"]["additionalProperties"] is False
    json.dumps(schema())


def test_help_names_every_setting_with_its_text():
    text = help_text("train_unet.py")
    flat = " ".join(text.split())
    for setting in ALL_SETTINGS:
        assert f"--{setting.path}  ({setting.expects}; " in text and setting.help, setting.path
        assert setting.help in flat, setting.path
    for path, sections in SECTIONS.items():
        for section in sections:
            under = "".join(f" of {at}.kind {kind}" for at, kind in section.within)
            depth = len(section.within)
            inside = [s.within[depth:] for s in ALL_SETTINGS if s.within[:depth] == section.within]
            with_settings = {within[0][1] for within in inside if within and within[0][0] == path}
            assert all(f"{path}.kind {kind}{under}: {section.kinds[kind]}" in flat for kind in with_settings)
    assert max(map(len, text.splitlines())) <= 170


def test_config_main(recipe, capsys):
    assert config_main(["--config", recipe], env={}) == 0
    assert load_text(capsys.readouterr().out) == load(["--config", recipe], env={})
    assert config_main(["--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema()))
    assert config_main(["--resolved", "--config", recipe], env={}) == 0
    assert f"{recipe}:10" in capsys.readouterr().out
    assert config_main(["--help"]) == 0
    assert "--data.resolution" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        config_main(["--resolved"], env={})


def test_load_or_exit(capsys):
    assert load_or_exit(BASE, env={}).config == load(BASE, env={})
    with pytest.raises(SystemExit) as stop:
        load_or_exit(["--help"], env={})
    assert stop.value.code == 0 and "--data.resolution" in capsys.readouterr().out
    first, second, of_second_node = {"RANK": "0"}, {"RANK": "1"}, {"RANK": "8", "LOCAL_RANK": "0"}
    for env, lines in [({}, 1), (first, 1), (second, 0), (of_second_node, 0)]:
        with pytest.raises(SystemExit) as stop:
            load_or_exit([*BASE, "--foo", "1"], env=env)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == lines
        assert is_main_process(env) == bool(lines)

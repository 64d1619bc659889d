"""Every mistake gets its own line, with its place and the way out, and all of them are reported at once."""

import subprocess
import sys

import pytest

from finetune.config import TrainConfig
from finetune.config_io import load, load_text
from finetune.config_yaml import MAX_ALIASES, MAX_BYTES, read_mapping
from finetune.errors import ConfigError

GOOD = "output_dir: out\ndata: {train_data_dir: pics, resolution: 64}\n"
BASE = ["--output_dir", "out", "--train_data_dir", "pics", "--resolution", "64"]
UNSET = "but set neither in r.yaml nor on the command line"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(argv, env=None):
    with pytest.raises(ConfigError) as caught:
        load(argv, env=env or {})
    return str(caught.value).splitlines()


def recipe_lines(text, *argv, env=None):
    with open("r.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return lines(["--config", "r.yaml", *argv], env)


# One mistake on line 3 of an otherwise good recipe, and its whole message after "r.yaml:3: ".
RECIPE_MISTAKES = {
    "sede: 1": "sede: no such setting; did you mean seed?",
    "learning_rate: 1e-4": "learning_rate: no such setting; did you mean optimizer.learning_rate?",
    "train: {learning_rate: 1e-4}": "train.learning_rate: no such setting; did you mean optimizer.learning_rate?",
    "train: {num_epochs: 3}": "train.num_epochs: no such setting; did you mean train.num_train_epochs?",
    "optim: {lr: 1}": "optim: no such section; did you mean optimizer?",
    "zzz: {a: 1}": "zzz: no such section",
    "zzz: 1": "zzz: no such setting",
    "model: {up_block_type: [UpBlock2D]}": "model.up_block_type: no such setting; did you mean model.up_block_types?",
    "hub: {hub_token: hf_secret}": (
        "hub.hub_token: no such setting: the token comes from HF_TOKEN or `hf auth login`, never from an option, which "
        "others can read"
    ),
    "optimizer: {learning_rate: abc}": "optimizer.learning_rate: expected a number, got 'abc'",
    "optimizer: {learning_rate: true}": "optimizer.learning_rate: expected a number, got true",
    "optimizer: {learning_rate: null}": "optimizer.learning_rate: expected a number, got nothing (null)",
    "optimizer: {learning_rate: [1]}": "optimizer.learning_rate: expected a number, got [1]",
    "optimizer: {learning_rate: .inf}": "optimizer.learning_rate: expected a finite number, got inf",
    "optimizer: {learning_rate: .nan}": "optimizer.learning_rate: expected a finite number, got nan",
    "optimizer: {learning_rate: 1e999}": "optimizer.learning_rate: expected a finite number, got inf",
    "optimizer: {learning_rate: -1}": "optimizer.learning_rate: must be greater than 0, got -1 (Peak learning rate)",
    "optimizer: {adam_beta2: 1}": "optimizer.adam_beta2: must be below 1, got 1 (Decay of the second moment)",
    "seed: 1.5": "seed: expected a whole number, got 1.5",
    "seed: one": "seed: expected a whole number, got 'one'",
    "seed: false": "seed: expected a whole number, got false",
    "seed: -1": "seed: must be at least 0, got -1 (Seed of every draw)",
    "checkpoint: {checkpoints_total_limit: 1}": (
        "checkpoint.checkpoints_total_limit: must be at least 2, got 1 (Newest checkpoints kept; at least 2, so that "
        "one whole checkpoint exists at any moment)"
    ),
    "model: {dropout: 2}": "model.dropout: must be at most 1, got 2 (Dropout in the residual layers)",
    "model: {block_out_channels: 32}": "model.block_out_channels: expected a list of whole numbers, got 32: write [32]",
    "model: {block_out_channels: [32, x]}": (
        "model.block_out_channels: item 2: expected a whole number, got 'x'"
    ),
    "train: {channels_last: maybe}": "train.channels_last: expected true or false, got 'maybe'",
    "train: {channels_last: 2}": "train.channels_last: expected true or false, got 2",
    "train: {gradient_checkpointing: up_blocks.0}": (
        "train.gradient_checkpointing: expected true or false or a list of texts, got 'up_blocks.0': "
        "write [up_blocks.0]"
    ),
    "train: {compile: block}": "train.compile: expected one of off, unet, blocks, got 'block'; did you mean blocks?",
    "train: {mixed_precision: false}": "train.mixed_precision: expected one of no, fp16, bf16, got false",
    "train: {mixed_precision: bf61}": (
        "train.mixed_precision: expected one of no, fp16, bf16, got 'bf61'; did you mean bf16?"
    ),
    "optimizer: {lr_scheduler: cosin}": (
        "optimizer.lr_scheduler: expected one of linear, cosine, cosine_with_restarts, polynomial, constant, "
        "constant_with_warmup, got 'cosin'; did you mean cosine?"
    ),
    "resume_from_checkpoint: 500": "resume_from_checkpoint: expected text, got 500: put it in quotes",
    "resume_from_checkpoint: #x": (
        "resume_from_checkpoint: expected text, got nothing (null): write a value, in quotes if it begins with #"
    ),
    "tracking: {report_to: 5}": "tracking.report_to: expected text or a list of texts, got 5: put it in quotes",
    "tracking: {report_to: [wandb, 5]}": "tracking.report_to: item 2: expected text, got 5: put it in quotes",
    "sample: {prompts: a cat}": "sample.prompts: expected a list of texts, got 'a cat': write [a cat]",
    "optimizer: 5": "optimizer: expected the settings of this section, got 5",
    "optimizer:": "optimizer: expected the settings of this section, got nothing (null)",
    "space: {kind: latnt}": "space.kind: expected one of auto, pixel, latent, got 'latnt'; did you mean latent?",
    "space: {kind: [a], vae: v}": "space.kind: expected one of auto, pixel, latent, got ['a']",
    "space: {vae: v}": "space.vae: space.kind is auto, which does not have it: space.kind latent does",
    "model: {kind: pretrained, pretrained_model_name_or_path: x, dropout: 0}": (
        "model.dropout: model.kind is pretrained, which does not have it: model.kind unet2d or unet2d_condition does"
    ),
    "optimizer: {lr_scheduler: constant}": (
        "optimizer: lr_scheduler constant has no warm-up, got lr_warmup_steps 500: use constant_with_warmup, or set "
        "lr_warmup_steps to 0"
    ),
    "sample: {prompts: [a cat]}": "sample.prompts: conditioning.kind is none, which takes no prompts: remove them",
    "sample: {num_inference_steps: 2000}": (
        "sample.num_inference_steps: 2000 steps are more than objective.num_train_timesteps 1000"
    ),
}


@pytest.mark.parametrize("text", RECIPE_MISTAKES)
def test_recipe_mistake(text):
    assert recipe_lines(GOOD + text + "\n") == [f"r.yaml:3: {RECIPE_MISTAKES[text]}"]


# One mistake on an otherwise good command line, and the whole message.
OPTION_MISTAKES = {
    "--data.resolutoin 3": "--data.resolutoin: no such option; did you mean --data.resolution?",
    "--resolutoin=3": "--resolutoin: no such option; did you mean --resolution?",
    "--train.learning_rate 1": "--train.learning_rate: no such option; did you mean --optimizer.learning_rate?",
    "--num_epoch 3": "--num_epoch: no such option; did you mean --num_epochs?",
    "--confg x": "--confg: no such option; did you mean --config?",
    "--zzz": "--zzz: no such option",
    "--revison x": "--revison: no such option; did you mean --revision?",
    "--kind latent": (
        "--kind: several settings have this name: --space.kind, --conditioning.kind, --model.kind, --objective.kind, "
        "--objective.loss.kind, --objective.levels.kind, --objective.weighting.kind, --objective.variance.kind, "
        "--optimizer.kind"
    ),
    "--learning_rate abc": "--learning_rate: expected a number, got 'abc'",
    "--learning_rate -1": "--learning_rate: must be greater than 0, got -1 (Peak learning rate)",
    "--learning_rate": "--learning_rate: expected a number, got no value",
    "--learning_rate=": "--learning_rate: expected a number, got nothing (null)",
    "--learning_rate 1 2": "--learning_rate: expected a number, got '1' '2'",
    "--learning_rate [1": "--learning_rate: not valid YAML: expected ',' or ']', but got '<stream end>'",
    "--num_epochs x": "--num_epochs: expected a whole number, got 'x'",
    "--center_crop maybe": "--center_crop: expected true or false, got 'maybe'",
    "--block_out_channels 32 x": "--block_out_channels: item 2: expected a whole number, got 'x'",
    "--ema_max_decay 0.9 0.9": "--ema_max_decay: ema_max_decay names a decay twice: [0.9, 0.9]",
    "--hub_token hf_secret": (
        "--hub_token: the token comes from HF_TOKEN or `hf auth login`, never from an option, which others can read"
    ),
    "--optimizer sgd": (
        "--optimizer: expected one of adamw, adamw_8bit, adafactor, lion, prodigy, schedule_free_adamw, got 'sgd'"
    ),
    "--prodigy_decouple False": (
        "--prodigy_decouple: optimizer.kind is adamw, which does not have it: optimizer.kind prodigy does"
    ),
    "--use_8bit_adam --optimizer prodigy": (
        "--use_8bit_adam: stands for optimizer.kind adamw_8bit, but --optimizer says 'prodigy': give one of them"
    ),
    "--use_8bit_adam 8": (
        "--use_8bit_adam: a switch, which stands for optimizer.kind adamw_8bit: give it without a value"
    ),
    "--optimizer prodigy --learning_rate 1e-4": (
        "--learning_rate: learning_rate 0.0001 is that of another optimizer: prodigy multiplies the step size that it "
        "finds by it. Remove it, which means 1, or tune d_coef"
    ),
    "--optimizer schedule_free_adamw --use_ema": (
        "--use_ema: optimizer.kind schedule_free_adamw averages the weights itself, and that average is sampled and "
        "exported: remove use_ema"
    ),
    "--data 5": "--data: data: expected the settings of this section, got 5",
    "--train {allow_tf32:maybe": (
        "--train: not valid YAML: expected ',' or '}', but got '<stream end>'"
    ),
    "--train {foo:1}": "--train: train.foo:1: no such setting",
    "--train.seed 1": "--train.seed: no such option; did you mean --seed?",
    "--checkpoints_total_limit 1": (
        "--checkpoints_total_limit: must be at least 2, got 1 (Newest checkpoints kept; at least 2, so that one whole "
        "checkpoint exists at any moment)"
    ),
    "--save_images_epochs 1": "--save_images_epochs: counted in optimizer steps here: use sample.sample_every",
    "--space.kind latent": "space.vae: required by space.kind latent, but not set on the command line",
    "--space.vae v": "--space.vae: space.kind is auto, which does not have it: space.kind latent does",
    "--pretrained_model_name_or_path x --model.kind unet2d": (
        "--pretrained_model_name_or_path: model.kind is unet2d, which does not have it: model.kind pretrained does"
    ),
    "--proportion_empty_prompts 0.1": (
        "--proportion_empty_prompts: there is no condition: choose one by conditioning.kind"
    ),
    "--dataset_name x": (
        "--dataset_name: data.dataset_name (x) and data.train_data_dir (pics) both name the data: give one of them"
    ),
    "--lr_scheduler constant": (
        "--lr_scheduler: lr_scheduler constant has no warm-up, got lr_warmup_steps 500: use constant_with_warmup, or "
        "set lr_warmup_steps to 0"
    ),
    "--validation_prompts x": (
        "--validation_prompts: conditioning.kind is none, which takes no prompts: remove them"
    ),
    "--sample.guidance_scale 3": "--sample.guidance_scale: there is no condition to guide with: use 1",
    "--config missing.yaml": "--config: cannot read missing.yaml: No such file or directory",
    "--config .": "--config: cannot read .: Is a directory",
    "--config": "--config: expected one file, once",
    "--config a --config b": "--config: expected one file, once",
    "--global_batch_size 7 --gradient_accumulation_steps 2": (
        "--global_batch_size: 7 images do not split evenly over 1 process x 2 gradient_accumulation_steps: use a "
        "global_batch_size of 6 or 8, or gradient_accumulation_steps 1, 7"
    ),
}


@pytest.mark.parametrize("options", OPTION_MISTAKES)
def test_option_mistake(options):
    assert lines([*BASE, *options.split()]) == [OPTION_MISTAKES[options]]


def test_there_are_enough_mistakes():
    assert len(RECIPE_MISTAKES) + len(OPTION_MISTAKES) > 80


def test_word_that_belongs_to_no_option():
    assert lines(["stray", *BASE]) == ["'stray': not an option; options are --name value"]


def test_nothing_given():
    assert lines([]) == [
        "data.dataset_name: no data: give --dataset_name (a Hub id or a local path) or --train_data_dir (a folder of "
        "images)",
        "output_dir: required, but not set on the command line",
        "data.resolution: required, but not set on the command line",
    ]
    assert recipe_lines("seed: 1") == [
        "data.dataset_name: no data: give --dataset_name (a Hub id or a local path) or --train_data_dir (a folder of "
        "images)",
        f"output_dir: required, {UNSET}",
        f"data.resolution: required, {UNSET}",
    ]


def test_all_mistakes_at_once():
    text = """\
data:
  train_data_dir: pics
  resolutoin: 64
  caption_column: 5
train:
  learning_rate: 1
  max_train_steps: 1.5
optimizer:
  lr_scheduler: constant
  adam_beta1: x
sample:
  num_inference_steps: 2000
  class_labels: [1]
optim:
  lr: 1
"""
    assert recipe_lines(text, "--hub_token=hf_secret", "--num_epochs", "x", "--seed") == [
        "r.yaml:3: data.resolutoin: no such setting; did you mean data.resolution?",
        "r.yaml:4: data.caption_column: expected text or a list of texts, got 5: put it in quotes",
        "r.yaml:6: train.learning_rate: no such setting; did you mean optimizer.learning_rate?",
        "r.yaml:7: train.max_train_steps: expected a whole number, got 1.5",
        "r.yaml:9: optimizer: lr_scheduler constant has no warm-up, got lr_warmup_steps 500: use constant_with_warmup, "
        "or set lr_warmup_steps to 0",
        "r.yaml:10: optimizer.adam_beta1: expected a number, got 'x'",
        "r.yaml:12: sample.num_inference_steps: 2000 steps are more than objective.num_train_timesteps 1000",
        "r.yaml:13: sample.class_labels: conditioning.kind is none, which takes no labels: remove them",
        "r.yaml:14: optim: no such section; did you mean optimizer?",
        "--hub_token: the token comes from HF_TOKEN or `hf auth login`, never from an option, which others can read",
        "--num_epochs: expected a whole number, got 'x'",
        "--seed: expected a whole number, got no value",
        f"output_dir: required, {UNSET}",
    ]


def test_rules_about_what_is_wrong_already_are_not_reported():
    assert recipe_lines(GOOD + "sample: {num_inference_steps: 2000}\nobjective: {num_train_timesteps: x}") == [
        "r.yaml:4: objective.num_train_timesteps: expected a whole number, got 'x'"
    ]
    assert recipe_lines(GOOD + "sample: {prompts: [a]}\nconditioning: {kind: txt, text_encoder: t}") == [
        "r.yaml:4: conditioning.kind: expected one of auto, none, class_label, pooled_text, text, low_res, several, "
        "sdxl, got 'txt'; did you mean text?"
    ]


def test_option_repairs_the_recipe():
    with open("r.yaml", "w") as file:
        file.write(GOOD + "seed: x\nspace: {kind: latnt, vae: v}")
    cfg = load(["--config", "r.yaml", "--seed", "3", "--space.kind", "pixel"], env={})
    assert isinstance(cfg, TrainConfig) and (cfg.seed, cfg.space.kind) == (3, "pixel")


def test_rule_between_file_and_option_is_placed_where_its_cause_is():
    text = GOOD + "conditioning:\n  kind: class_label\n"
    assert recipe_lines(text, "--prompts", "a") == [
        "--prompts: conditioning.kind is class_label, which takes no prompts: remove them"
    ]
    text = GOOD + "conditioning:\n  kind: pooled_text\n  text_encoder: t\n  tokenizer: t\n"
    assert recipe_lines(text) == [
        "r.yaml:4: sample.prompts: conditioning.kind pooled_text needs at least one prompt to sample with"
    ]


def test_launcher_conflict_is_placed():
    env = {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "8"}
    assert recipe_lines(GOOD + "train:\n  mixed_precision: no\n  global_batch_size: 12", env=env) == [
        "r.yaml:4: train.mixed_precision: no here, but bf16 from `accelerate launch` (ACCELERATE_MIXED_PRECISION): "
        "make them the same, or leave one out",
        "r.yaml:5: train.global_batch_size: 12 images do not split evenly over 8 processes x 1 "
        "gradient_accumulation_steps: use a global_batch_size of 8 or 16",
    ]
    assert lines(BASE, {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}) == [
        "train.mixed_precision: ACCELERATE_MIXED_PRECISION is 'fp8', which is none of no, fp16, bf16",
        "train.gradient_accumulation_steps: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 'auto', not a whole number above "
        "0",
    ]


def test_secret_is_never_repeated():
    found = lines([*BASE, "--hub_token", "hf_secret", "--tokn=hf_secret"])
    assert len(found) == 2 and "hf_secret" not in "".join(found)


def test_load_text_needs_no_data_but_the_rest():
    assert load_text("output_dir: out\ndata: {resolution: 8}").data.dataset_name is None
    with pytest.raises(ConfigError) as caught:
        load_text("data: {resolution: 8}", name="c.yaml")
    assert str(caught.value) == "output_dir: required, but not set in c.yaml"


# Texts that are refused before they are values: whole message.
NO_RECIPE = {
    "a: 1\na: 2\nb:\n  c: 1\n  c: 2\n": "f:2: a: given twice, first on line 1\nf:5: c: given twice, first on line 4",
    "": "f:1: expected settings, one `name: value` per line",
    "- 1": "f:1: expected settings, one `name: value` per line",
    "data": "f:1: expected settings, one `name: value` per line",
    "a: 1\n---\nb: 2": "f:2: a second document (`---`): a recipe is one document",
    "a:\n\tb: 1": "f:2: a tab cannot indent or separate in YAML: use spaces",
    "a: 1\nb: [1, 2": "f:2: not valid YAML: expected ',' or ']', but got '<stream end>'",
    "a: 1\nb: @x": "f:2: not valid YAML: found character '@' that cannot start any token",
    "a: 'x": "f:1: not valid YAML: found unexpected end of stream",
    "a: b: c": "f:1: not valid YAML: mapping values are not allowed here",
    "a: 1\nb: \x00": "f:2: not valid YAML: character 0x0 is not allowed",
    "? [1]\n: 2": "f:1: a name must be plain text",
    "a: *b": "f:1: not valid YAML: found undefined alias 'b'",
    "a: !!python/object/apply:os.system [ls]": (
        "f:1: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed: a recipe holds plain values only"
    ),
    "a: !!str 5": "f:1: the tag tag:yaml.org,2002:str is not allowed: a recipe holds plain values only",
    "a: !x 5": "f:1: the tag !x is not allowed: a recipe holds plain values only",
    "a: &a [*a]": "f:1: its aliases expand without bound",
    "a: &x 1\nb: [" + "*x, " * (MAX_ALIASES + 1) + "]": f"f:2: more than {MAX_ALIASES} aliases",
    "a: " + "[" * 21: "f:1: nested deeper than 20 levels",
    "a: " + "[" * 100_000: "f:1: nested deeper than 20 levels",
    "a: " + "x" * MAX_BYTES: "f: larger than 1000 kB, which no configuration is",
    "a: [" + "1," * 100_000 + "]": "f:1: more than 20000 names and values",
    "a: " + "9" * 101: "f:1: a number of more than 100 digits",
}


@pytest.mark.parametrize("text", NO_RECIPE, ids=range(len(NO_RECIPE)))
def test_text_that_is_no_recipe(text):
    with pytest.raises(ConfigError) as caught:
        read_mapping(text, "f")
    assert str(caught.value) == NO_RECIPE[text]


def test_alias_bomb_is_refused_although_it_is_small():
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for this, before in zip("bcdefgh", "abcdefg", strict=True):
        text += f"{this}: &{this} [{', '.join([f'*{before}'] * 10)}]\n"
    with pytest.raises(ConfigError, match="its aliases expand without bound"):
        read_mapping(text, "f")
    assert len(text) < 1000 and text.count("*") < MAX_ALIASES


def test_unreadable_recipe_comes_with_the_mistakes_of_the_options():
    assert recipe_lines("a: 1\na: 2", "--zzz") == ["r.yaml:2: a: given twice, first on line 1", "--zzz: no such option"]
    with open("r.yaml", "wb") as file:
        file.write(b"a: \xff")
    assert lines(["--config", "r.yaml"]) == ["--config: r.yaml is not UTF-8 text"]


def test_script_ends_with_code_2_all_mistakes_and_no_torch():
    code = (
        "import resource, sys\n"
        "from finetune.config_io import load_or_exit\n"
        "try:\n    load_or_exit()\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print(f'{used.ru_utime + used.ru_stime:.2f} s of CPU time')\n"
    )
    run = [sys.executable, "-c", code]
    wrong = subprocess.run([*run, *BASE, "--zzz", "--seed", "x"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.splitlines()) == (
        2,
        ["--zzz: no such option", "--seed: expected a whole number, got 'x'"],
    )
    helped = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--optimizer.learning_rate" in helped.stdout
    print(wrong.stdout, helped.stdout.splitlines()[-1])  # the goal is half a second

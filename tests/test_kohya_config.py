"""sd-scripts' dataset TOML: every key is honoured, compared with our setting, or refused with what replaces it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.config_captions import Captions
from finetune.errors import ConfigError
from finetune.kohya_config import EQUAL, IMAGES, REPLACED, WORDING, read_dataset_config, refuse_differences
from test_data import config

# Every key that sd-scripts' schema (library/config_util.py, version 0.10) knows, with a value that it takes.
KEYS = {
    "image_dir": "pics", "metadata_file": "meta.json", "num_repeats": 3, "caption_extension": ".tags",
    "class_tokens": "a dog", "shuffle_caption": True, "keep_tokens": 2, "keep_tokens_separator": "|||",
    "caption_separator": ";", "caption_prefix": "best", "caption_suffix": "indeed", "caption_tag_dropout_rate": 0.25,
    "resolution": 16, "batch_size": 16, "flip_aug": False, "random_crop": True, "resize_interpolation": "bilinear",
    "caption_dropout_rate": 0.1, "enable_bucket": True, "min_bucket_reso": 512, "max_bucket_reso": 2048,
    "bucket_reso_steps": 32, "bucket_no_upscale": True, "is_reg": True, "alpha_mask": True, "validation_split": 0.1,
    "validation_seed": 1, "enable_wildcard": True, "secondary_separator": ";;;", "token_warmup_min": 2,
    "token_warmup_step": 10, "caption_dropout_every_n_epochs": 2, "color_aug": True, "face_crop_aug_range": [1.0, 2.0],
    "custom_attributes": {"a": 1}, "cache_info": True, "network_multiplier": 0.5, "conditioning_data_dir": "masks",
}  # fmt: skip
SUBSET = ["image_dir", "metadata_file", "is_reg", "alpha_mask", "conditioning_data_dir"]


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)


def written(folder: Path, subset: dict, dataset=None, general=None) -> Path:
    path = folder / "data.toml"
    tables = {"[general]": general or {}, "[[datasets]]": dataset or {}, "[[datasets.subsets]]": subset}
    lines = [line for name, keys in tables.items() for line in (name, *(f"{k} = {toml(v)}" for k, v in keys.items()))]
    path.write_text("\n".join(lines))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_dataset_config(path)
    return str(caught.value)


def test_the_tables_hold_every_key_once():
    tables = [*WORDING, *IMAGES, *EQUAL, *REPLACED]
    assert sorted(tables) == sorted(KEYS)


@pytest.mark.parametrize("key", REPLACED)
def test_a_key_that_is_something_else_here_says_what(key, tmp_path):
    message = refusal(written(tmp_path, {"image_dir": "pics", key: KEYS[key]}))
    assert message.startswith("data.toml:") and f"{key} is " in message and REPLACED[key][1] in message
    line = next(n for n, text in enumerate((tmp_path / "data.toml").read_text().splitlines(), 1) if key in text)
    assert message.startswith(f"data.toml:{line}: ") and len(message.splitlines()) == 1
    if (neutral := REPLACED[key][0]) is not None:
        (subset,) = read_dataset_config(written(tmp_path, {"image_dir": "pics", key: neutral}))
        assert subset.image_dir == "pics"  # what is so anyway may be said


@pytest.mark.parametrize("level", ["subset", "dataset", "general"])
@pytest.mark.parametrize("key", [key for key in (*WORDING, *IMAGES) if key not in SUBSET])
def test_a_key_is_honoured_at_each_level(key, level, tmp_path):
    levels = {"subset": {}, "dataset": {}, "general": {}} | {level: {key: KEYS[key]}}
    levels["subset"] = {"image_dir": "pics"} | levels["subset"]
    (subset,) = read_dataset_config(written(tmp_path, **levels))
    (plain,) = read_dataset_config(written(tmp_path, {"image_dir": "pics"}))
    assert subset != plain
    if key in WORDING:
        assert subset.wording == {WORDING[key]: KEYS[key]} and replace(Captions(), **subset.wording) != Captions()
    else:
        ours = {"num_repeats": ("repeats", 3), "caption_extension": ("extensions", (".tags",))}
        name, value = ours.get(key, (key, KEYS[key]))
        assert getattr(subset, name) == value


def test_the_nearest_table_wins(tmp_path):
    path = written(
        tmp_path, {"image_dir": "pics", "keep_tokens": 1}, {"keep_tokens": 2, "num_repeats": 5}, {"num_repeats": 7}
    )
    (subset,) = read_dataset_config(path)
    assert subset.repeats == 5 and subset.wording == {"keep_tokens": 1}


SAME = {"resolution": 16, "batch_size": 16, "flip_aug": False, "random_crop": True, "resize_interpolation": "bilinear",
        "caption_dropout_rate": 0.1, "enable_bucket": True, "bucket_reso_steps": 4, "min_bucket_reso": 8,
        "max_bucket_reso": 32, "bucket_no_upscale": True, "alpha_mask": True}  # fmt: skip
OTHER = {"resolution": 32, "batch_size": 4, "flip_aug": True, "random_crop": False, "resize_interpolation": "area",
         "caption_dropout_rate": 0.0, "enable_bucket": False, "bucket_reso_steps": 8, "min_bucket_reso": 4,
         "max_bucket_reso": 64, "bucket_no_upscale": False, "alpha_mask": False}  # fmt: skip
BUCKETS = {"buckets": "auto", "bucket_step": 4, "bucket_upscale": False}


def stated(folder: Path, **keys) -> Path:
    """A file that says `keys`, each in a table that may have it."""
    inner = {key: value for key, value in keys.items() if key in SUBSET}
    return written(folder, {"image_dir": "pics", **inner}, {key: keys[key] for key in keys.keys() - inner.keys()})


@pytest.mark.parametrize("key", EQUAL)
def test_a_key_that_is_a_setting_must_agree_with_it(key, tmp_path):
    ours = BUCKETS if "bucket" in key else {"alpha_mask": True} if key == "alpha_mask" else {}
    refuse_differences(config("text", dataset_config=str(stated(tmp_path, **{key: SAME[key]})), **ours))
    path = stated(tmp_path, **{key: OTHER[key]})
    with pytest.raises(ConfigError) as caught:
        refuse_differences(config("text", dataset_config=str(path), **ours))
    message = str(caught.value)
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(key))
    assert message.startswith(f"data.toml:{line}: {key} is ") and f"set {EQUAL[key][0]} to " in message


def test_shapes_of_buckets_are_of_no_account_without_any(tmp_path):
    """As in sd-scripts, where enable_bucket false ignores them; that there are buckets must be agreed on."""
    keys = {key: OTHER[key] for key in EQUAL if "bucket" in key}
    refuse_differences(config(dataset_config=str(stated(tmp_path, **keys))))
    with pytest.raises(ConfigError, match="is true, but data.buckets is 'none': set data.buckets to 'auto'"):
        refuse_differences(config(dataset_config=str(stated(tmp_path, **keys | {"enable_bucket": True}))))


def test_agreement_in_other_words(tmp_path):
    for key, value in (("resolution", [16, 16]), ("resize_interpolation", "linear")):
        refuse_differences(config(dataset_config=str(written(tmp_path, {"image_dir": "pics"}, {key: value}))))
    path = written(tmp_path, {"image_dir": "pics"}, {"resolution": [16, 24]})
    with pytest.raises(ConfigError, match=r"resolution is \[16, 24\], but data.resolution is 16"):
        refuse_differences(config(dataset_config=str(path)))
    path = written(tmp_path, {"image_dir": "pics", "caption_dropout_rate": 0.5})
    refuse_differences(config(dataset_config=str(path)))  # no text is read, so that none is dropped
    cfg = replace(config(dataset_config=str(written(tmp_path, {"image_dir": "pics"}, {"batch_size": 8}))),
                  train={"global_batch_size": 8})  # fmt: skip
    with pytest.raises(ConfigError, match="batch_size is 8, but train.train_batch_size is unset"):
        refuse_differences(cfg)


def test_all_mistakes_at_once_with_lines_and_the_nearest_name(tmp_path):
    (tmp_path / "data.toml").write_text("""
[general]
shuffle_captions = true
[[datasets]]
image_dir = "pics"
  [[datasets.subsets]]
  image_dir = "pics"
  num_repeats = 0
  keep_tokens = "1"
  caption_tag_dropout_rate = 2.0
  [[datasets.subsets]]
  num_repeat = 2
[other]
""")
    assert refusal(tmp_path / "data.toml").splitlines() == [
        "data.toml: other: no such table; there are [general] and [[datasets]]",
        "data.toml:3: shuffle_captions: no such key; did you mean shuffle_caption?",
        "data.toml:5: image_dir: it belongs to [[datasets.subsets]]",
        "data.toml:8: num_repeats is 0: expected a whole number from 1",
        "data.toml:9: keep_tokens is '1': expected a whole number",
        "data.toml:10: caption_tag_dropout_rate is 2.0: Input should be less than or equal to 1",
        "data.toml:12: num_repeat: no such key; did you mean num_repeats?",
        "data.toml: datasets[0].subsets[1] has no image_dir: set it to the folder of its images",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[general", "is not TOML"),
        ("general = 3", "general must be a table"),
        ("datasets = 3", "datasets must be a list of tables"),
        ("", "lists no"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n[[datasets.subsets]]\nimage_dir = "a"', "listed twice"),
        ("\x00", "is not TOML"),
    ],
)
def test_a_file_that_is_none(text, problem, tmp_path):
    (tmp_path / "data.toml").write_text(text)
    assert problem in refusal(tmp_path / "data.toml")
    assert "cannot be read" in refusal(tmp_path / "absent.toml")

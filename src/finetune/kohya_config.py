"""sd-scripts' dataset_config: a TOML file that lists folders of images with their repeats and captions.

A key is honoured, or compared with the setting that it is here (`EQUAL`), or refused with what replaces it unless it
says what holds anyway (`REPLACED`). What a subset does not say, its dataset says, and else [general], as there; what
none of them says is as everywhere here, and not as sd-scripts would have it. Relative paths start in the working
directory, as there.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from finetune.config import TrainConfig
from finetune.config_captions import Captions
from finetune.config_choices import conditions
from finetune.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SIDECARS = (".txt", ".caption")
WORDING = {
    "shuffle_caption": "shuffle",
    "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator",
    "caption_separator": "separator",
    "caption_prefix": "prefix",
    "caption_suffix": "suffix",
    "caption_tag_dropout_rate": "tag_dropout",
}
"""sd-scripts' keys for the settings of `captions`."""
IMAGES = {
    "image_dir": str, "metadata_file": str, "num_repeats": int, "caption_extension": str, "class_tokens": str,
}  # fmt: skip
_FILTERS = {"linear": "bilinear", "cubic": "bicubic"}
EQUAL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "resolution": ("data.resolution", lambda value: value[0] if _square(value) else value),
    "batch_size": ("train.train_batch_size", lambda value: value),
    "flip_aug": ("data.random_flip", lambda value: value),
    "random_crop": ("data.center_crop", lambda value: not value),
    "resize_interpolation": ("data.image_interpolation_mode", lambda value: _FILTERS.get(value, value)),
    "caption_dropout_rate": ("conditioning.condition_dropout", lambda value: value),
    "enable_bucket": ("data.buckets", lambda value: "auto" if value else "none"),
    "bucket_reso_steps": ("data.bucket_step", lambda value: value),
    "min_bucket_reso": ("data.bucket_min_side", lambda value: value),
    "max_bucket_reso": ("data.bucket_max_side", lambda value: value),
    "bucket_no_upscale": ("data.bucket_upscale", lambda value: not value),
    "alpha_mask": ("data.alpha_mask", lambda value: value),
}
"""The setting that a key is here, and the value of that setting which says the same."""
_VALIDATION = "the section validation says so"
_WARMUP, _COLOURS = "captions.tag_dropout leaves out tags all the time", "it is not offered"
REPLACED: dict[str, tuple[Any, str]] = {
    "is_reg": (False, "images for prior preservation are named by prior.class_data_dir"),
    "validation_split": (0.0, _VALIDATION),
    "validation_seed": (0, _VALIDATION),
    "enable_wildcard": (False, "give an image several captions instead: see data.caption_column"),
    "secondary_separator": ("", "write the tags that belong together with another sign between them"),
    "token_warmup_min": (1, _WARMUP),
    "token_warmup_step": (0, _WARMUP),
    "caption_dropout_every_n_epochs": (0, "conditioning.condition_dropout drops a share of all captions"),
    "color_aug": (False, _COLOURS),
    "face_crop_aug_range": (None, _COLOURS),
    "custom_attributes": ({}, "nothing here reads them"),
    "cache_info": (False, "what the check of the data found is remembered anyway"),
    "network_multiplier": (1.0, "it is not offered"),
    "conditioning_data_dir": (None, "ControlNets are not trained here"),
}
"""What a key may say, because it is so anyway, and what there is for everything else."""
_OF_SUBSETS = ("image_dir", "metadata_file", "is_reg", "alpha_mask", "conditioning_data_dir")
_TYPES = {"resolution": (int, list), "flip_aug": (bool,), "random_crop": (bool,), "batch_size": (int,)}
_TYPES |= {"resize_interpolation": (str,), "caption_dropout_rate": (int, float), "shuffle_caption": (bool,)}
_TYPES |= {"keep_tokens": (int,), "keep_tokens_separator": (str,), "caption_separator": (str,)}
_TYPES |= {"caption_prefix": (str,), "caption_suffix": (str,), "caption_tag_dropout_rate": (int, float)}
_TYPES |= {"enable_bucket": (bool,), "bucket_no_upscale": (bool,), "alpha_mask": (bool,)}
_TYPES |= dict.fromkeys(("bucket_reso_steps", "min_bucket_reso", "max_bucket_reso"), (int,))
_TYPES |= {key: (kind,) for key, kind in IMAGES.items()}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}


@dataclass(frozen=True, kw_only=True)
class Subset:
    """A folder of images, as sd-scripts lists it."""

    image_dir: str
    repeats: int = 1
    """How often each image comes in an epoch, from 1."""
    class_tokens: str | None = None
    """The caption of images that have none."""
    extensions: tuple[str, ...] = SIDECARS
    """Of the files that hold captions."""
    metadata_file: str | None = None
    wording: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `captions` that it has instead of the run's."""
    stated: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """By the keys of EQUAL: where it is said, and what."""


@dataclass(frozen=True)
class _Table:
    """One table of the file: its name, its keys, and the lines of these as far as they are known."""

    name: str
    values: dict[str, Any]
    lines: dict[str, int]


def read_dataset_config(path: Path) -> list[Subset]:
    """The subsets of a file, in its order. Raises ConfigError with everything that is wrong, by lines."""
    try:
        text = path.read_text("utf-8-sig")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"data.dataset_config: {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"data.dataset_config: {path} is not TOML: {error}") from None
    lines, problems = _lines_of(text), []
    general = _Table("general", document.pop("general", {}), lines)
    if not isinstance(general.values, dict):
        raise ConfigError(f"{path.name}: general must be a table: write [general]")
    datasets = document.pop("datasets", [])
    problems += [f"{path.name}: {key}: no such table; there are [general] and [[datasets]]" for key in document]
    problems += _refusals(general, path.name)
    subsets: list[Subset] = []
    for number, dataset in enumerate(_tables(datasets, "datasets", path.name, problems)):
        inner = dataset.pop("subsets", [])
        shared = (_Table(f"datasets[{number}]", dataset, lines), general)
        problems += _refusals(shared[0], path.name)
        for place, values in enumerate(_tables(inner, "datasets.subsets", path.name, problems)):
            subset = _Table(f"datasets[{number}].subsets[{place}]", values, lines)
            problems += [*_refusals(subset, path.name), *_missing(subset, path.name)]
            subsets.append(_subset((subset, *shared), path.name, problems))
    if not problems and not subsets:
        problems.append(f"{path.name}: lists no [[datasets.subsets]] with an image_dir")
    if not problems:
        places = Counter((os.path.realpath(subset.image_dir), subset.metadata_file) for subset in subsets)
        problems += [f"{path.name}: image_dir {folder} is listed twice" for (folder, _), n in places.items() if n > 1]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return subsets


def refuse_differences(cfg: TrainConfig) -> None:
    """Raise ConfigError if the file that cfg.data.dataset_config names says other than `cfg` does."""
    if cfg.data.dataset_config is None:
        return
    name, problems = Path(cfg.data.dataset_config).name, []
    for subset in read_dataset_config(Path(cfg.data.dataset_config).expanduser()):
        for key, (place, value) in subset.stated.items():
            for setting, ours in _ours(cfg, EQUAL[key][0]):
                if (wanted := EQUAL[key][1](value)) != ours:
                    remedy = f"set {setting} to {_shown(wanted)}, or take {key} out of {name}"
                    problems.append(f"{place}: {key} is {_shown(value)}, but {setting} is {_shown(ours)}: {remedy}")
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _ours(cfg: TrainConfig, setting: str) -> Iterator[tuple[str, Any]]:
    """What `cfg` says in place of a key, by the full names of the settings; nothing if it is of no account."""
    section, name = setting.split(".")
    if name == "condition_dropout":
        several = cfg.conditioning.kind == "several"
        for kind, part in conditions(cfg.conditioning).items():
            if kind in ("text", "pooled_text"):
                yield f"conditioning.{f'{kind}.' * several}{name}", part.condition_dropout
    elif name == "train_batch_size":
        train = cfg.train
        yield setting, train.train_batch_size or (16 if train.global_batch_size is None else None)
    elif name.startswith("bucket_"):
        if cfg.data.buckets != "none":  # else nobody reads it, here or there
            sides = {"bucket_min_side": cfg.data.shortest_side, "bucket_max_side": cfg.data.longest_side}
            yield setting, sides.get(name, getattr(cfg.data, name))
    else:
        yield setting, getattr(getattr(cfg, section), name)


def _tables(value: Any, name: str, file: str, problems: list[str]) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        return value
    problems.append(f"{file}: {name} must be a list of tables: write [[{name}]]")
    return []


def _subset(tables: tuple[_Table, ...], file: str, problems: list[str]) -> Subset:
    """The subset that its tables, the nearest first, make."""
    said: dict[str, tuple[str, Any]] = {}
    for table in reversed(tables):
        said |= {key: (_place(table, key, file), value) for key, value in table.values.items()}
    values = {key: value for key, (_, value) in said.items() if _fits(key, value)}
    wording = {ours: values[key] for key, ours in WORDING.items() if key in values}
    try:
        TypeAdapter(Captions).validate_python(wording)
    except ValidationError as error:
        of = {ours: key for key, ours in WORDING.items()}
        for one in error.errors():
            key = of[one["loc"][0]]
            problems.append(f"{said[key][0]}: {key} is {_shown(said[key][1])}: {one['msg']}")
    extension = values.get("caption_extension")
    return Subset(
        image_dir=values.get("image_dir", ""),
        repeats=values.get("num_repeats", 1),
        class_tokens=values.get("class_tokens"),
        extensions=SIDECARS if extension is None else (f".{extension.lstrip('.')}",),
        metadata_file=values.get("metadata_file"),
        wording=wording,
        stated={key: said[key] for key in EQUAL if key in values},
    )


def _missing(subset: _Table, file: str) -> Iterator[str]:
    if "image_dir" not in subset.values:
        yield f"{file}: {subset.name} has no image_dir: set it to the folder of its images"


def _refusals(table: _Table, file: str) -> Iterator[str]:
    """What is wrong with the keys of a table."""
    known = {*WORDING, *IMAGES, *EQUAL, *REPLACED}
    if "subsets" not in table.name:
        known -= {*_OF_SUBSETS}
    for key, value in table.values.items():
        place = _place(table, key, file)
        if key not in known:
            only = "it belongs to [[datasets.subsets]]" if key in _OF_SUBSETS else ""
            near = get_close_matches(key, known, 1)
            yield f"{place}: {key}: {only or 'no such key' + (f'; did you mean {near[0]}?' if near else '')}"
        elif key in REPLACED:
            neutral, remedy = REPLACED[key]
            if type(value) is bool and type(neutral) is not bool or value != neutral:
                yield f"{place}: {key} is {_shown(value)}, which is not read: {remedy}; take the key out"
        elif not _fits(key, value):
            yield f"{place}: {key} is {_shown(value)}: expected {_expected(key)}"


def _fits(key: str, value: Any) -> bool:
    if key == "num_repeats" and type(value) is int:
        return value >= 1
    if key == "resolution" and type(value) is list:
        return len(value) == 2 and all(type(side) is int for side in value)
    return key not in _TYPES or type(value) in _TYPES[key]


def _expected(key: str) -> str:
    if key in ("num_repeats", "resolution"):
        return {"num_repeats": "a whole number from 1", "resolution": "a whole number, or two in a list"}[key]
    return " or ".join(_WORDS[kind] for kind in _TYPES[key])


def _square(value: Any) -> bool:
    return isinstance(value, list) and value[0] == value[1]


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else f"{value!r:.80}"


def _place(table: _Table, key: str, file: str) -> str:
    line = table.lines.get(f"{table.name}.{key}")
    return f"{file}:{line}" if line else f"{file}: {table.name}"


def _lines_of(text: str) -> dict[str, int]:
    """The line of each key that is written as `key = value` below the header of its table, by both names."""
    lines, table, dataset, subset = {}, "", -1, -1
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([\w.]+)\s*\]+", line):
            dataset, subset = {
                "datasets": (dataset + 1, -1), "datasets.subsets": (dataset, subset + 1)
            }.get(header[1], (dataset, subset))  # fmt: skip
            table = {"datasets": f"datasets[{dataset}]", "datasets.subsets": f"datasets[{dataset}].subsets[{subset}]"}
            table = table.get(header[1], header[1])
        elif key := re.match(r"""\s*["']?([\w-]+)["']?\s*=""", line):
            lines.setdefault(f"{table}.{key[1]}", number)
    return lines

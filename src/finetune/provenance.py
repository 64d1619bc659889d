"""What a reader needs to judge and repeat a run, and what of it may be shown to others. Imports no torch at import."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import re
import shlex
import sys
from functools import reduce
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

from pydantic import TypeAdapter

from finetune.config import TrainConfig
from finetune.config_io import dump
from finetune.errors import ConfigError
from finetune.pretrained import HUB_ID, commits
from finetune.redaction import secret_in, without_secrets

log = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "datasets", "safetensors", "numpy")

SOURCES = (
    ("data", "dataset_name"),
    ("space", "vae"),
    ("conditioning", "text_encoder"),
    ("conditioning", "tokenizer"),
    ("conditioning", "pipeline"),
    *[("conditioning", of, name) for of in ("pooled_text", "text") for name in ("text_encoder", "tokenizer")],
    ("model", "pretrained_model_name_or_path"),
    ("lora", "pretrained"),
    ("model", "single_file_config"),
    ("sample", "autoguidance"),
)
"""The settings that hold a Hub id or a local path."""

# Two parts or more, or below "~" or a drive: "/n" or "1/2" in a text is no path, and neither is what follows "https:".
_PATH = re.compile(r"""(?<![\w.:/\\~-])(?:(?:[/\\][^\s/\\'":,;<>|]+){2,}|(?:~|[A-Za-z]:)(?:[/\\][^\s/\\'":,;<>|]+)+)""")


def write_run_files(cfg: TrainConfig, **facts: Any) -> None:
    """output_dir/config.yaml, as resolved, and run.json: run_facts and these facts, of JSON types."""
    folder = Path(cfg.output_dir)
    (folder / "config.yaml").write_text(dump(cfg), "utf-8")
    # The name of a class comes from the data, and may be anything.
    (folder / "run.json").write_text(without_secrets(json.dumps(run_facts(cfg) | facts, indent=1)))


def recorded_commits(output_dir: Path) -> dict[str, str]:
    """The commits of the Hub repositories that an earlier start of this run loaded from; none for a fresh one."""
    try:
        return json.loads((output_dir / "run.json").read_text("utf-8")).get("commits", {})
    except FileNotFoundError:
        return {}
    except ValueError:  # cut short by a crash; it is written anew
        log.warning("%s/run.json cannot be read: what is loaded from the Hub is taken as it is today", output_dir)
        return {}


def refuse_secrets(cfg: TrainConfig) -> None:
    """Raises ConfigError if a setting holds a token or key: settings are written, logged and published."""
    found = [f"{path}: contains {kind}" for path, text in _texts(dataclasses.asdict(cfg)) if (kind := secret_in(text))]
    if found:
        raise ConfigError(
            "\n".join(found) + "\nSettings are written to files that may be published: take it out. The Hub's token "
            "comes from `hf auth login` or HF_TOKEN, those of trackers from variables of their own."
        )


def run_facts(cfg: TrainConfig) -> dict[str, Any]:
    """Versions, command, environment and configuration of this process, as JSON types. Names no host and no user.

    "config" is as configured, local paths included: `published_run` gives the form for others.
    """
    import torch

    versions = {name: version(name) for name in PACKAGES}
    return {
        "finetune": version("finetune-unet"),
        "command": command(),
        # torch by its own word, which names the build too: "+cu130"
        "versions": {"python": platform.python_version(), **versions, "torch": str(torch.__version__)},
        "environment": _environment(),
        "commits": commits(),
        "config": dataclasses.asdict(cfg),
    }


def command() -> str:
    """The command of this process, as it may be shown."""
    return redact(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def _environment() -> dict[str, Any]:
    """What the numbers of a run depend on, beside versions and configuration."""
    import torch
    from accelerate import PartialState

    state = PartialState()
    on_gpu = state.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(state.device) if on_gpu else state.device.type,
        "num_processes": state.num_processes,
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "os": platform.system(),
        "machine": platform.machine(),
    }


def redact(text: str) -> str:
    """`text` without tokens and keys, with the working directory as "." and the home directory as "~"."""
    text = without_secrets(text)
    places = {str(Path.cwd()): ".", str(Path.home()): "~"}
    for place in sorted(places, key=len, reverse=True):
        if len(Path(place).parts) > 1:  # "/" is in every path
            text = re.sub(rf"(?<![\w.-]){re.escape(place)}(?![\w.-])", places[place], text)
    return text


def is_local(name: str) -> bool:
    """Whether a setting that holds "a Hub id or a local path" holds a path: it exists, or cannot be an id."""
    return HUB_ID.fullmatch(name) is None or Path(name).exists()


def public_name(name: str) -> str:
    """A Hub id as it is, a file in the Hub's cache as the id it came from, a local path as its last part."""
    if not is_local(name):
        return name
    if cached := re.search(r"(?:models|datasets)--([^/\\]+)", name):
        return cached[1].replace("--", "/")
    return _last_part(name)


def published_config(cfg: TrainConfig) -> TrainConfig:
    """`cfg` for others: local paths are reduced to their last part, everything else is the same."""
    values = dataclasses.asdict(cfg)
    for *sections, name in SOURCES:
        within = reduce(lambda at, section: at.get(section) or {}, sections, values)
        if value := within.get(name):
            within[name] = public_name(value)
    for name in ("train_data_dir", "dataset_config"):
        if value := values["data"][name]:
            values["data"][name] = _last_part(value)
    if cfg.prior:
        values["prior"]["class_data_dir"] = _last_part(cfg.prior.class_data_dir)
    if cfg.cache.folder:
        values["cache"]["folder"] = _last_part(cfg.cache.folder)
    if cfg.resume_from_checkpoint != "latest":
        values["resume_from_checkpoint"] = _last_part(cfg.resume_from_checkpoint)
    values["output_dir"] = _last_part(cfg.output_dir)
    return TypeAdapter(TrainConfig).validate_python(values)


def published_run(run: dict[str, Any], cfg: TrainConfig) -> dict[str, Any]:
    """The content of run.json for others: no path of this machine, no token, and `published_config` as its config."""
    mine, public = _strings(dataclasses.asdict(cfg)), _strings(dataclasses.asdict(published_config(cfg)))
    changed = {path: name for path, name in zip(mine, public, strict=True) if path != name and set(path) & set("/\\")}
    # Longest first, as one may begin another; whole paths only, as "./a" may stand inside of "./ab".
    shortened = [
        (re.compile(rf"(?<![\w.-]){re.escape(path.rstrip('/'))}(?![\w.-])"), changed[path])
        for path in sorted(changed, key=len, reverse=True)
    ]

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        if not isinstance(value, str):
            return value
        for pattern, name in shortened:
            value = pattern.sub(lambda _, name=name: name, value)
        return _PATH.sub(lambda match: _last_part(match[0]), redact(value))

    return clean({**run, "config": {}}) | {"config": dataclasses.asdict(published_config(cfg))}


def _strings(value: Any) -> list[str]:
    """All strings in nested dicts, in order; those in lists are prompts and names of blocks, never paths."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _texts(value: Any, path: str = "") -> list[tuple[str, str]]:
    """(setting, text) of all strings in nested dicts and sequences, names included."""
    if isinstance(value, dict):
        names = [(path or "settings", str(name)) for name in value]
        return names + [found for name, item in value.items() for found in _texts(item, f"{path}.{name}".strip("."))]
    if isinstance(value, list | tuple):
        return [found for item in value for found in _texts(item, path)]
    return [(path, value)] if isinstance(value, str) else []


def _last_part(path: str) -> str:
    """The name at the end of a local path, also of a relative one such as ".", and of a Windows path."""
    return PureWindowsPath(os.path.abspath(os.path.expanduser(path))).name

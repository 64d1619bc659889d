"""Loading frozen and pretrained parts from a local folder or the Hub: safetensors only, float32, no code."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from finetune.config_export import LORA_FILE
from finetune.errors import ConfigError

log = logging.getLogger(__name__)

_COMMITS: dict[str, str] = {}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_source(name: str, *, setting: str, revision: str | None = None) -> str:
    """The local folder or Hub id that `name` stands for; a folder that exists wins over a Hub id of the same name.

    setting: where the name was given, for the message. Raises ConfigError if it can be neither, or if a revision is
    asked of a local folder, which has none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"{setting}: a local folder has no revision, got {revision!r} for {path}: remove it")
        return str(path)
    if path.exists() or not HUB_ID.fullmatch(name):
        raise ConfigError(
            f"{setting}: {name!r} is neither a folder (looked for {path.absolute()}) nor a Hub id such as owner/name: "
            "correct the path or the id"
        )
    return name


def commit_of(
    name: str, *, setting: str, revision: str | None = None, repo_type: Literal["model", "dataset"] = "model"
) -> str:
    """The commit that `revision` (None: main) of a Hub repository is at, asked for once in a process.

    Every file is then taken from that commit: a branch may move while a model is being loaded, or between its parts.
    Without a connection it is the one that was loaded last. Raises ConfigError if there is none.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return revision
    key = f"{'datasets/' * (repo_type == 'dataset')}{name}@{revision or 'main'}"
    if key not in _COMMITS:
        _COMMITS[key] = _asked_for(name, setting, revision, repo_type)
    return _COMMITS[key]


def commits() -> dict[str, str]:
    """ "owner/name@revision", of data sets "datasets/owner/name@revision" -> commit, of all that was loaded from."""
    return dict(_COMMITS)


def pin(known: Mapping[str, str]) -> None:
    """Start anew with these commits, as `commits` gives them: a run goes on with the parts that it began with."""
    _COMMITS.clear()
    _COMMITS.update(known)


def _asked_for(name: str, setting: str, revision: str | None, repo_type: str) -> str:
    from huggingface_hub import resolve_revision

    try:
        return resolve_revision(name, repo_type=repo_type, revision=revision).resolved
    except Exception as error:  # the Hub client, the HTTP library and offline mode share no base class
        at = "" if revision is None else f" at revision {revision}"
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"{setting}: the Hub repository {name}{at} cannot be loaded: {reason}") from error


def load_pretrained(
    cls: type,
    name: str,
    *,
    setting: str,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
) -> Any:
    """cls.from_pretrained(name, ...) in evaluation mode and float32, from safetensors, with every weight accounted for.

    cls: a diffusers or transformers model class. Raises ConfigError if the model is not there, cannot be reached, or
    lacks weights that the class has.
    """
    import diffusers
    import torch
    from safetensors import SafetensorError

    source, options = _place(name, setting=setting, revision=revision, subfolder=subfolder)
    options |= {"variant": variant} if variant is not None else {}
    dtype = "torch_dtype" if issubclass(cls, diffusers.ModelMixin) else "dtype"  # the libraries' names for it
    fixed = {"use_safetensors": True, "output_loading_info": True, dtype: torch.float32}
    try:
        model, report = cls.from_pretrained(source, **fixed, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(cls, source, setting, options, error) from error
    if bad := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ConfigError(
            f"{setting}: {source} does not hold every weight of a {cls.__name__}: {len(bad)} are missing or of another "
            f"shape, such as {bad[0]}: name a folder that does"
        )
    own_memory(model)
    return model.eval()


def own_memory(module: Any) -> None:
    """Copy what a model's tensors hold out of the file that they are mapped from; nothing for other components.

    What is mapped is not aligned as torch aligns, and BLAS may then sum in another order; and a file that is cut short
    while it is mapped ends the process.
    """
    import torch

    if isinstance(module, torch.nn.Module):
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            tensor.data = tensor.data.clone()


def load_tokenizer(name: str, *, setting: str, revision: str | None = None, subfolder: str | None = None) -> Any:
    """The CLIPTokenizer of a local folder or Hub repository. Raises ConfigError if there is none or it is empty."""
    from transformers import CLIPTokenizer

    source, options = _place(name, setting=setting, revision=revision, subfolder=subfolder)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise _not_loaded(CLIPTokenizer, source, setting, options, error) from error
    if len(tokenizer) <= 3:  # transformers makes an empty tokenizer where it finds no vocabulary
        raise ConfigError(f"{setting}: no vocabulary (tokenizer.json, or vocab.json and merges.txt) in {source}")
    return tokenizer


def lora_file(name: str, *, setting: str) -> Path:
    """The LoRA file that `name` stands for: a file, a folder or run that holds one, or a Hub id of such a repository.

    In a folder it is pytorch_lora_weights.safetensors, or the only .safetensors file. Raises ConfigError.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    for folder in (path, path / "pipeline"):
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if (folder / LORA_FILE) in files:
            return folder / LORA_FILE
        if len(files) == 1:
            return files[0]
        if files:
            raise ConfigError(f"{setting}: {folder} holds {len(files)} .safetensors files: name one of them")
    if path.exists() or not HUB_ID.fullmatch(name):
        raise ConfigError(f"{setting}: {name!r} is no LoRA: give a .safetensors file, a folder with one, or a Hub id")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, LORA_FILE, revision=commit_of(name, setting=setting)))
    except (OSError, ValueError) as error:  # what the Hub client raises, from no such file to no connection
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{setting}: the Hub repository {name} gave no {LORA_FILE}: {reason}") from error


def load_model_config(cls: type, name: str, *, setting: str, revision: str | None, subfolder: str | None) -> dict:
    """The config.json of a diffusers model, as a dict. Raises ConfigError if there is none."""
    source, options = _place(name, setting=setting, revision=revision, subfolder=subfolder)
    try:
        return cls.load_config(source, **options)
    except (OSError, ValueError) as error:
        raise _not_loaded(cls, source, setting, options, error) from error


def _place(name: str, *, setting: str, revision: str | None, subfolder: str | None) -> tuple[str, dict[str, str]]:
    """Where to load from, as the libraries' first argument and the keyword arguments beside it."""
    source = resolve_source(name, setting=setting, revision=revision)
    if not Path(source).is_dir():
        options = {"revision": commit_of(name, setting=setting, revision=revision), "subfolder": subfolder}
        return source, {key: value for key, value in options.items() if value is not None}
    # Joined here, because diffusers loads from the folder itself, without a word, where the subfolder is missing.
    folder = Path(source, subfolder or "")
    if not folder.is_dir():
        raise ConfigError(
            f"{setting}: {source} has no folder {subfolder!r}: correct the subfolder, or set it to null if "
            f"{source} itself holds the files"
        )
    return str(folder), {}


def _not_loaded(cls: type, source: str, setting: str, options: dict[str, str], error: Exception) -> ConfigError:
    place = "folder" if Path(source).is_dir() else "Hub repository"
    beside = "".join(f", {key} {value}" for key, value in options.items())
    reason = " ".join(str(error).split())[:400]
    return ConfigError(f"{setting}: no {cls.__name__} could be loaded from the {place} {source}{beside}: {reason}")

"""Frozen models whose weights may stay on the disk: named by their content, loaded when they are needed, put aside."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
from torch import nn

from finetune.durable import write
from finetune.errors import ConfigError
from finetune.pretrained import commit_of, load_pretrained, resolve_source

log = logging.getLogger(__name__)
STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call a file of weights."""


def home() -> Path:
    """Where this toolkit keeps what it need not find out twice; under the home of the Hugging Face caches (HF_HOME)."""
    return Path(datasets.config.HF_CACHE_HOME) / "finetune"


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A frozen model on the disk or the Hub, as a class and a place."""

    cls: type
    """A diffusers or transformers model class."""
    name: str
    """A local folder or a Hub id."""
    setting: str
    """Where it was named, for messages."""
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    device: torch.device | str = "cpu"
    """Where it computes."""

    def load(self) -> nn.Module:
        """The model with its weights in float32, on `device`. Raises ConfigError."""
        place = {"setting": self.setting, "revision": self.revision, "subfolder": self.subfolder}
        return load_pretrained(self.cls, self.name, variant=self.variant, **place).requires_grad_(False).to(self.device)

    def hollow(self) -> nn.Module:
        """The model without its weights (on torch's meta device): its configuration and its names. Raises ConfigError.

        Draws nothing, and takes no memory that counts.
        """
        config = self._config()
        with torch.device("meta"):
            if issubclass(self.cls, diffusers.ModelMixin):
                return self.cls.from_config(config).eval()
            return self.cls(self.cls.config_class.from_dict(config)).eval()

    def fill(self, module: nn.Module, *, why: str) -> None:
        """Give a hollow module its weights, and one that was put aside its device; why: for the log."""
        if _is_hollow(module):
            log.info("%s: %s is loaded (%s)", self.setting, self.name, why)
            for name, part in self.load().named_modules():
                at = module.get_submodule(name)
                at._parameters, at._buffers = part._parameters, part._buffers
        module.to(self.device)

    def put_aside(self, module: nn.Module) -> None:
        """Let the device have the memory of the weights: they wait in that of the host."""
        if not _is_hollow(module):
            module.to("cpu")

    def identity(self) -> str:
        """32 hexadecimal digits: the same for the same weights and configuration, wherever they are.

        Reads every file once, and again only after it changed; loads no model. Raises ConfigError.
        """
        folder = self._folder()
        config = {key: value for key, value in self._config().items() if not key.startswith("_")}
        config.pop("transformers_version", None)
        files = sorted(path for path in folder.glob("*.safetensors") if _is_of(path.name, self.variant))
        if not files:
            raise ConfigError(f"{self.setting}: no weights in safetensors files in {folder}")
        what = (self.cls.__name__, json.dumps(config, sort_keys=True, default=str), [_content(file) for file in files])
        return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()

    def _config(self) -> dict[str, Any]:
        try:
            return json.loads((self._folder() / "config.json").read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self.setting}: the config.json of {self.name} is not JSON: {error}") from None

    def _folder(self) -> Path:
        """The local folder of its files; those of the Hub are downloaded to the Hub's cache, as for loading it."""
        source = resolve_source(self.name, setting=self.setting, revision=self.revision)
        if not Path(source).is_dir():
            source = _snapshot(source, self.setting, self.revision, self.subfolder, self.variant)
        folder = Path(source, self.subfolder or "")
        if not (folder / "config.json").is_file():
            what = f"no {self.cls.__name__} (config.json) in {folder}"
            raise ConfigError(f"{self.setting}: {what}: correct the name or the subfolder")
        return folder


def _is_hollow(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta


def _is_of(name: str, variant: str | None) -> bool:
    """Whether a file holds weights of the variant: such as model.fp16.safetensors, or model.safetensors of none."""
    stem, stems = name.removesuffix(".safetensors"), _stems(variant)
    return any(stem == known or stem.startswith(f"{known}-0") for known in stems)


def _stems(variant: str | None) -> list[str]:
    return [stem if variant is None else f"{stem}.{variant}" for stem in STEMS]


def _snapshot(name: str, setting: str, revision: str | None, subfolder: str | None, variant: str | None) -> str:
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    ends = (".safetensors", "-0*.safetensors", ".safetensors.index.json")
    files = [f"{stem}{end}" for stem in _stems(variant) for end in ends]
    commit = commit_of(name, setting=setting, revision=revision)
    try:
        wanted = [prefix + file for file in ("config.json", *files)]
        return snapshot_download(name, revision=commit, allow_patterns=wanted)
    except Exception as error:  # the Hub client, the HTTP library and offline mode share no base class
        raise ConfigError(f"{setting}: {name} cannot be loaded: {' '.join(str(error).split())[:400]}") from error


def _content(file: Path) -> str:
    """SHA-256 of a file; known without reading it if it has not changed since it was read."""
    file = file.resolve()
    state = file.stat()
    known = (str(file), state.st_size, state.st_mtime_ns, state.st_ino)
    entry = home() / "digests" / hashlib.blake2b(repr(known).encode(), digest_size=16).hexdigest()
    try:
        found = entry.read_text("ascii")
        if len(found) == 64 and int(found, 16) >= 0:
            return found
    except (OSError, ValueError):
        pass  # never read, or half written: read now
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        aside = entry.with_suffix(f".{secrets.token_hex(4)}")
        write(aside, [found.encode()])
        os.replace(aside, entry)
    except OSError as error:
        log.warning("that %s was read through cannot be kept for the next start: %s", file, error)
    return found

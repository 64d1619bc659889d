"""The user's own code that a configuration names: imported if its package is trusted, and called with its params."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.config_levels import Custom


def make(setting: str, cfg: Custom, trust: Collection[str]) -> object:
    """cfg.target(**cfg.params), where `trust` are the packages that may be imported.

    Raises ConfigError, naming the `setting` that cfg is, if the package is not trusted or the call fails.
    """
    module, _, name = cfg.target.rpartition(".")
    package = cfg.target.partition(".")[0]
    if package not in trust:
        raise ConfigError(
            f"{setting}.target: {cfg.target} is code, which a configuration alone cannot have run: if it is yours, "
            f"add --trust {package} to the command; in Python, trust=[{package!r}]"
        )
    try:
        target = vars(importlib.import_module(module)).get(name)
    except Exception as error:
        problem = described(error)
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            problem = (
                f"there is no module {error.name}: put the folder that holds the package on PYTHONPATH (the working "
                "directory is not searched), or install it"
            )
        raise ConfigError(f"{setting}.target: {cfg.target}: {problem}") from error
    # What the package itself has imported, such as subprocess.run, was not written to be named in a configuration.
    is_code = inspect.isclass(target) or inspect.isfunction(target)
    if not is_code or target.__module__.partition(".")[0] != package:
        raise ConfigError(f"{setting}.target: {module} defines no class or function {name} of the package {package}")
    try:
        return target(**deepcopy(cfg.params))
    except Exception as error:
        raise ConfigError(f"{setting}.params: {cfg.target}: {described(error)}") from error


def described(error: Exception) -> str:
    """Kind, message and, if it is a line of the user's, the place of an error whose traceback is not shown."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    at_home = Path(frame.filename).is_file() and Path(frame.filename).parent != Path(__file__).parent
    return f"{type(error).__name__}: {error}" + f" ({frame.filename}:{frame.lineno})" * at_home

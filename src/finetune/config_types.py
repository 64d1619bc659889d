"""The vocabulary of the sections: the frozen section decorator and the number types that settings are made of."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic.dataclasses import dataclass

section = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic would read `true` as 1
        raise ValueError("expected a number")
    return value


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1)]
CountOrZero = Annotated[Int, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
PositiveOrZero = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
Width = Annotated[Float, Field(gt=0, le=12**-0.5)]
Words = tuple[str, ...]


# What is installed with this toolkit can download and run what a recipe names, whoever wrote the recipe.
_NOT_YOURS = frozenset({
    *sys.stdlib_module_names, "finetune", "torch", "torchvision", "accelerate", "diffusers", "transformers", "PIL",
    "huggingface_hub", "safetensors", "pydantic", "yaml", "numpy", "datasets", "tqdm", "matplotlib", "tensorboard",
    "pyarrow", "pandas", "fsspec", "setuptools", "pkg_resources", "pip",
})  # fmt: skip


def check_target(target: str) -> str:
    """The name of a class or function of the user's own package; ValueError for what can be none."""
    if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", target, re.ASCII):
        raise ValueError(f"expected a full name such as my_package.module.MyClass, got {target!r}")
    if (package := target.partition(".")[0]) in _NOT_YOURS:
        raise ValueError(f"{target} is not code of yours: {package} is a part of Python or came with this toolkit")
    return target


def _refuse_nonfinite(params: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        json.dumps(params, allow_nan=False)
    except ValueError:
        raise ValueError("a number in it is not finite") from None
    return params


Target = Annotated[str, AfterValidator(check_target)]
Params = Annotated[dict[str, JsonValue], AfterValidator(_refuse_nonfinite)]

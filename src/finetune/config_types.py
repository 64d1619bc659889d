"""The vocabulary of the sections: the frozen section decorator and the number types that settings are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field
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

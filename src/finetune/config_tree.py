"""The tree of all settings, read off TrainConfig: names, types, choices, help, and the nearest name to a wrong one."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin

from pydantic.dataclasses import is_pydantic_dataclass
from pydantic_core import PydanticUndefined

from finetune.config import TrainConfig

_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "dict": "a mapping"}
_ITEMS = {"str": "texts", "int": "whole numbers", "float": "numbers"}


@dataclass(frozen=True)
class Setting:
    """One value that can be set. `within` are the (section, kind) pairs under which it exists, outermost first."""

    path: str
    help: str
    annotation: object
    default: object
    within: tuple[tuple[str, str], ...] = ()
    owner: str = ""
    """Name of the class whose field it is."""

    @property
    def leaf(self) -> str:
        """Its name without the sections."""
        return self.path.rpartition(".")[2]

    @cached_property
    def types(self) -> dict[str, None]:
        """Names of the Python types it takes, in order; of a choice, the types of its values."""
        parts = _parts(self.annotation)
        return dict.fromkeys(type(part).__name__ if literal else _name(part) for part, literal in parts)

    @cached_property
    def item(self) -> Setting | None:
        """What the items of a list are, or None."""
        lists = [part for part, literal in _parts(self.annotation) if not literal and get_origin(part) is tuple]
        return Setting(self.path, self.help, get_args(lists[0])[0], None) if lists else None

    @cached_property
    def choices(self) -> tuple[object, ...]:
        """The values it can take, if they can be listed."""
        return tuple(part for part, literal in _parts(self.annotation) if literal)

    @property
    def expects(self) -> str:
        """Its type in words, for messages and help."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        words = [
            f"a list of {_ITEMS[next(iter(self.item.types))]}" if name == "tuple" else _WORDS[name]
            for name in self.types
            if name != "NoneType"
        ]
        return " or ".join(words)


@dataclass(frozen=True)
class Section:
    """A group of settings; `kinds` maps each kind to its help text, and is empty where there is no choice."""

    path: str
    help: str
    required: bool
    kinds: dict[str, str]
    default_kind: str | None
    tagged: bool
    """Whether pydantic puts the kind into the location of an error (it does where there are several)."""
    within: tuple[tuple[str, str], ...] = ()
    """The (section, kind) pairs under which it exists."""
    optional: bool = False
    """Whether it is there only if it is given, be it as {}; null takes it away."""


def _parts(annotation: object) -> Iterator[tuple[object, bool]]:
    """The alternatives of a type, as (type or value, whether it is a value)."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    elif origin is Literal:
        yield from ((value, True) for value in get_args(annotation))
    else:
        yield annotation, False


def _name(annotation: object) -> str:
    return (get_origin(annotation) or annotation).__name__


def _walk(cls: type, prefix: str, kinds: tuple[tuple[str, str], ...]) -> Iterator[Setting | Section]:
    """The settings of a section, then its sections and theirs."""
    nested = []
    for name, field in cls.__pydantic_fields__.items():
        path = prefix + name
        members = [part for part, literal in _parts(field.annotation) if not literal and part is not NoneType]
        default = field.get_default(call_default_factory=True)
        if members and all(is_pydantic_dataclass(member) for member in members):
            nested.append((path, field, members, default))
        elif name != "kind" or not prefix:  # a section's kind is yielded with the section, once for all kinds
            yield Setting(path, _help(cls, name), field.annotation, default, kinds, cls.__name__)
    for path, field, members, default in nested:
        by_kind = {_kind_of(member): member for member in members if _kind_of(member)}
        default_kind = None if not by_kind or default in (PydanticUndefined, None) else default.kind
        several = len(members) > 1
        docs = {kind: _doc(member) for kind, member in by_kind.items()}
        text = "" if several else _doc(members[0])
        yield Section(path, text, field.is_required(), docs, default_kind, several, kinds, default is None)
        if by_kind:
            known = PydanticUndefined if default_kind is None else default_kind
            yield Setting(f"{path}.kind", "Which one.", Literal[tuple(by_kind)], known, kinds)
        for member in members:
            under = (*kinds, (path, _kind_of(member))) if by_kind else kinds
            yield from _walk(member, f"{path}.", under)


def _kind_of(cls: type) -> str | None:
    field = cls.__pydantic_fields__.get("kind")
    return get_args(field.annotation)[0] if field else None


def _help(cls: type, name: str) -> str:
    """The text under a field; pydantic does not pass it on to subclasses."""
    fields = (base.__pydantic_fields__.get(name) for base in cls.__mro__ if is_pydantic_dataclass(base))
    return " ".join(next((field.description for field in fields if field and field.description), "").split())


def _doc(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())


SECTIONS: dict[str, list[Section]] = {}
"""Sections by path, outer ones first; several where kinds of the section around them each have their own."""
SETTINGS: dict[str, list[Setting]] = {}
"""Settings by path; several where kinds share a name."""
ALL_SETTINGS: list[Setting] = []
"""The same in the order of the classes, kind by kind."""
for _found in _walk(TrainConfig, "", ()):
    if isinstance(_found, Section):
        SECTIONS.setdefault(_found.path, []).append(_found)
    else:
        SETTINGS.setdefault(_found.path, []).append(_found)
        ALL_SETTINGS.append(_found)
LEAVES: dict[str, list[str]] = {}
"""Paths by their last name; a name with one path may stand alone on the command line."""
_OPTIONAL = {path for path, variants in SECTIONS.items() if variants[0].optional}
_OUTSIDE = {path.rpartition(".")[2] for path in SETTINGS if path.rpartition(".")[0] not in _OPTIONAL}
for _path in SETTINGS:
    _section, _, _leaf = _path.rpartition(".")
    if not (_section in _OPTIONAL and _leaf in _OUTSIDE):  # a name that stands alone means the one outside
        LEAVES.setdefault(_leaf, []).append(_path)


Found = TypeVar("Found", Setting, Section)


def active(variants: Iterable[Found], kinds: Mapping[str, str | None]) -> Found | None:
    """The one of several settings or sections of a path that exists under the chosen kinds, if there is one."""
    return next((one for one in variants if all(kinds.get(at) == kind for at, kind in one.within)), None)


def closest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None if none is much like it."""
    return next(iter(difflib.get_close_matches(name, list(names), 1, 0.7)), None)


def nearest(path: str) -> str | None:
    """The path of the setting that a wrong path most likely means: same name elsewhere, else the most alike."""
    leaf = path.rpartition(".")[2]
    if leaf != "kind" and leaf in LEAVES:
        return closest(path, LEAVES[leaf]) or LEAVES[leaf][0]
    if "." in path and (found := closest(path, SETTINGS)):
        return found
    found = closest(leaf, LEAVES)
    return LEAVES[found][0] if found else None


def help_text(program: str) -> str:
    """Every setting with its type, help and default, by section and kind.

    Written here and not by pydantic-settings, whose help merges the fields of all kinds of a union into one list with
    the first kind's defaults, so that it does not say which kind has what.
    """
    lines = [
        f"usage: {program} [--config RECIPE.yaml] [--section.field VALUE ...]",
        "",
        "The command line wins over the recipe. A field name that occurs once may stand alone (--learning_rate 1e-4).",
        "A true-or-false setting without a value means true; a list takes several values, or [a, b]; null unsets.",
        "A kind chosen on the command line replaces that whole section of the recipe.",
        "The names of diffusers' training scripts (--num_epochs, --push_to_hub, ...) are accepted too.",
        "--trust PACKAGE allows code of yours to be imported that a `kind: custom` names (docs/extending.md).",
        "",
    ]
    titles: set[str] = {""}
    for setting in ALL_SETTINGS:
        title = _title(setting)
        if title not in titles:
            titles.add(title)
            lines += ["", *textwrap.wrap(title, 118, subsequent_indent="  ", break_on_hyphens=False)]
        default = "required" if setting.default is PydanticUndefined else f"default: {_shown(setting.default)}"
        lines.append(f"  --{setting.path}  ({setting.expects}; {default})")
        indent = " " * 6
        lines += textwrap.wrap(
            setting.help, 112, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    return "\n".join(lines) + "\n"


def _title(setting: Setting) -> str:
    """The heading that a setting stands under: its section, or its section and kind."""
    path = setting.path.rpartition(".")[0]
    section = active(SECTIONS.get(path, ()), dict(setting.within))
    if section is None:
        return ""
    under = "".join(f" of {at}.kind {kind}" for at, kind in section.within)
    if setting.leaf == "kind" and section.kinds:
        return f"{path}{under}: " + (f"one of {len(section.kinds)} kinds" if section.tagged else "one kind")
    if setting.within and setting.within[-1][0] == path:
        kind = setting.within[-1][1]
        return f"{path}.kind {kind}{under}: {section.kinds[kind]}"
    return f"{path}{under}: {section.help}"


def _shown(value: object) -> str:
    if value == {}:
        return "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)

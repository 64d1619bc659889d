"""YAML as plain data with line numbers, read and written by the same rules.

The values are those of YAML 1.2: `true` and `false` are the only booleans, so that a bare `no` stays Accelerate's "no",
and `1e-4` is a number; PyYAML's YAML 1.1 gets both wrong. A config may come from the Hub, so tags are refused and
size, depth and aliases are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import yaml

from finetune.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_ALIASES = 100
MAX_VALUES = 20_000  # after aliases are followed: nine aliases of nine aliases of ... pass every other bound

_IMPLICIT = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Keeps the YAML 1.1 resolvers too: a string that either version misreads is written in quotes."""


for _tag, (_pattern, _first) in _IMPLICIT.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


@dataclass(frozen=True)
class Entry:
    """The value of a key, and the line (from 1) that the key stands on. A mapping's value is a dict of entries."""

    value: object
    line: int

    def plain(self) -> object:
        """The value without lines."""
        return {k: e.plain() for k, e in self.value.items()} if isinstance(self.value, dict) else self.value


def read_mapping(text: str, name: str) -> dict[str, Entry]:
    """The settings of a YAML text; ConfigError of `name:line: problem` lines if it is not one plain mapping."""
    node = _compose(text, name)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name}:1: expected settings, one `name: value` per line")
    reader = _Reader(name)
    entries = reader.mapping(node)
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return entries


def plain_mapping(text: str, name: str) -> dict[str, object]:
    """The values that `read_mapping` finds, without lines."""
    return {key: entry.plain() for key, entry in read_mapping(text, name).items()}


def read_value(text: str, name: str) -> object:
    """One value in YAML flow form, such as `1e-4`, `[1, 2]` or `{a: 1}`; ConfigError if it is not valid YAML."""
    reader = _Reader(name)
    value = Entry(reader.value(_compose(text, name)), 1).plain()
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return value


def write_mapping(values: dict) -> str:
    """YAML of nested plain values, which read_mapping reads back exactly."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=float("inf")
    )


def _fail(name: str, mark: yaml.Mark, problem: str) -> NoReturn:
    raise ConfigError(f"{name}:{mark.line + 1}: {problem}")


def _compose(text: str, name: str) -> yaml.Node | None:
    """The checked node graph; the checks run on events, because composing a deep or huge text would be the attack."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES // 1000} kB, which no configuration is")
    try:
        for mark, problem in _dangers(text):
            _fail(name, mark, problem)
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if "'\\t'" in (error.problem or ""):
            _fail(name, mark, "a tab cannot indent or separate in YAML: use spaces")
        _fail(name, mark, f"not valid YAML: {error.problem}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: not valid YAML: character {error.character:#x} is not allowed") from None


def _dangers(text: str) -> Iterator[tuple[yaml.Mark, str]]:
    documents = depth = aliases = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        values += isinstance(event, yaml.NodeEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if documents > 1:
            yield event.start_mark, "a second document (`---`): a recipe is one document"
        if aliases > MAX_ALIASES:
            yield event.start_mark, f"more than {MAX_ALIASES} aliases"
        if values > MAX_VALUES:
            yield event.start_mark, f"more than {MAX_VALUES} names and values"
        if depth > MAX_DEPTH:
            yield event.start_mark, f"nested deeper than {MAX_DEPTH} levels"
        if getattr(event, "tag", None) is not None:  # only nodes have one
            yield event.start_mark, f"the tag {event.tag} is not allowed: a recipe holds plain values only"


class _Reader:
    """Turns nodes into values; duplicate keys are collected, so that all of them are reported."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[str] = []
        self._read = 0

    def value(self, node: yaml.Node | None, depth: int = 1) -> object:
        """The value of a node; mappings inside lists come without lines."""
        if node is None:
            return None
        self._read += 1
        if self._read > MAX_VALUES or depth > MAX_DEPTH:  # an alias inside its own anchor is endlessly deep
            _fail(self.name, node.start_mark, "its aliases expand without bound")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [Entry(self.value(item, depth + 1), 0).plain() for item in node.value]
        return self._scalar(node)

    def mapping(self, node: yaml.MappingNode, depth: int = 1) -> dict[str, Entry]:
        """The entries of a mapping node, in order."""
        entries: dict[str, Entry] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                _fail(self.name, key.start_mark, "a name must be plain text")
            if key.value in entries:
                first = entries[key.value].line
                self.problems.append(f"{self.name}:{line}: {key.value}: given twice, first on line {first}")
            else:
                entries[key.value] = Entry(self.value(value, depth + 1), line)
        return entries

    def _scalar(self, node: yaml.ScalarNode) -> object:
        tag, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() == "true"
        if tag == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if tag == "int":
            if len(text) > 100:
                _fail(self.name, node.start_mark, "a number of more than 100 digits")
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        return text

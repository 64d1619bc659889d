"""The command line as settings: names and values of options, and where each came from.

Read here and not by pydantic-settings, which cannot give what is promised: it stops at the first mistake, prints a page
of usage instead of the mistake, takes no value after a flag (`--center_crop false`) and no list as several words, and
splits text at commas and braces (a prompt "a cat, sleeping" became two, `say "}"` an error).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from finetune.config_flags import ALREADY, REFUSED, RENAMED, SELECTS, SWITCHES
from finetune.config_tree import LEAVES, SECTIONS, SETTINGS, closest, nearest
from finetune.config_types import check_target
from finetune.config_words import show
from finetune.config_yaml import Entry, read_value
from finetune.errors import ConfigError

log = logging.getLogger(__name__)


class Origin(NamedTuple):
    """Where a value was given. `order` sorts messages; `direct`: the text alone names the setting (an option does)."""

    order: tuple[int, int]
    text: str
    direct: bool = False


class Given(NamedTuple):
    """A value and where it was given."""

    value: object
    origin: Origin


UNSET = Origin((2, 0), "")


@dataclass
class Draft:
    """Settings as given so far, and every problem met. `suspect`: settings that a problem is about already."""

    given: dict[str, Given] = field(default_factory=dict)
    problems: list[tuple[tuple[int, int], str]] = field(default_factory=list)
    suspect: set[str] = field(default_factory=set)

    def refuse(self, path: str, problem: str, origin: Origin = UNSET) -> None:
        """Note a problem with the setting `path`, at the place where it was given."""
        names = [name for name in (origin.text, "" if origin.direct else path) if name]
        line = ": ".join([*names, problem])
        if line not in (text for _, text in self.problems):
            self.problems.append((origin.order, line))
        self.suspect.add(path)

    def add(self, entries: dict[str, Entry], origin: Origin, prefix: str = "") -> None:
        """Add nested settings. Their origin is `origin`, in a file (order 0) at the line of each."""
        for key, entry in entries.items():
            path = prefix + key
            here = origin if origin.order[0] else Origin((0, entry.line), f"{origin.text}:{entry.line}")
            if path in SECTIONS:
                optional = any(section.optional for section in SECTIONS[path])
                if isinstance(entry.value, dict):
                    if optional:
                        self.given[path] = Given({}, here)
                    self.add(entry.value, origin, f"{path}.")
                elif optional and entry.value is None:
                    self.given[path] = Given(None, here)
                else:
                    self.refuse(path, f"expected the settings of this section, got {show(entry.plain())}", here)
            elif path in SETTINGS:
                self.given[path] = Given(entry.plain(), here)
            else:
                self.refuse(path, self._unknown(path, section=isinstance(entry.value, dict)), here)

    def _unknown(self, path: str, *, section: bool) -> str:
        if section:
            near = closest(path, SECTIONS)
            return "no such section" + (f"; did you mean {near}?" if near else "")
        leaf = path.rpartition(".")[2]
        if leaf == "trust":
            return "no such setting: only the command line can say whose code may run: --trust my_package"
        if leaf in REFUSED:
            return f"no such setting: {REFUSED[leaf]}"
        near = RENAMED.get(leaf) or nearest(path)
        if near:
            self.suspect.add(near)
        return "no such setting" + (f"; did you mean {near}?" if near else "")


class Option(NamedTuple):
    """`--name` with the words that follow it, at a position of the command line."""

    name: str
    words: list[str]
    position: int

    @property
    def origin(self) -> Origin:
        """Where the option's value was given: at the option."""
        return Origin((1, self.position), f"--{self.name}", direct=True)


def split(argv: Sequence[str], draft: Draft) -> Iterator[Option]:
    """The options of a command line. A word that begins with -- is a name; such a value is given as --name=value."""
    position = 0
    while position < len(argv):
        start, word = position, argv[position]
        position += 1
        if not word.startswith("--"):
            draft.problems.append(((1, start), f"{show(word)}: not an option; options are --name value"))
            continue
        name, equals, value = word[2:].partition("=")
        words = [value] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            words.append(argv[position])
            position += 1
        yield Option(name, words, start)


def read_options(options: Sequence[Option]) -> Draft:
    """The settings that options give; of an option given twice the last counts, as in argparse."""
    draft = Draft()
    for option in options:
        if option.name in ALREADY:
            log.warning("--%s %s", option.name, ALREADY[option.name])
            continue
        path = _path(option, draft) if option.name not in SWITCHES else None
        if path in SECTIONS:
            _add_section(option, path, draft)
        elif path is not None:
            try:
                value = _decode(path, option.words, option.origin.text)
                value = value.lower() if path.endswith(".kind") else value  # diffusers writes --optimizer AdamW
                draft.given[path] = Given(value, option.origin)
            except ConfigError as error:
                draft.refuse(path, str(error), option.origin)
    for option in options:
        if option.name in SELECTS and SELECTS[option.name][0] not in draft.given:
            path, kind = SELECTS[option.name]
            draft.given[path] = Given(kind, option.origin)
        if option.name in SWITCHES:
            _switch(option, draft)
    return draft


def _words(path: str, value: object) -> str:
    return f"{path} {value}" if value else f"the section {path}"


def _switch(option: Option, draft: Draft) -> None:
    path, before, after = SWITCHES[option.name]
    if option.words not in ([], ["true"], ["True"]):
        problem = f"a switch, which stands for {_words(path, after)}: give it without a value"
        draft.refuse(option.name, problem, option.origin)
    elif path in draft.given and draft.given[path].value not in (before, after):
        other = draft.given[path]
        draft.refuse(
            path,
            f"stands for {_words(path, after)}, but {other.origin.text} says {show(other.value)}: give one of them",
            option.origin,
        )
    else:
        draft.given[path] = Given(after, option.origin)


def read_trust(options: Sequence[Option], draft: Draft) -> tuple[str, ...]:
    """The packages whose code may be imported, of `--trust package` options."""
    for option in options:
        if not option.words or not all(word.isidentifier() for word in option.words):
            given = " ".join(map(show, option.words)) or "no value"
            draft.refuse("trust", f"expected the name of your package, without dots, got {given}", option.origin)
    return tuple(dict.fromkeys(word for option in options for word in option.words))


def require_trust(draft: Draft, trust: Sequence[str]) -> None:
    """Refuse each target of the user's own code whose package is not trusted."""
    for path, (target, origin) in list(draft.given.items()):
        section, _, leaf = path.rpartition(".")
        kind = draft.given.get(f"{section}.kind")
        if leaf != "target" or not kind or kind.value != "custom":
            continue
        try:
            package = check_target(target).partition(".")[0]
        except (TypeError, ValueError):
            continue  # which is said of it in any case
        if package not in trust:
            draft.refuse(path, f"{target} is code, which a configuration alone cannot have run: if it is yours, add "
                         f"--trust {package} to the command", origin)  # fmt: skip


def _path(option: Option, draft: Draft) -> str | None:
    """The setting or section that an option names; None, with the problem noted, if it names none."""
    name = option.name
    a_section = name in SECTIONS and option.words[:1] and option.words[0].lstrip().startswith("{")
    if name in SETTINGS or a_section or (name in SECTIONS and name not in RENAMED | REFUSED):
        return name
    if len(LEAVES.get(name, ())) == 1:
        return LEAVES[name][0]
    if name in RENAMED:
        return RENAMED[name]
    if name in REFUSED:
        draft.refuse(name, REFUSED[name], option.origin)
    elif name in LEAVES:
        several = ", ".join(f"--{path}" for path in LEAVES[name])
        draft.refuse(name, f"several settings have this name: {several}", option.origin)
    else:
        alone = [leaf for leaf, paths in LEAVES.items() if len(paths) == 1]
        names = [*alone, *RENAMED, *SWITCHES, *REFUSED, *SECTIONS, "config", "help"]
        near = nearest(name) if "." in name else closest(name, names)
        draft.suspect.update(path for path in (near, RENAMED.get(near), *LEAVES.get(near, ())) if path)
        draft.refuse(name, "no such option" + (f"; did you mean --{near}?" if near else ""), option.origin)
    return None


def _add_section(option: Option, path: str, draft: Draft) -> None:
    try:
        value = read_value(_single(option.words, "a section in braces: {name: value, ...}"), option.origin.text)
    except ConfigError as error:
        draft.refuse(path, str(error).removeprefix(f"{option.origin.text}:1: "), option.origin)
        return
    origin = option.origin._replace(direct=False)
    draft.add({path: _entries(value)}, origin)


def _entries(value: object) -> Entry:
    return Entry({k: _entries(v) for k, v in value.items()} if isinstance(value, dict) else value, 1)


def _single(words: list[str], expects: str) -> str:
    if len(words) != 1:
        raise ConfigError(f"expected {expects}, got " + (" ".join(map(show, words)) or "no value"))
    return words[0]


def _decode(path: str, words: list[str], name: str) -> object:
    """The value that the words after an option stand for; text stays as it is written."""
    settings = SETTINGS[path]  # of several kinds; which one counts is known only when all options are read
    types = {one for setting in settings for one in setting.types}
    if words == ["null"] and "NoneType" in types:
        return None
    if types >= {"bool", "tuple"} and len(words) == 1:  # a word is then not left to pydantic, to which it is a name
        with suppress(ValidationError):
            return TypeAdapter(bool).validate_python(words[0])
    if "tuple" in types and words:
        if len(words) == 1 and words[0].startswith("[") and words[0].endswith("]"):
            return _yaml(words[0], name)
        if len(words) > 1 or "str" not in types:
            items = {one for setting in settings if setting.item for one in setting.item.types}
            return [word if "str" in items else _yaml(word, name) for word in words]
    if "bool" in types and not words:
        return True
    word = _single(words, settings[0].expects)
    return word if "str" in types else _yaml(word, name)


def _yaml(word: str, name: str) -> object:
    try:
        return read_value(word, name)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix(f"{name}:1: ")) from None

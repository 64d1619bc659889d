"""A TrainConfig from a recipe and the command line, and back: every mistake at once, each at its place. No torch.

Precedence: recipe < command line; `accelerate launch` decides what both leave open.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from pydantic import TypeAdapter, ValidationError

from finetune.config import TrainConfig
from finetune.config_launch import ACCUMULATION, PRECISION, batch_plan, launch_settings
from finetune.config_options import UNSET, Draft, Option, Origin, read_options, read_trust, require_trust, split
from finetune.config_tree import ALL_SETTINGS, SECTIONS, SETTINGS, Setting, active, closest, help_text
from finetune.config_words import merged, show, word
from finetune.config_yaml import MAX_BYTES, read_mapping, write_mapping
from finetune.errors import ConfigError, FinetuneError
from finetune.redaction import shown

_ADAPTER = TypeAdapter(TrainConfig)


@dataclass(frozen=True)
class Loaded:
    """A config, for each setting that was given the place: `recipe.yaml:12`, `--option` or `launcher`; and trust."""

    config: TrainConfig
    origins: dict[str, str]
    trust: tuple[str, ...] = ()
    """The packages whose code the command line allows to be imported."""


def load(argv: Sequence[str], *, env: Mapping[str, str] = os.environ) -> TrainConfig:
    """The config of a command line such as ["--config", "recipe.yaml", "--learning_rate", "1e-4"], for training.

    A kind chosen on the command line drops the recipe's settings of that section if they are of another kind. env is
    the launcher's: precision, accumulation and WORLD_SIZE. ConfigError lists all mistakes, one per line.
    """
    return read(argv, env=env).config


def read(argv: Sequence[str], *, env: Mapping[str, str] = os.environ, to_run: bool = False) -> Loaded:
    """As load, with the origin of every setting. to_run: refuse code of the user's own that is not trusted."""
    draft = Draft()
    options = list(split(argv, draft))
    over = read_options([option for option in options if option.name not in ("config", "trust")])
    trust = read_trust([option for option in options if option.name == "trust"], draft)
    draft.problems += over.problems
    draft.suspect |= over.suspect
    try:
        name, entries = _recipe([option for option in options if option.name == "config"])
    except ConfigError as error:  # without the recipe nothing can be said of what is missing
        raise ConfigError("\n".join([str(error), *_lines(draft)])) from None
    draft.add(entries, Origin((0, 0), name))
    _override(draft, over)
    _require_data(draft)
    if to_run:
        require_trust(draft, trust)
    place = f"set neither in {name} nor" if name else "not set"
    return replace(_launched(_validate(draft, f"{place} on the command line"), draft, env), trust=trust)


def load_text(text: str, *, name: str = "config.yaml") -> TrainConfig:
    """The config of a YAML text alone, such as the one saved with a run; the data may be left open."""
    draft = Draft()
    draft.add(read_mapping(text, name), Origin((0, 0), name))
    return _validate(draft, f"not set in {name}")


def dump(cfg: TrainConfig) -> str:
    """YAML of every setting, such that load_text(dump(cfg)) == cfg exactly."""
    return write_mapping(_kind_first(asdict(cfg)))


def _kind_first(values: dict) -> dict:
    """Nested settings in their order, but for the kind of a section, which says what the others mean."""
    nested = {name: _kind_first(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {"kind": nested["kind"], **nested} if "kind" in nested else nested


def schema() -> dict:
    """JSON schema of a recipe, for editors; the descriptions are the texts under the fields."""
    result = _ADAPTER.json_schema()
    for setting in ALL_SETTINGS:  # pydantic does not pass descriptions on to subclasses
        if setting.owner in result["$defs"]:
            result["$defs"][setting.owner]["properties"][setting.leaf].setdefault("description", setting.help)
    return result


def resolved(loaded: Loaded) -> str:
    """One line per setting: its value, and where that came from (a place in a file, an option, launcher, default)."""
    values = {path: json.dumps(value, ensure_ascii=False) for path, value in _leaves(asdict(loaded.config))}
    rows = [(f"{path}: {value}", loaded.origins.get(path, "default")) for path, value in values.items()]
    width = min(max(len(row) for row, _ in rows), 70)
    return "".join(f"{row:<{width}}  # {origin}\n" for row, origin in rows)


def config_main(argv: Sequence[str], *, env: Mapping[str, str] = os.environ) -> int:
    """`finetune config`: checks a recipe and options and prints them as YAML, with their origins (--resolved), or
    prints the schema (--schema) or all settings (--help)."""
    words = list(argv)
    if "--help" in words or "-h" in words:
        print("finetune config [--schema | --resolved] checks a recipe and prints what it comes to.\n")
        print(help_text("finetune config"), end="")
    elif "--schema" in words:
        print(json.dumps(schema(), indent=2))
    elif "--resolved" in words:
        words.remove("--resolved")
        print(resolved(read(words, env=env)), end="")
    else:
        print(dump(load(words, env=env)), end="")
    return 0


def load_or_exit(argv: Sequence[str] | None = None, *, env: Mapping[str, str] = os.environ) -> Loaded:
    """read, to run it, for a script: --help prints the settings and exits with 0, mistakes exit with 2."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--help" in words or "-h" in words:
        if is_main_process(env):
            print(help_text(os.path.basename(sys.argv[0])), end="")
        raise SystemExit(0)
    try:
        return read(words, env=env, to_run=True)
    except ConfigError as error:
        raise SystemExit(report(error, env=env)) from None


def report(error: FinetuneError, *, env: Mapping[str, str] = os.environ) -> int:
    """Print an error's message to stderr, on the main process only; returns its exit code."""
    if is_main_process(env):
        print(shown(str(error)), file=sys.stderr)
    return error.exit_code


def is_main_process(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of all nodes, by the launcher's environment (before torch is imported)."""
    return env.get("RANK", env.get("LOCAL_RANK", "0")) == "0"


def _lines(draft: Draft) -> list[str]:
    return [line for _, line in sorted(draft.problems, key=lambda problem: problem[0])]


def _recipe(options: Sequence[Option]) -> tuple[str | None, dict]:
    """Name and entries of the file that --config names; (None, {}) without one."""
    if not options:
        return None, {}
    if len(options) > 1 or len(options[0].words) != 1:
        raise ConfigError("--config: expected one file, once")
    name = options[0].words[0]
    try:
        with open(name, encoding="utf-8-sig") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config: cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config: {name} is not UTF-8 text") from None
    return name, read_mapping(text, name)


def _override(draft: Draft, over: Draft) -> None:
    """Put options over the recipe; a section whose kind they change loses what the recipe gave for the old kind."""
    kinds: dict[str, object] = {}
    for path, variants in SECTIONS.items():
        if section := active(variants, kinds):
            before, chosen = draft.given.get(f"{path}.kind"), over.given.get(f"{path}.kind")
            kinds[path] = before.value if before else section.default_kind
            if chosen and chosen.value != kinds[path]:
                kinds[path] = chosen.value
                draft.given = {name: given for name, given in draft.given.items() if not name.startswith(f"{path}.")}
            if path in over.given and over.given[path].value is None:  # an optional section that null takes away
                draft.given = {at: given for at, given in draft.given.items() if not f"{at}.".startswith(f"{path}.")}
    draft.given |= over.given


def _require_data(draft: Draft) -> None:
    """From Python a data set can be handed over; a command line has to name one."""
    names = ("data.dataset_name", "data.train_data_dir", "data.dataset_config")
    given = [draft.given[name].value for name in names if name in draft.given]
    if all(value is None for value in given) and draft.suspect.isdisjoint((*names, "data")):
        draft.refuse(
            names[0], "no data: give --dataset_name (a Hub id or a local path) or --train_data_dir (a folder of images)"
        )


def _validate(draft: Draft, otherwise: str) -> TrainConfig:
    """The config of a draft; ConfigError with all problems, the draft's and those found here.

    Rules between settings are checked by TrainConfig only when every value is valid by itself. So a bad value is
    reported and left out, and the rest is checked again; a rule that names what was left out is not reported.
    `otherwise` says of a required setting where it is not set.
    """
    kinds = _choose_kinds(draft)
    chosen = {path: active(variants, kinds) for path, variants in (SECTIONS | SETTINGS).items()}
    _refuse_other_kinds(draft, chosen, kinds)
    values = {path: given.value for path, given in draft.given.items()}
    for _ in range(len(SECTIONS) + 3):  # the values, the rules of each section, the rules between sections
        try:
            config = _ADAPTER.validate_python(_nest(values, kinds))
            break
        except ValidationError as error:
            for path, item, one in merged(error.errors(include_url=False)):
                setting = None if path in SECTIONS else chosen.get(path)
                if one["type"] == "missing":
                    _refuse_missing(draft, setting, otherwise)
                    values[path] = _stand_in(setting)
                elif setting:
                    _refuse_value(draft, setting, item, one)
                    values.pop(path, None)
                else:
                    _refuse_rules(draft, word(one, None), path)
                    values = {at: value for at, value in values.items() if not at.startswith(f"{path}.")}
    if draft.problems:
        raise ConfigError("\n".join(_lines(draft)))
    return config


def _choose_kinds(draft: Draft) -> dict[str, str | None]:
    """The kind of each section that has kinds: as given, else its default; None, with the problem noted, if wrong."""
    kinds: dict[str, str | None] = {}
    for path, variants in SECTIONS.items():
        section = active(variants, kinds)
        if section is None or not section.kinds:
            continue
        given = draft.given.pop(f"{path}.kind", None)
        choices = ", ".join(section.kinds)
        kinds[path] = given.value if given else section.default_kind
        if given and given.value not in list(section.kinds):
            near = closest(str(given.value), section.kinds)
            hint = f"; did you mean {near}?" if near else ""
            draft.refuse(f"{path}.kind", f"expected one of {choices}, got {show(given.value)}{hint}", given.origin)
            kinds[path] = None
        elif kinds[path] is None and section.required:
            draft.refuse(f"{path}.kind", f"required: one of {choices}")
        elif given:
            draft.given[f"{path}.kind"] = given
    return kinds


def _refuse_other_kinds(draft: Draft, chosen: Mapping[str, Setting | None], kinds: Mapping[str, str | None]) -> None:
    """Take out settings that the chosen kinds do not have; of a section whose kind is wrong, without a word."""
    for path, given in list(draft.given.items()):
        if chosen[path]:
            continue
        del draft.given[path]
        variants = SETTINGS.get(path) or SECTIONS[path]
        for section, _ in variants[0].within:  # the outermost section whose kind has no such setting
            fitting = [setting for setting in variants if dict(setting.within)[section] == kinds.get(section)]
            if not fitting:
                break
            variants = fitting
        owners = " or ".join(dict.fromkeys(dict(setting.within)[section] for setting in variants))
        if kinds.get(section) is not None:
            draft.refuse(
                path, f"{section}.kind is {kinds[section]}, which does not have it: {section}.kind {owners} does",
                given.origin,
            )


def _nest(values: Mapping[str, object], kinds: Mapping[str, str | None]) -> dict:
    """Values by path as the nested mapping that pydantic takes; a section without a kind gets the chosen one."""
    root: dict = {}
    starts = [f"{path}." for path, (one, *_) in SECTIONS.items() if one.required and not one.within]
    for path, value in [*((start, None) for start in starts), *values.items()]:
        *sections, leaf = path.split(".")
        at, inner = "", root
        for name in sections:
            at = f"{at}.{name}" if at else name
            inner = inner.setdefault(name, {"kind": kinds[at]} if kinds.get(at) else {})
        if leaf and path in SECTIONS:  # an optional one that is given, or taken away
            inner.update({} if value is None else {leaf: inner.get(leaf, {})})
        elif leaf:
            inner[leaf] = value
    return root


def _refuse_missing(draft: Draft, setting: Setting, otherwise: str) -> None:
    names = setting.path.split(".")
    if draft.suspect.isdisjoint(".".join(names[: n + 1]) for n in range(len(names))):
        by = " by " + ", ".join(f"{at}.kind {kind}" for at, kind in setting.within) if setting.within else ""
        draft.refuse(setting.path, f"required{by}, but {otherwise}")


def _stand_in(setting: Setting) -> object:
    """A valid value for a required setting that is missing, so that the rest can be checked."""
    if setting.choices:
        return setting.choices[0]
    return "stand.in" if "str" in setting.types else [] if "tuple" in setting.types else 1


def _refuse_value(draft: Draft, setting: Setting, item: int | None, error: dict) -> None:
    problem = word(error, setting.item if item is not None and setting.item else setting)
    where = "" if item is None else f"item {item + 1}: "
    if setting.path in draft.given:  # and not a stand-in
        draft.refuse(setting.path, where + problem, draft.given[setting.path].origin)


def _refuse_rules(draft: Draft, text: str, section: str = "") -> None:
    """Note the broken rules that the lines of `text` name, each where a setting that it is about was given."""
    suspect = set(draft.suspect)
    if not section and any(f"{path}.kind" in suspect for path in SECTIONS):
        return  # what fits together cannot be said while a kind is unknown
    for line in text.splitlines():
        path, colon, problem = line.partition(": ")
        if not colon or path not in SETTINGS and path not in SECTIONS:
            path, problem = section, line
        names = [path]
        for name in re.findall(r"[a-z0-9_]+(?:\.[a-z0-9_]+)*", line):
            names += [name, f"{section}.{name}"]
        if any(name == one or name.startswith(f"{one}.") for name in names for one in suspect):
            continue
        owner = next((name for name in names if name in draft.given), None)
        origin = draft.given[owner].origin if owner else UNSET
        if owner and owner != path and not owner.startswith(f"{path}."):
            origin = origin._replace(direct=False)
        draft.refuse(path, problem, origin)


def _launched(config: TrainConfig, draft: Draft, env: Mapping[str, str]) -> Loaded:
    """The config with the launcher's part decided, and the batch checked against the number of processes."""
    decided = config
    try:
        decided = launch_settings(config, env)
    except ConfigError as error:
        _refuse_rules(draft, str(error))
    try:
        batch_plan(decided, int(env.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        _refuse_rules(draft, str(error))
    if draft.problems:
        raise ConfigError("\n".join(_lines(draft)))
    origins = {path: given.origin.text for path, given in draft.given.items() if given.value is not None}
    for path, variable in (("train.mixed_precision", PRECISION), ("train.gradient_accumulation_steps", ACCUMULATION)):
        if variable in env and env[variable] != "no":
            origins.setdefault(path, "launcher")
    return Loaded(decided, origins)


def _leaves(values: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if prefix + name in SECTIONS and value is not None:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

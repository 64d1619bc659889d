"""pydantic's validation errors in plain words, placed at the settings they are about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from finetune.config_tree import SECTIONS, Setting, closest

_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def place(location: Iterable[str | int]) -> tuple[str, int | None]:
    """The setting or section that an error location means, and the item of its list; ("", None) is the whole config.

    Left out are what pydantic adds: the kind of a section, and the branch of a union such as "str".
    """
    path, item, tag_next = "", None, False
    for part in location:
        if isinstance(part, int):
            item = part
        elif tag_next:
            tag_next = False
        elif not path or path in SECTIONS:
            path = f"{path}.{part}" if path else part
            tag_next = path in SECTIONS and SECTIONS[path][0].tagged
    return path, item


def show(value: object) -> str:
    """A value as the user would write it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def word(error: dict, setting: Setting | None) -> str:
    """One pydantic error as words that say what is expected and what was given."""
    kind, value = error["type"], error.get("input")
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        return f"expected {setting.expects}, got {show(value)}" if setting and text == "expected a number" else text
    if kind in _LIMITS and setting:
        relation, limit = _LIMITS[kind]
        return f"must be {relation} {error['ctx'][limit]}, got {value} ({setting.help.rstrip('.')})"
    if kind == "finite_number":
        return f"expected a finite number, got {value}"
    if setting and error["msg"].startswith("Input should be"):
        return f"expected {setting.expects}, got {show(value)}{_remedy(setting, value)}"
    return error["msg"][:1].lower() + error["msg"][1:]


def _remedy(setting: Setting, value: object) -> str:
    if setting.choices:
        near = closest(str(value), map(str, setting.choices))
        return f"; did you mean {near}?" if near else ""
    if "str" in setting.types and isinstance(value, (bool, int, float)):
        return ": put it in quotes"
    if "str" in setting.types and value is None:
        return ": write a value, in quotes if it begins with #"
    if "tuple" in setting.types and not isinstance(value, (list, dict)) and value is not None:
        return f": write [{value}]"
    return ""


def merged(errors: Iterable[dict]) -> Iterator[tuple[str, int | None, dict]]:
    """(path, item, error), one per mistake: a union reports one per branch, of which one about an item says most."""
    by_path: dict[str, list[tuple[str, int | None, dict]]] = {}
    for error in errors:
        path, item = place(error["loc"])
        by_path.setdefault(path, []).append((path, item, error))
    for found in by_path.values():
        yield from [one for one in found if one[1] is not None] or found[:1]

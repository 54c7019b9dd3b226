"""All that a config may say, as Markdown: what `mergefront options` prints, and CONFIG.md.

Read from where keys are declared: sections and their fields, components and their keyword-only parameters with what
their docstrings say of them. A new component so needs nothing here.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from docstring_parser import parse, parse_from_object
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from evo.components import built_by, options_of
from evo.config import Component, Config
from evo.merge import METHODS, Knob, get_method
from fitness.types import Decoding

_INTRODUCTION = """# What a config may say

Printed by `mergefront options`. Sections are keys at the top of the file; all but `parents`, `task` and `budget` may be
left out. README.md has an example.
"""
_METHODS = """## Merge methods

Of `space.method`, and of rules in recipes. `space: {knobs: {density: 0.5}}` sets a knob, `{density: [0.1, 0.9]}`
searches it, and `density:NAME` is one donor's, where a knob is per donor.
"""


@dataclass(frozen=True)
class _Key:
    name: str
    default: str
    meaning: str


def reference() -> str:
    """The reference of all sections, in the order of Config."""
    plain, sections = [], []
    for key in _fields(Config):
        section = Config.model_fields[key.name].annotation
        if inspect.isclass(section) and (issubclass(section, BaseModel) or is_dataclass(section)):
            sections.append("\n".join(_section(key.name, section)))
        else:
            plain.append(key)
    return "\n".join([_INTRODUCTION, *_table(plain), "", "\n\n".join([*sections, "\n".join(_methods())]), ""])


def _section(name: str, section: type) -> Iterator[str]:
    yield from (f"## `{name}`", "", _first(section.__doc__), "")
    yield from _table(_fields(section) if issubclass(section, BaseModel) else _dataclass_fields(section))
    if issubclass(section, Component):
        for kinds, keys in _components(section.kinds):
            what = _first(importlib.import_module(section.kinds[kinds[0]].partition(":")[0]).__doc__)
            yield from ("", f"### `{name}: {{kind: {' | '.join(kinds)}}}`", "", what, "")
            yield from _table(keys) if keys else ["No options."]
        if name == "engine":
            yield from ("", "### `engine: {decoding: {...}}`", "", _first(Decoding.__doc__), "")
            yield from _table(_dataclass_fields(Decoding))


def _components(table: Mapping[str, str]) -> Iterator[tuple[list[str], list[_Key]]]:
    """Kinds that one class builds, and their options."""
    found: dict[Any, list[str]] = {}
    for kind in table:
        found.setdefault(built_by(pkgutil.resolve_name(table[kind])), []).append(kind)
    for built, kinds in found.items():
        said = _arguments(built)
        parameters = options_of(built).values()
        defaults = [_shown(MISSING if p.default is p.empty else p.default) for p in parameters]
        yield kinds, [_Key(p.name, d, said.get(p.name, "")) for p, d in zip(parameters, defaults, strict=True)]


def _methods() -> Iterator[str]:
    yield from (_METHODS, "| method | what it does | knobs: default (range) |", "|---|---|---|")
    for name, place in METHODS.items():
        what = _first(importlib.import_module(place.partition(":")[0]).__doc__)
        knobs = ", ".join(f"`{knob}` {_range(k)}" for knob, k in get_method(name).knobs.items())
        yield f"| `{name}` | {_cell(what)} | {knobs} |"


def _range(knob: Knob) -> str:
    if (knob.low, knob.high, knob.step) == (0.0, 1.0, 1.0):
        return f"{knob.default:g} (0 or 1)"
    return f"{knob.default:g} ({knob.low:g} to {knob.high:g}{', per donor' if knob.per_donor else ''})"


def _fields(section: type[BaseModel]) -> list[_Key]:
    said, found = _arguments(section), []
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        found.append(_Key(name, _shown(MISSING if default is PydanticUndefined else default), said.get(name, "")))
    return found


def _dataclass_fields(section: type) -> list[_Key]:
    said = _arguments(section)
    return [
        _Key(f.name, _shown(f.default if f.default_factory is MISSING else f.default_factory()), said.get(f.name, ""))
        for f in fields(section)
    ]


def _arguments(described: Any) -> dict[str, str]:
    """What docstrings say of parameters and attributes."""
    parsed = parse_from_object(described) if inspect.isclass(described) else parse(inspect.getdoc(described) or "")
    return {name: p.description or "" for p in parsed.params for name in p.arg_name.split(", ")}


def _shown(default: Any) -> str:
    if default is MISSING:
        return "*needed*"
    said = isinstance(default, bool | int | float | str | list | tuple | dict) and default != ()
    return f"`{json.dumps(default)}`".replace('"', "") if said else ""


def _table(keys: list[_Key]) -> list[str]:
    rows = [f"| `{key.name}` | {_cell(key.default)} | {_cell(key.meaning)} |" for key in keys]
    return ["| key | default | |", "|---|---|---|", *rows]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _first(docstring: str | None) -> str:
    """The first paragraph."""
    return " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())

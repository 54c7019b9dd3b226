"""A recipe: everything that is needed to build one merged model, as plain data.

The only currency between a search and weights: soups, long2short averaging and R1T-Chimera are recipes
in a file, not classes. Knows nothing of tensors or of how a method works; it names them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import ConfigDict, Strict, TypeAdapter

from search_spaces.layout import Layout, Part, Role

RECIPE_VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")
"""That a recipe may ask for."""
LARGEST = 3.4e38
"""Magnitude of a coefficient or knob."""

_Number = Annotated[float, Strict()]
_Index = Annotated[int, Strict()]
_NO_OTHER_KEYS = ConfigDict(extra="forbid")

Cell = tuple[Role, int | None, int | None]
"""Role, block and expert of parts."""
Site = tuple[Role, int | None]
Sites = Mapping[Site, Collection[int | None]]
"""Role and block -> the experts there; None for what belongs to no expert."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that a recipe draws from."""

    __pydantic_config__: ClassVar = _NO_OTHER_KEYS

    path: str
    """Folder of the checkpoint, or its id on the Hub."""
    digest: str | None = None
    """Content digest, or None where nobody has computed it yet."""
    revision: str | None = None
    """Commit of a checkpoint from the Hub."""
    rests_on: str | None = None
    """Of an adapter: the source that it changes, if not Recipe.footing."""

    @property
    def place(self) -> str:
        """Folder or id, with the commit: "org/name@revision"."""
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class Rule:
    """How the parts that it selects are merged.

    A selector that is None selects everything. Blocks select parts inside blocks only; a rule for roles
    that live outside all blocks (embedding, head, last norm) leaves `blocks` at None or names -1.
    """

    __pydantic_config__: ClassVar = _NO_OTHER_KEYS

    method: str
    """Name of a merge method, e.g. "linear"."""
    coefficients: Mapping[str, _Number]
    """Source name -> coefficient."""
    roles: tuple[Role, ...] | None = None
    blocks: tuple[_Index, ...] | None = None
    """Block indices; -1 stands for the parts outside all blocks."""
    experts: tuple[_Index, ...] | None = None
    """Routed-expert indices; a rule that names experts selects nothing else."""
    tensors: tuple[str, ...] | None = None
    """Names of tensors, with * for any characters, e.g. "*.q_proj.weight", where roles are too coarse."""
    knobs: Mapping[str, _Number] = field(default_factory=dict)
    """Further arguments of the method, as "density", or as "density:DONOR" for one donor."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", _floats("coefficient of", self.coefficients))
        object.__setattr__(self, "knobs", _floats("knob", self.knobs))

    def cells(self, sites: Sites) -> Iterator[Cell]:
        """The addresses of a layout that this rule selects."""
        for role, block in self._sites(sites):
            there = sites[role, block]
            for expert in there if self.experts is None else self.experts:
                if expert in there:
                    yield role, block, expert

    def _sites(self, sites: Sites) -> Iterable[Site]:
        if self.roles is None or self.blocks is None:
            return filter(self._selects, sites)
        wanted = ((role, _block(index)) for role in self.roles for index in self.blocks)
        return (site for site in wanted if site in sites)

    def _selects(self, site: Site) -> bool:
        role, block = site
        return (self.roles is None or role in self.roles) and (
            self.blocks is None or (-1 if block is None else block) in self.blocks
        )


@dataclass(frozen=True)
class Recipe:
    """One merged model.

    Of several rules that select a part, the first in the list merges it. A part that no rule selects
    is copied from `base`.
    """

    __pydantic_config__: ClassVar = _NO_OTHER_KEYS

    sources: Mapping[str, Source]
    base: str
    """The source that unselected parts are copied from, and that methods call their base model."""
    interface: str
    """The source whose tokenizer, chat template, stop tokens, config and generation config the child gets."""
    rules: tuple[Rule, ...] = ()
    seed: _Index = 0
    """Seed of the random masks of methods that draw any; one per search, so that masks stay put."""
    vocabulary: str = "same"
    """"common" lets vocabularies differ by added and padded rows (see evo.vocabulary)."""
    dtype: str | None = None
    """What the merge is stored in, and sources may differ in: "float32", "float16" or "bfloat16"; None: each tensor in
    its own, which is that of all sources."""
    chat_template: str | None = None
    """The child's, as Jinja's text; None: that of the interface."""

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, or none, got {self.dtype!r}")
        if self.vocabulary not in ("same", "common"):
            raise ValueError(f"vocabulary: expected 'same' or 'common', got {self.vocabulary!r}")
        named = {self.base, self.interface}.union(*(rule.coefficients for rule in self.rules))
        named |= {source.rests_on for source in self.sources.values() if source.rests_on is not None}
        if missing := sorted(named - set(self.sources)):
            raise ValueError(
                f"no source is called {' or '.join(map(repr, missing))}: expected one of {', '.join(self.sources)}"
            )

    def assign(self, layout: Layout) -> dict[Part, Rule | None]:
        """Give every part of a layout its rule, or None for a copy of the base."""
        return assign(self.rules, layout)

    @property
    def footing(self) -> str:
        """The source that adapters rest on which do not say so: the one called base, or else the base."""
        return "base" if "base" in self.sources else self.base

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in a recipe file."""
        return {
            "version": RECIPE_VERSION,
            "base": self.base,
            "interface": self.interface,
            "seed": self.seed,
            **({} if self.vocabulary == "same" else {"vocabulary": self.vocabulary}),
            **({"dtype": self.dtype} if self.dtype else {}),
            **({"chat_template": self.chat_template} if self.chat_template is not None else {}),
            "sources": {name: _drop_none(vars(source)) for name, source in self.sources.items()},
            "rules": [_rule_to_dict(rule) for rule in self.rules],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of to_dict.

        Raises:
            ValueError: if the version is unknown.
            pydantic.ValidationError: a ValueError that knows all places where something is wrong.
        """
        if data.get("version") != RECIPE_VERSION:
            raise ValueError(f"expected a recipe of version {RECIPE_VERSION}, got {data.get('version')!r}")
        return _FROM_DATA.validate_python({key: value for key, value in data.items() if key != "version"})

    def to_yaml(self) -> str:
        """The text of a recipe file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=110)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Inverse of to_yaml; reads with the safe loader only."""
        return cls.from_dict(yaml.safe_load(text))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the recipe's canonical JSON, paths left out where a content digest is known."""
        data = self.to_dict()
        data["sources"] = {
            name: (s.digest or s.path) + (f" on {s.rests_on}" if s.rests_on else "") for name, s in self.sources.items()
        }
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def assign(rules: Sequence[Rule], layout: Layout) -> dict[Part, Rule | None]:
    """Give every part the first rule that selects it. Linear in parts + rules, but for rules that name tensors."""
    sites: dict[Site, dict[int | None, None]] = {}
    for role, block, expert in dict.fromkeys(part.cell for part in layout.parts):
        sites.setdefault((role, block), {})[expert] = None
    rule_of: dict[Cell, Rule] = {}
    by_name: dict[Part, Rule] = {}
    for rule in rules:
        selected = rule.cells(sites)
        if rule.tensors is None:
            for cell in selected:
                rule_of.setdefault(cell, rule)
            continue
        chosen, named = set(selected), _matcher(rule.tensors)
        for part in layout.parts:
            if part.cell in chosen and part.cell not in rule_of and part not in by_name and named(part.tensor):
                by_name[part] = rule
    return {part: by_name.get(part, rule_of.get(part.cell)) for part in layout.parts}


def _matcher(patterns: tuple[str, ...]) -> Callable[[str], object]:
    return re.compile("|".join(map(fnmatch.translate, patterns))).match


def _floats(what: str, numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers, numpy's too, as recipe files can hold them."""
    for name, number in numbers.items():
        if not isinstance(number, Real) or not abs(number) <= LARGEST:
            raise ValueError(f"{what} {name}: expected a number that float32 has, got {number!r}")
    return {name: float(number) for name, number in numbers.items()}


def _block(index: int) -> int | None:
    return None if index == -1 else index


def _drop_none(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    data: dict[str, Any] = {"method": rule.method, "coefficients": dict(rule.coefficients)}
    if rule.roles is not None:
        data["roles"] = [str(role) for role in rule.roles]
    if rule.blocks is not None:
        data["blocks"] = list(rule.blocks)
    if rule.experts is not None:
        data["experts"] = list(rule.experts)
    if rule.tensors is not None:
        data["tensors"] = list(rule.tensors)
    if rule.knobs:
        data["knobs"] = dict(rule.knobs)
    return data


_FROM_DATA = TypeAdapter(Recipe)

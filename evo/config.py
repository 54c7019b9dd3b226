"""The configuration of a run: its shape, its defaults, and errors that name the place in the file.

Validated whole before anything is loaded. Knows no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)

from evo.errors import did_you_mean
from evo.merge import METHODS, get_method
from evo.optimizers import OPTIMIZERS
from fitness.engines import ENGINES
from fitness.orderliness import Orderliness
from fitness.proxy import ESTIMATORS
from fitness.tasks import TASKS
from fitness.types import Seed
from search_spaces import SPACES


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the place and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Component(BaseModel):
    """A `kind` out of a table, and options that the component's own signature decides."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kinds: ClassVar[Mapping[str, str]]
    """The table: name -> "module:attribute"."""
    what: ClassVar[str]
    """What errors call one."""

    kind: str

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        return _known(value, cls.kinds, cls.what)

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the fields that this class declares."""
        return dict(self.model_extra or {})


def _known(name: str, table: Mapping[str, Any], what: str) -> str:
    if name not in table:
        raise ValueError(f"no {what} is called {name!r}: expected one of {', '.join(table)}{did_you_mean(name, table)}")
    return name


class SpaceConfig(Component):
    """What may vary. Further keys are options of the space."""

    kinds, what = SPACES, "search space"

    kind: str = "block"
    """Which parts of the model share genes."""
    method: str = "linear"
    """What merges them; see the merge methods."""
    base: str | None = None
    """The model that coefficients start from. Default: for methods on task vectors the common ancestor (`base:`
    at the top), else the last parent."""
    donors: list[str] | None = None
    """Default: every parent except the base."""
    bounds: tuple[FiniteFloat, FiniteFloat] = (0.0, 1.0)
    """Smallest and largest coefficient."""
    knobs: dict[str, float | tuple[float, float]] = Field(default_factory=dict)
    """Further arguments of the method, "density" or "density:DONOR": a number is fixed, a pair is searched
    between the two, with a gene for every group of parts."""

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known(value, METHODS, "merge method")

    @field_validator("bounds")
    @classmethod
    def _bounds(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError(f"expected [low, high] with low < high, got {list(value)}")
        return value

    @field_validator("knobs", mode="before")
    @classmethod
    def _knobs(cls, value: Any) -> Any:
        for name, knob in value.items() if isinstance(value, dict) else ():
            numbers = knob if isinstance(knob, list | tuple) and len(knob) == 2 else [knob]
            if not all(isinstance(number, int | float) for number in numbers):
                raise ValueError(f"{name}: expected a number, or [low, high] to search between, got {knob!r}")
        return value


class TaskConfig(Component):
    """What models are scored on. Further keys are options of the task."""

    kinds, what = TASKS, "task"

    kind: str
    """Where problems come from."""


class EngineConfig(Component):
    """What generates. Further keys are options of the engine."""

    kinds, what = ENGINES, "engine"

    kind: str = "transformers"
    """What runs the model."""
    max_tokens: int = Field(1024, ge=1)
    """Longest answer; a longer one is cut off and counts as wrong."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; default all. With another number attention in float32 is rounded otherwise."""


class OptimizerConfig(Component):
    """What proposes. Further keys are options of the optimizer."""

    kinds, what = OPTIMIZERS, "optimizer"

    kind: str = "nsga2"
    """The algorithm."""


class Constraints(_Section):
    """What a candidate must keep to be feasible."""

    max_truncated: float = Field(0.1, ge=0, le=1)
    """Largest share of answers cut off by max_tokens."""
    accuracy_floor_stderrs: float = Field(2.0, ge=0)
    """A candidate's accuracy must reach the worst parent's minus this many of that parent's standard errors."""


class Baselines(_Section):
    """Plain merges that are evaluated first, and counted in the budget."""

    average: bool = True
    """The mean of all parents."""
    line_points: int = Field(0, ge=0, le=1000)
    """Interior points of the line between two parents; the middle one is no other than their average."""
    swaps: bool = False
    """For each set of roles that the space tells apart: these from the donor and the rest from the base, as
    R1T-Chimera took routed experts, and the other way round. Optimizers start from the best of all baselines."""


def _plain_number(value: Any) -> Any:
    """2e9, which YAML takes for a text, as `--budget` reads it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_Count = Annotated[int, BeforeValidator(_plain_number)]


class Budget(_Section):
    """When a search ends: at whichever limit comes first."""

    candidates: _Count | None = Field(None, ge=1)
    """Evaluated models, parents and baselines included."""
    tokens: _Count | None = Field(None, ge=1)
    """Generated tokens on the search split."""
    hours: FiniteFloat | None = Field(None, gt=0)
    """Time spent evaluating on the search split, over all sittings."""

    @model_validator(mode="after")
    def _some_limit(self) -> Budget:
        if not self.model_dump(exclude_none=True):
            raise ValueError("expected at least one of candidates, tokens, hours")
        return self


class ProxyConfig(_Section):
    """Spares candidates of the search problems; parents and baselines, which it learns from, are asked all of them.

    Three line points among the baselines are enough to learn from; more cost more than they tell.
    """

    enabled: bool = False
    """Off by default, since it has to learn from baselines."""
    screen: int = Field(4, ge=0)
    """A candidate is dead whose answers to the first so many problems all loop up to the token limit; those that no
    parent or baseline could end do not count. 0 looks at none."""
    likelihood: bool = False
    """A candidate that finds the parents' correct answers as unlikely as noise is dead. Needs log-probabilities."""
    race: bool = True
    """Whether a candidate stops when one member of the front is certain to be no worse in any objective."""
    alpha: float = Field(0.1, gt=0, lt=1)
    """How likely, at most, a candidate is stopped that beats every member by the tolerance."""
    tolerance: float = Field(0.01, ge=0, lt=1)
    """Differences that are worth no full evaluation, as a share of the hypervolume's box in each objective."""
    chosen: int = Field(32, ge=0)
    """Problems that are asked first because parents and baselines differ on them; the others come by lot."""
    gain: float = Field(2e-5, ge=0, lt=1)
    """All are parked after the first look, told by their estimates; one goes on later, the most promising first, while
    a gain of this share of the hypervolume's box is expected of it. 0 parks nobody: all race to the end."""
    estimator: str = "kriging"
    """What a stopped or parked candidate is estimated by: "kriging" or "irt" (item response theory)."""

    @field_validator("estimator")
    @classmethod
    def _estimator(cls, value: str) -> str:
        return _known(value, ESTIMATORS, "estimator")


class Tracking(_Section):
    """Where MLflow keeps what it is told. Safe to change between sittings."""

    enabled: bool = True
    """Whether MLflow is told anything."""
    uri: str | None = None
    """Of a server or a store. Default: a sqlite store inside the run folder."""
    experiment: str = "mergefront"
    """Name of the experiment that the run is filed under."""


class Memory(_Section):
    """Where what is merged lives between candidates."""

    residency: Literal["auto", "device", "pinned", "disk"] = "auto"
    """Where the tensors of base and donors live: on the engine's device, in pinned host memory, or on disk; see
    evo.residency. Safe to change between sittings: bits are the same."""
    deltas: str = "exact"
    """How differences of donors to the base are held while searching: "exact", "int8", "int4" or "low_rank(RANK)". What
    would be a member of the front is scored again with the donors themselves."""


class Config(_Section):
    """One search."""

    parents: dict[str, Path] = Field(min_length=2)
    """Name -> checkpoint folder, relative to the config file, or "org/name" or "org/name@revision" on the Hub."""
    base: Path | None = None
    """The common ancestor of the parents, where there is one; called "base" in recipes."""
    interface: str | None = None
    """The parent (or base) whose tokenizer, chat template, stop tokens, config and generation config children get.
    Default: the first parent."""
    vocabulary: Literal["same", "common"] = "same"
    """Whether parents may have tokens and rows of embeddings of their own: "common" merges the rows that all have
    and takes the others from the interface parent."""
    space: SpaceConfig = Field(default_factory=SpaceConfig)
    task: TaskConfig
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig.model_validate({}))
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    objectives: tuple[Literal["error", "tokens"], ...] = ("error", "tokens")
    """What is minimised: the share of wrong answers, the mean tokens of an answer, or both."""
    constraints: Constraints = Field(default_factory=lambda: Constraints.model_validate({}))
    orderliness: Orderliness = Field(default_factory=Orderliness)
    """What counts as repetition and as self-correction in the figures beside accuracy and tokens."""
    proxy: ProxyConfig = Field(default_factory=lambda: ProxyConfig.model_validate({}))
    baselines: Baselines = Field(default_factory=lambda: Baselines.model_validate({}))
    budget: Budget
    seed: Seed = 0
    """Of the optimizer, of random masks, and of what is drawn while decoding."""
    memory: Memory = Field(default_factory=lambda: Memory.model_validate({}))
    tracking: Tracking = Field(default_factory=Tracking)

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value not in (("error", "tokens"), ("error",), ("tokens",)):
            raise ValueError(f"expected [error, tokens], [error] or [tokens], got {list(value)}")
        return value

    @field_validator("interface")
    @classmethod
    def _is_known(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is not None and (parents := info.data.get("parents")):
            _known(name, {**parents, **({"base": None} if info.data.get("base") else {})}, "parent")
        return name

    @model_validator(mode="after")
    def _names_agree(self) -> Config:
        if "base" in self.parents:
            raise ValueError("parents: 'base' is the name of the common ancestor; call this parent something else")
        if "knee" in self.parents:
            raise ValueError("parents: 'knee' is a pick of the front; call this parent something else")
        if bad := [name for name in self.parents if not name.isidentifier()]:
            raise ValueError(f"parents: expected plain names (letters, digits, _), got {bad}")
        if taken := [name for name in self.parents if name == "average" or re.fullmatch(r"c\d+", name)]:
            raise ValueError(f"parents: {', '.join(taken)}: candidates are called so; call this parent something else")
        for name in [*([self.space.base] if self.space.base else []), *(self.space.donors or [])]:
            _known(name, self.sources, "source")
        if len(set(self.space_donors)) < len(self.space_donors):
            raise ValueError(f"space: expected each donor once, got {', '.join(self.space_donors)}")
        if self.space_base in self.space_donors:
            raise ValueError(f"space: {self.space_base!r} cannot be both the base and a donor")
        if not self.space_donors:
            raise ValueError("space: expected at least one donor besides the base")
        return self

    @property
    def sources(self) -> dict[str, Path]:
        """Every checkpoint that a recipe may name: the parents, then the ancestor."""
        return {**self.parents, **({"base": self.base} if self.base else {})}

    @property
    def interface_parent(self) -> str:
        """Name of the interface parent."""
        return self.interface or next(iter(self.parents))

    @property
    def space_base(self) -> str:
        """Name of the source that coefficients start from."""
        if self.space.base:
            return self.space.base
        from_ancestor = self.base is not None and get_method(self.space.method).from_ancestor
        return "base" if from_ancestor else list(self.parents)[-1]

    @property
    def space_donors(self) -> tuple[str, ...]:
        """Names of the sources that get genes."""
        return tuple(self.space.donors or (name for name in self.parents if name != self.space_base))


SAFE_KEYS = ("budget", "tracking", "engine.threads", "memory.residency")
"""Keys that may differ when a run goes on; any other would make its results incomparable."""
MOVABLE_KEYS = ("parents", "base")
"""Keys that say where checkpoints are. Their content is checked by itself, and the order of parents, too: the first is
the interface, the last what coefficients start from, unless the config says otherwise.
"""


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe every key, except the safe ones, that differs between two dumped configs."""
    old = Config.model_validate(old).model_dump(mode="json")  # keys that are new since then have their default
    before, after = ({**dict(_flatten(config)), "the order of parents": [*config["parents"]]} for config in (old, new))
    return [
        f"{key}: {before.get(key, '(not set)')!r} when the run started, {after.get(key, '(not set)')!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not _is_in(key, SAFE_KEYS)
        and not (_is_in(key, MOVABLE_KEYS) and before.get(key) and after.get(key))
    ]


def _is_in(key: str, sections: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

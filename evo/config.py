"""The configuration of a run: its shape, its defaults, and errors that name the place in the file.

Validated whole before anything is loaded. Knows no torch.
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from evo.hub import HubError, locate
from evo.merge import METHODS, get_method
from evo.optimizers import OPTIMIZERS
from evo.places import at, line_numbers
from fitness.engines import ENGINES, what_is_missing
from fitness.orderliness import Orderliness
from fitness.proxy import ESTIMATORS
from fitness.tasks import TASKS
from search_spaces import SPACES


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the place and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Component(BaseModel):
    """A `kind` out of a table, and options that the component's own signature decides."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the fields that this class declares."""
        return dict(self.model_extra or {})


def _known(name: str, table: Mapping[str, Any], what: str) -> str:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no {what} is called {name!r}: expected one of {', '.join(table)}{hint}")
    return name


class SpaceConfig(_Component):
    """What may vary. Further keys are options of the space (roles, rest)."""

    kind: str = "block"
    method: str = "linear"
    base: str | None = None
    """The model that coefficients start from. Default: for methods on task vectors the common ancestor (`base:`
    at the top), else the last parent."""
    donors: list[str] | None = None
    """Default: every parent except the base."""
    bounds: tuple[float, float] = (0.0, 1.0)
    knobs: dict[str, float | tuple[float, float]] = Field(default_factory=dict)
    """Further arguments of the method, "density" or "density:DONOR": a number is fixed, a pair is searched
    between the two, with a gene for every group of parts."""

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        return _known(value, SPACES, "search space")

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known(value, METHODS, "merge method")

    @field_validator("knobs", mode="before")
    @classmethod
    def _knobs(cls, value: Any) -> Any:
        for name, knob in value.items() if isinstance(value, dict) else ():
            numbers = knob if isinstance(knob, list | tuple) and len(knob) == 2 else [knob]
            if not all(isinstance(number, int | float) for number in numbers):
                raise ValueError(f"{name}: expected a number, or [low, high] to search between, got {knob!r}")
        return value


class TaskConfig(_Component):
    """What models are scored on. Further keys are options of the task."""

    kind: str

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        return _known(value, TASKS, "task")


class EngineConfig(_Component):
    """What generates. Further keys are options of the engine (dtype, device, batch_size, options)."""

    kind: str = "transformers"
    max_tokens: int = Field(1024, ge=1)
    """Longest answer; a longer one is cut off and counts as wrong."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; default all."""

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        return _known(value, ENGINES, "engine")


class OptimizerConfig(_Component):
    """What proposes. Further keys are options of the optimizer (population, weights, ...)."""

    kind: str = "nsga2"

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        return _known(value, OPTIMIZERS, "optimizer")


class Constraints(_Section):
    """What a candidate must keep to be feasible."""

    max_truncated: float = Field(0.1, ge=0, le=1)
    """Largest share of answers cut off by max_tokens."""
    accuracy_floor_stderrs: float = Field(2.0, ge=0)
    """A candidate's accuracy must reach the worst parent's minus this many of that parent's standard errors."""


class Baselines(_Section):
    """Plain merges that are evaluated first, and counted in the budget."""

    average: bool = True
    line_points: int = Field(0, ge=0, le=1000)
    """Interior points of the line between two parents."""
    swaps: bool = False
    """For each set of roles that the space tells apart: these from the donor and the rest from the base, as
    R1T-Chimera took routed experts, and the other way round. Optimizers start from the best of all baselines."""


class Budget(_Section):
    """When a search ends: at whichever limit comes first."""

    candidates: int | None = Field(None, ge=1)
    """Evaluated models, parents and baselines included."""
    tokens: int | None = Field(None, ge=1)
    """Generated tokens on the search split."""
    hours: float | None = Field(None, gt=0)
    """Time spent evaluating on the search split, over all sittings."""

    @model_validator(mode="after")
    def _some_limit(self) -> Budget:
        if not self.model_dump(exclude_none=True):
            raise ValueError("expected at least one of candidates, tokens, hours")
        return self


class ProxyConfig(_Section):
    """Spares candidates of the search problems; parents and baselines, which it learns from, are asked all of them.

    It learns more from more baselines: line_points of about 9.
    """

    enabled: bool = False
    screen: int = Field(4, ge=0)
    """A candidate whose answers to so many problems all loop up to the token limit is dead; 0 looks at none."""
    likelihood: bool = False
    """A candidate that finds the parents' correct answers as unlikely as noise is dead. Needs log-probabilities."""
    race: bool = True
    """Whether a candidate stops when one member of the front is certain to be no worse in any objective."""
    alpha: float = Field(0.1, gt=0, lt=1)
    """How likely, at most, a candidate is stopped that beats every member by the tolerance."""
    tolerance: float = Field(0.01, ge=0, lt=1)
    """Differences that are worth no full evaluation, as a share of the hypervolume's box in each objective."""
    chosen: int = Field(16, ge=0)
    """Problems that are asked first because parents and baselines differ on them; the others come by lot."""
    estimator: str = "kriging"
    """What a stopped candidate is estimated by."""

    @field_validator("estimator")
    @classmethod
    def _estimator(cls, value: str) -> str:
        return _known(value, ESTIMATORS, "estimator")


class Tracking(_Section):
    """Where MLflow keeps what it is told. Safe to change between sittings."""

    enabled: bool = True
    uri: str | None = None
    """Default: a sqlite store inside the run folder."""
    experiment: str = "mergefront"


class Memory(_Section):
    """Where what is merged lives between candidates."""

    residency: Literal["auto", "device", "pinned", "disk"] = "auto"
    """Where the tensors of base and donors live: on the engine's device, in pinned host memory, or on disk; see
    evo.residency. Safe to change between sittings: bits are the same."""
    deltas: str = Field("exact", pattern=r"^(exact|int8|int4|low_rank\([1-9]\d{0,3}\))$")
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
    constraints: Constraints = Field(default_factory=lambda: Constraints.model_validate({}))
    orderliness: Orderliness = Field(default_factory=Orderliness)
    """What counts as repetition and as self-correction in the figures beside accuracy and tokens."""
    proxy: ProxyConfig = Field(default_factory=lambda: ProxyConfig.model_validate({}))
    baselines: Baselines = Field(default_factory=lambda: Baselines.model_validate({}))
    budget: Budget
    seed: int = Field(0, ge=0)
    memory: Memory = Field(default_factory=lambda: Memory.model_validate({}))
    tracking: Tracking = Field(default_factory=Tracking)

    @model_validator(mode="after")
    def _names_agree(self) -> Config:
        if "base" in self.parents:
            raise ValueError("parents: 'base' is the name of the common ancestor; call this parent something else")
        if bad := [name for name in self.parents if not name.isidentifier()]:
            raise ValueError(f"parents: expected plain names (letters, digits, _), got {bad}")
        if self.interface is not None:
            _known(self.interface, self.sources, "parent")
        for name in [*([self.space.base] if self.space.base else []), *(self.space.donors or [])]:
            _known(name, self.sources, "source")
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


TABLE_FILES = (".jsonl", ".json", ".parquet")
SAFE_KEYS = ("budget", "tracking", "engine.threads", "memory.residency")
"""Keys that may differ when a run goes on; any other would make its results incomparable."""


def load_config(path: str | Path) -> Config:
    """Read, resolve and validate a YAML file. Checkpoints that are named by an id are downloaded.

    Paths of checkpoints, and of tables that are files, are taken relative to the file.

    Raises:
        ConfigError: naming the file, the line and the key, what was expected and what came.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        data, lines = yaml.safe_load(text), line_numbers(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys such as parents, task and budget, got {type(data).__name__}")
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(path, lines, dict(e)) for e in error.errors())) from None
    config, places = _resolve_paths(config, path.resolve().parent)
    places += [*_check_files(config), *_check_knobs(config), *_check_capabilities(config), *_check_memory(config)]
    problems = [at(path, lines, place, message) for place, message in places]
    problems += [_describe(path, lines, error, config) for error in _check_options(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describe every key, except the safe ones, that differs between two dumped configs."""
    old = Config.model_validate(old).model_dump(mode="json")  # keys that are new since then have their default
    before, after = dict(_flatten(old)), dict(_flatten(new))
    return [
        f"{key}: {before.get(key, '(not set)')!r} when the run started, {after.get(key, '(not set)')!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(f"{key}.".startswith(f"{s}.") for s in SAFE_KEYS)
    ]


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def component_options(component: _Component, table: Mapping[str, str]) -> dict[str, Any]:
    """The options of a component, validated against and converted by the type hints of its keyword-only
    parameters, so that a new component needs no schema of its own.

    Raises:
        pydantic.ValidationError: for an unknown, missing or ill-typed option.
    """
    target = pkgutil.resolve_name(table[component.kind])  # type: ignore[attr-defined]
    built = target.func if isinstance(target, partial) else target
    hints = get_type_hints(built.__init__ if inspect.isclass(built) else built, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints[name], ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    model = create_model("Options", __config__=ConfigDict(extra="forbid"), **fields)
    validated = model.model_validate(component.options)
    return {name: getattr(validated, name) for name in validated.model_fields_set}


ComponentT = TypeVar("ComponentT", bound=_Component)


def validated(section: type[ComponentT], table: Mapping[str, str], values: Mapping[str, Any]) -> ComponentT:
    """A section of a config on its own, with its component's options checked.

    Raises:
        ConfigError: naming the key, what was expected and what came.
    """
    try:
        component = section.model_validate(dict(values))
        component_options(component, table)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])) or section.__name__}: {str(e['msg']).removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None
    return component


def _check_options(config: Config) -> Iterator[dict[str, Any]]:
    """Errors in the options of the four components, in pydantic's form."""
    for section, table in (("space", SPACES), ("task", TASKS), ("optimizer", OPTIMIZERS), ("engine", ENGINES)):
        try:
            component_options(getattr(config, section), table)
        except ValidationError as error:
            yield from ({**e, "loc": (section, *e["loc"])} for e in error.errors())


def _check_files(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, table in _table_files(config.task.options):
        if not Path(table).is_file():
            yield ("task", key), f"no file at {table}"


def _table_files(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options of a task that name files, as (key, path)."""
    found = [(key, options.get(key)) for key in ("path", "test_path")]
    return [(key, path) for key, path in found if isinstance(path, str) and path.endswith(TABLE_FILES)]


def _check_knobs(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    method = get_method(config.space.method)
    for name, value in config.space.knobs.items():
        ends = value if isinstance(value, tuple) else (value,)
        try:
            for end in ends:
                method.knob(name, config.space_donors).check(name, end)
            if len(ends) == 2 and not ends[0] < ends[1]:
                raise ValueError(f"expected [low, high] with low < high, got {list(ends)}")
        except ValueError as error:
            yield ("space", "knobs", name), str(error)


def _check_capabilities(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a component says it `needs` of the engine and the engine does not have, and whether there is an engine."""
    if missing_package := what_is_missing(config.engine.kind):
        yield ("engine", "kind"), missing_package
    engines = {name: pkgutil.resolve_name(target).capabilities for name, target in ENGINES.items()}
    asked: list[tuple[tuple[str, ...], str, frozenset[str]]] = []
    for section, table in (("space", SPACES), ("task", TASKS)):
        kind = getattr(config, section).kind
        needs: frozenset[str] = getattr(pkgutil.resolve_name(table[kind]), "needs", frozenset())
        asked.append(((section, "kind"), repr(kind), needs))
    if config.proxy.enabled and config.proxy.likelihood:
        asked.append((("proxy", "likelihood"), "the likelihood screen", frozenset({"logprobs"})))
    for place, who, needs in asked:
        if missing := needs - engines[config.engine.kind]:
            able = ", ".join(name for name, has in engines.items() if needs <= has) or "none yet"
            yield (
                place,
                f"{who} needs {', '.join(sorted(missing))}, which the engine {config.engine.kind!r} lacks; "
                f"engines that have it: {able}",
            )


def _check_memory(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    device = config.engine.options.get("device", "auto")
    if config.memory.residency == "pinned" and device == "cpu":
        yield (
            ("memory", "residency"),
            "'pinned' is host memory that a GPU copies from, but engine.device is 'cpu': expected device, disk or auto",
        )


def _resolve_paths(config: Config, folder: Path) -> tuple[Config, list[tuple[tuple[str, ...], str]]]:
    """The config with absolute paths, and the checkpoints that are nowhere."""
    data = config.model_dump(mode="json")
    missing: list[tuple[tuple[str, ...], str]] = []
    for name, path in config.sources.items():
        place: tuple[str, ...] = ("base",) if name == "base" else ("parents", name)
        try:
            found = str(locate(path, folder))
        except HubError as error:
            missing.append((place, str(error)))
            continue
        if name == "base":
            data["base"] = found
        else:
            data["parents"][name] = found
    for part in (data["task"], *data["task"].get("tasks", ())):
        for key, table in _table_files(part) if isinstance(part, dict) else ():
            part[key] = str((folder / table).resolve())
    return Config.model_validate(data), missing


def _describe(
    path: Path, lines: Mapping[tuple[str, ...], int], error: dict[str, Any], config: Config | None = None
) -> str:
    """One pydantic error as "file:line: key: what was expected, what came"."""
    place = tuple(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        allowed = _keys_at(place[:-1], config)
        near = difflib.get_close_matches(place[-1], allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        message = f"unknown key {place[-1]!r}: expected one of {', '.join(allowed)}{hint}"
    elif error["type"] == "missing":
        message = f"the key {place[-1]!r} is missing"
    elif not isinstance(error.get("input"), dict | list | tuple):
        message += f", got {error.get('input')!r}"
    return at(path, lines, place, message)


def _keys_at(place: tuple[str, ...], config: Config | None) -> list[str]:
    """Keys that are allowed at a place of the file."""
    if not place:
        return list(Config.model_fields)
    section: Any = Config.model_fields[place[0]].annotation
    keys = list(section.model_fields)
    tables = {"space": SPACES, "task": TASKS, "optimizer": OPTIMIZERS, "engine": ENGINES}
    if config is not None and place[0] in tables:
        target = pkgutil.resolve_name(tables[place[0]][getattr(config, place[0]).kind])
        parameters = inspect.signature(target).parameters.values()
        keys += [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return keys

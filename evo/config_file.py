"""Reads a run's configuration from YAML or from Python, and says of every mistake where it is.

What can be checked without loading anything is checked here, before anything is loaded.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evo.components import component_options, keys_of, options_of
from evo.config import Budget, Component, Config, ConfigError, TaskConfig
from evo.deltas import parse as parse_deltas
from evo.hub import HubError, locate
from evo.merge import get_method
from evo.places import Place, describe, listed, read
from fitness.engines import ENGINES, what_is_missing
from fitness.tasks import TASKS
from fitness.tasks.mixture import mistakes_of
from fitness.types import Split
from search_spaces import SPACES

TABLE_FILES = (".jsonl", ".json", ".parquet")
COMPONENTS = ("space", "task", "optimizer", "engine")
"""Sections of a config that are components: a kind, and its options."""


def load_config(path: str | Path) -> Config:
    """Read, resolve and validate a YAML file. Checkpoints that are named by an id are downloaded.

    Paths of checkpoints, and of tables that are files, are taken relative to the file.

    Raises:
        ConfigError: naming the file, the line and the key, what was expected and what came.
    """
    path = Path(path)
    try:
        data, lines = read(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(data, dict):
        came = "an empty file" if data is None else "a list" if isinstance(data, list) else repr(data)[:40]
        raise ConfigError(f"{path}: expected keys such as parents, task and budget, got {came}")
    return _validated(data, path.resolve().parent, lines, path)


def config_of(data: Mapping[str, Any]) -> Config:
    """What keys and values in Python say, validated as those of a file are.

    Paths are taken relative to the current folder.

    Raises:
        ConfigError: naming the key, what was expected and what came.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"expected a Config, or keys such as parents, task and budget, got {type(data).__name__}: a file is read "
            "by Search.from_yaml"
        )
    return _validated(data, Path.cwd(), _places(data), None)


def budget_of(limits: Budget | Mapping[str, Any]) -> Budget:
    """A budget as Python says it, {"candidates": 400} for one.

    Raises:
        ConfigError: naming the limit, what was expected and what came.
    """
    if isinstance(limits, Budget):
        return limits
    if not isinstance(limits, Mapping):
        raise ConfigError(f'budget: expected a Budget or limits such as {{"candidates": 400}}, got {limits!r}')
    try:
        return Budget.model_validate(dict(limits))
    except ValidationError as error:
        found = [_describe({}, {**e, "loc": ("budget", *e["loc"])}) for e in error.errors()]
        raise ConfigError(listed(None, {}, found)) from None


def check(config: Config) -> None:
    """Check what no section knows by itself: what components, files and the rest of the config make of it.

    Raises:
        ConfigError: a line for every mistake.
    """
    data = config.model_dump()
    places = _places(data)
    if found := [*_not_finite(data), *_mistakes(config, places)]:
        raise ConfigError(listed(None, places, found))


def _validated(data: Mapping[str, Any], folder: Path, lines: Mapping[Place, int], path: Path | None) -> Config:
    if endless := list(_not_finite(data)):
        raise ConfigError(listed(path, lines, endless))
    try:
        config = Config.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(listed(path, lines, [_describe(lines, dict(e)) for e in error.errors()])) from None
    config, missing = _resolve_paths(config, folder)
    if found := [*missing, *_mistakes(config, lines)]:
        raise ConfigError(listed(path, lines, found))
    return config


def _mistakes(config: Config, lines: Mapping[Place, int]) -> Iterator[tuple[Place, str]]:
    """What each section may say by itself, and is wrong with the others, its component or the disk."""
    checks = (
        _check_parents,
        _check_files,
        _check_parts,
        _check_knobs,
        _check_capabilities,
        _check_passed_on,
        _check_memory,
    )
    for checked in checks:
        yield from checked(config)
    for error in _check_options(config):
        yield _describe(lines, error, config)


def _values(data: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value, and where it is."""
    yield place, data
    inside = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in inside:
        yield from _values(value, (*place, str(key)))


def _places(data: Any) -> dict[Place, int]:
    """The places of a config that is in no file, and so has no lines."""
    return dict.fromkeys((place for place, _ in _values(data)), 0)


def _not_finite(data: Any) -> Iterator[tuple[Place, str]]:
    """Numbers that are none, or have no end."""
    for place, value in _values(data):
        if isinstance(value, float) and not math.isfinite(value):
            yield place, f"expected a finite number, got {value}"


def _check_options(config: Config) -> Iterator[dict[str, Any]]:
    """Errors in the options of the four components, and of a mixture's tasks, in pydantic's form."""
    sections: dict[Place, Any] = {(section,): getattr(config, section) for section in COMPONENTS}
    for place, said in (sections | _parts(config)).items():
        try:
            component_options(said if isinstance(said, Component) else _task_of(said))
        except ValidationError as error:
            yield from ({**e, "loc": (*place, *e["loc"])} for e in error.errors())


def _parts(config: Config) -> dict[Place, dict[str, Any]]:
    """Where a mixture has a task -> what it says of it."""
    parts = config.task.options.get("tasks")
    there = enumerate(parts if isinstance(parts, list) else ())
    return {("task", "tasks", str(i)): part for i, part in there if isinstance(part, dict)}


def _tasks(config: Config) -> dict[Place, dict[str, Any]]:
    """Where a task is, the config's own and those of a mixture -> what is said of it."""
    return {("task",): {**config.task.options, "kind": config.task.kind}} | _parts(config)


def _task_of(part: dict[str, Any]) -> TaskConfig:
    """A task of a mixture by itself."""
    return TaskConfig.model_validate({key: value for key, value in part.items() if key != "weight"})


def _check_parts(config: Config) -> Iterator[tuple[Place, str]]:
    """What a mixture says of its tasks, and their own options do not tell."""
    for place, part in _parts(config).items():
        yield from (((*place, key), said) for key, said in mistakes_of(part))


def _check_parents(config: Config) -> Iterator[tuple[Place, str]]:
    first: dict[Path, str] = {}
    for name, path in config.parents.items():
        if (same := first.setdefault(path.resolve(), name)) != name:
            yield ("parents", name), f"is {same!r} again, {path}: expected another checkpoint"


def _check_files(config: Config) -> Iterator[tuple[Place, str]]:
    for place, said in _tasks(config).items():
        for key, table in _table_files(said):
            if not Path(table).is_file():
                yield (*place, key), f"no file at {table}"


def _table_files(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options of a task that name files, as (key, path)."""
    found = [(key, options.get(key)) for key in ("path", "test_path")]
    return [(key, path) for key, path in found if isinstance(path, str) and path.endswith(TABLE_FILES)]


def _check_knobs(config: Config) -> Iterator[tuple[Place, str]]:
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


def _check_capabilities(config: Config) -> Iterator[tuple[Place, str]]:
    """What a component says it `needs` of the engine and the engine does not have, and whether there is an engine."""
    if missing_package := what_is_missing(config.engine.kind):
        yield ("engine", "kind"), missing_package
    able = _capabilities(config.engine.kind)
    if not able:
        yield (
            ("engine", "kind"),
            f"{ENGINES[config.engine.kind]} does not say what it can do: expected a class attribute such as "
            'capabilities = frozenset({"generate"})',
        )
        return
    asked: list[tuple[Place, str, frozenset[str]]] = []
    places: list[tuple[Place, Any, Mapping[str, str]]] = [(("space",), config.space.kind, SPACES)]
    places += [(place, said.get("kind"), TASKS) for place, said in _tasks(config).items()]
    for place, kind, table in places:
        if found := table.get(str(kind)):  # a part's is checked later
            asked.append(((*place, "kind"), repr(kind), getattr(pkgutil.resolve_name(found), "needs", frozenset())))
    if config.proxy.enabled and config.proxy.likelihood:
        asked.append((("proxy", "likelihood"), "the likelihood screen", frozenset({"logprobs"})))
    for place, who, needs in asked:
        if missing := needs - able:
            others = ", ".join(name for name in ENGINES if needs <= _capabilities(name)) or "none yet"
            yield (
                place,
                f"{who} needs {', '.join(sorted(missing))}, which the engine {config.engine.kind!r} lacks; "
                f"engines that have it: {others}",
            )


def _check_passed_on(config: Config) -> Iterator[tuple[Place, str]]:
    """Options that an engine would pass on to its library, but for those that it refuses."""
    refused: Mapping[str, str] = getattr(pkgutil.resolve_name(ENGINES[config.engine.kind]), "refused", {})
    given = config.engine.options.get("options")
    for name in given if isinstance(given, Mapping) else ():
        if name in refused:
            yield ("engine", "options", name), refused[name]


def _capabilities(kind: str) -> frozenset[str]:
    """What an engine says that it can do; empty if it says nothing."""
    found: frozenset[str] = getattr(pkgutil.resolve_name(ENGINES[kind]), "capabilities", frozenset())
    return found


def _check_memory(config: Config) -> Iterator[tuple[Place, str]]:
    device = config.engine.options.get("device", "auto")
    try:
        parse_deltas(config.memory.deltas)
    except ValueError as error:
        yield ("memory", "deltas"), str(error)
    if config.memory.residency == "pinned" and device == "cpu":
        yield (
            ("memory", "residency"),
            "'pinned' is host memory that a GPU copies from, but engine.device is 'cpu': expected device, disk or auto",
        )


def _resolve_paths(config: Config, folder: Path) -> tuple[Config, list[tuple[Place, str]]]:
    """The config with absolute paths, and the checkpoints that are nowhere."""
    data = config.model_dump(mode="json")
    missing: list[tuple[Place, str]] = []
    for name, path in config.sources.items():
        place: Place = ("base",) if name == "base" else ("parents", name)
        try:
            found = str(locate(path, folder))
        except HubError as error:
            missing.append((place, str(error)))
            continue
        if name == "base":
            data["base"] = found
        else:
            data["parents"][name] = found
    parts = data["task"].get("tasks")
    for part in (data["task"], *(parts if isinstance(parts, list) else ())):
        for key, table in _table_files(part) if isinstance(part, dict) else ():
            part[key] = str((folder / table).resolve())
    return Config.model_validate(data), missing


def _describe(lines: Mapping[Place, int], error: dict[str, Any], config: Config | None = None) -> tuple[Place, str]:
    """Place of one of pydantic's errors, and what was expected and what came."""
    place = tuple(str(part) for part in error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return place, describe(error, _keys_at(place[:-1], config))
    if error["type"] == "missing":
        return place, describe(error, ())
    while len(place) > 1 and place not in lines and place[:-1] in lines:
        place = place[:-1]  # pydantic's name for one of several kinds of value
    return place, describe(error, ())


def _keys_at(place: tuple[str, ...], config: Config | None) -> list[str]:
    """Keys that are allowed at a place of the file."""
    if not place:
        return list(Config.model_fields)
    section: Any = Config.model_fields[place[0]].annotation
    keys = [field.name for field in fields(section)] if is_dataclass(section) else list(section.model_fields)
    if config is None or place[0] not in COMPONENTS:
        return keys
    part = _parts(config).get(place)
    component = getattr(config, place[0]) if part is None else _task_of(part)
    target = pkgutil.resolve_name(component.kinds[component.kind])
    if len(place) == 2:
        return keys_of(target, place[1])
    if part is None:
        return [*keys, *options_of(target)]
    return [*keys, "weight", *(key for key in options_of(target) if key not in list(Split))]  # the mixture says sizes

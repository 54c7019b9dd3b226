"""Options of a component (a space, task, engine or optimizer), checked against its own parameters."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from evo.config import Component, ConfigError
from evo.places import describe, listed
from fitness.types import Decoding


def component_options(component: Component) -> dict[str, Any]:
    """The options of a component, validated against and converted by the type hints of its keyword-only
    parameters, so that a new component needs no schema of its own.

    Raises:
        pydantic.ValidationError: for an unknown, missing or ill-typed option.
        ConfigError: if the component has an option without a type hint.
    """
    place = component.kinds[component.kind]
    target = pkgutil.resolve_name(place)
    hints, options = _hints_of(target), options_of(target)
    if bare := [name for name in options if name not in hints]:
        raise ConfigError(
            f"{component.kind!r} ({place}): expected a type hint for the option {bare[0]!r}, such as "
            f"`{bare[0]}: int = 3`, got none: what a config says is checked and converted by it"
        )
    fields: dict[str, Any] = {
        name: (hints[name], ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in options.items()
    }
    model = create_model("Options", __config__=ConfigDict(extra="forbid"), **fields)
    validated = model.model_validate(component.options)
    return {name: getattr(validated, name) for name in validated.model_fields_set}


def built_by(target: Any) -> Any:
    """The class or function that a table names, which may have its first arguments given, by itself."""
    return target.func if isinstance(target, partial) else target


ComponentT = TypeVar("ComponentT", bound=Component)


def validated(section: type[ComponentT], values: Mapping[str, Any]) -> ComponentT:
    """A section of a config on its own, with its component's options checked.

    Raises:
        ConfigError: naming the key, what was expected and what came.
    """
    keys = list(section.model_fields)
    try:
        component = section.model_validate(dict(values))
        keys += options_of(pkgutil.resolve_name(section.kinds[component.kind]))
        component_options(component)
    except ValidationError as error:
        found = [(tuple(map(str, e["loc"])), describe(dict(e), keys)) for e in error.errors()]
        raise ConfigError(listed(None, {}, found, section.__name__)) from None
    return component


def options_of(target: Any) -> dict[str, inspect.Parameter]:
    """What a config may say to a class or function that a table names, by key: its keyword-only parameters."""
    parameters = inspect.signature(target).parameters.items()
    return {name: parameter for name, parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def keys_of(target: Any, option: str) -> list[str]:
    """The keys of an option that has some, such as `decoding`."""
    hint = _hints_of(target).get(option)
    return [field.name for kind in (hint, *get_args(hint)) if is_dataclass(kind) for field in fields(kind)]


def _hints_of(target: Any) -> dict[str, Any]:
    built = built_by(target)
    return get_type_hints(built.__init__ if inspect.isclass(built) else built, include_extras=True)


def n_samples(options: Mapping[str, Any]) -> int:
    """Answers to each problem that an engine with these options gives."""
    decoding: Decoding = options.get("decoding") or Decoding()
    return decoding.samples

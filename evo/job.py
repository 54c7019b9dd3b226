"""A rule of a recipe made ready to run: its method found, its knobs checked, copies told from merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evo.merge import Method, get_method
from search_spaces.recipe import Recipe, Rule


@dataclass(frozen=True)
class Job:
    """A rule made ready to run, the same for every part that it selects; without a method, a copy."""

    sources: tuple[str, ...]
    """The base, then the donors."""
    interface: str
    """Whose rows are taken where vocabularies differ."""
    method: Method | None = None
    coefficients: tuple[float, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    key: tuple[Any, ...] = ()
    """All that a part depends on besides its sources' bits, which never change while they are open."""
    compressed: bool = False
    """Whether donors are merged as they are compressed."""

    @classmethod
    def copy(cls, source: str, interface: str) -> Job:
        """The stored bits of a source."""
        return cls((source,), interface, key=(interface, source))

    @classmethod
    def of(cls, recipe: Recipe, rule: Rule, compressed: bool = False) -> Job:
        """A rule's job; a copy is never compressed.

        Raises:
            ValueError: if its method or a knob is unknown, or a knob is out of range.
        """
        method, donors = get_method(rule.method), tuple(rule.coefficients)
        coefficients, sources = tuple(rule.coefficients.values()), (recipe.base, *donors)
        try:
            arguments = method.arguments(rule.knobs, donors)
        except ValueError as error:
            raise ValueError(f"{rule.method}: {error}") from None
        if (copied := method.copy_of(coefficients, **arguments)) is not None:
            return cls.copy(sources[copied], recipe.interface)
        seed = recipe.seed if method.random else 0
        key = (recipe.interface, rule.method, *sources, *coefficients, *arguments.values(), seed, compressed)
        return cls(sources, recipe.interface, method, coefficients, arguments, seed, key, compressed)

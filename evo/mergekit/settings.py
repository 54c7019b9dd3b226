"""mergekit's settings: a number, a gradient over the layers of a slice, or a list of filters on tensor names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from evo.places import Place
from search_spaces.recipe import LARGEST

_TRUTH = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}


class MergekitError(ValueError):
    """Something that mergekit's YAML says cannot be said here, or makes no sense."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place


def check(setting: Any, place: Place, *, truth: bool) -> None:
    """Refuse what is no setting.

    Args:
        setting: of the file.
        place: where it stands.
        truth: whether it is true or false, rather than a number.

    Raises:
        MergekitError: with the place of what is wrong.
    """
    for i, condition in enumerate(found := conditions(setting)):
        text = condition.get("filter") if isinstance(condition, dict) else condition
        if not isinstance(condition, dict) or "value" not in condition or not set(condition) <= {"filter", "value"}:
            raise MergekitError((*place, str(i)), f"expected {{filter: TEXT, value: NUMBER}}, got {condition!r}")
        if not isinstance(text, str | None):
            raise MergekitError((*place, str(i), "filter"), f"expected a part of tensor names, got {text!r}; several "
                                "of them are several entries")  # fmt: skip
        check(condition["value"], (*place, str(i), "value"), truth=truth)
    if found:
        return
    for element in setting if isinstance(setting, list) else [setting]:
        try:
            _read(element, truth)
        except ValueError:
            what = "true or false" if truth else "a number"
            raise MergekitError(
                place, f"expected {what}, a list of them over the layers or a list of filters, got {element!r}"
            ) from None


def evaluate(setting: Any, tensor: str, t: float, *, truth: bool = False) -> float | None:
    """The value for a tensor; None where no filter matches.

    Args:
        setting: one that `check` lets pass.
        tensor: its name; a filter is a part of it, and the first that matches wins.
        t: depth in the slice, 0 for its first layer and 1 for its last. A gradient's points lie evenly on it.
        truth: whether it is true or false: 1 or 0, of the point before. Numbers are joined by lines.
    """
    if found := conditions(setting):
        matching = (c for c in found if matches(c, tensor))
        return next((evaluate(c["value"], tensor, t, truth=truth) for c in matching), None)
    if not isinstance(setting, list):
        return _read(setting, truth)
    return _at([_read(point, truth) for point in setting], t, truth) if setting else None


def conditions(setting: Any) -> list[Any]:
    """The filters of a setting, in order; empty for a number or a gradient."""
    if isinstance(setting, dict):
        return [setting]
    return setting if isinstance(setting, list) and any(isinstance(element, dict) for element in setting) else []


def matches(condition: dict[str, Any], tensor: str) -> bool:
    """Whether a filter lets a tensor pass."""
    return condition.get("filter") in (None, "*") or condition["filter"] in tensor


def idle(setting: Any, tensors: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Positions of filters that decide nothing, and why."""
    for i, condition in enumerate(found := conditions(setting)):
        if any(before.get("filter") in (None, "*") for before in found[:i]):
            yield str(i), "never asked: an entry before it is for all tensors"
        elif not any(matches(condition, tensor) for tensor in tensors):
            yield (
                str(i),
                f"no tensor's name has {condition['filter']!r} in it (filters are parts of names, not patterns)",
            )


def _at(points: Sequence[float], t: float, truth: bool) -> float:
    position = t * (len(points) - 1)
    low = int(position)
    share = 0.0 if truth else position - low
    return (1 - share) * points[low] + share * points[min(low + 1, len(points) - 1)]


def _read(value: Any, truth: bool) -> float:
    """A number; YAML takes 1e-5 for a text.

    Raises:
        ValueError: if it is none, or none that float32 has.
    """
    if truth:
        if (text := str(value).removesuffix(".0").lower()) in _TRUTH:
            return _TRUTH[text]
    elif isinstance(value, bool | int | float | str) and abs(number := float(value)) <= LARGEST:
        return number
    raise ValueError(value)

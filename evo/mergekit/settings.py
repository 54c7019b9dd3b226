"""mergekit's settings: a number, a gradient over the layers of a slice, or a list of filters on tensor names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Place = tuple[str, ...]
"""Keys and positions that lead to a value of the file."""


class MergekitError(ValueError):
    """Something that mergekit's YAML says cannot be said here, or makes no sense."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place


def check(setting: Any, place: Place) -> None:
    """Refuse what is no setting.

    Raises:
        MergekitError: with the place of what is wrong.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and any(isinstance(element, dict) for element in setting):
        for i, condition in enumerate(setting):
            if not isinstance(condition, dict) or "value" not in condition or not set(condition) <= {"filter", "value"}:
                raise MergekitError((*place, str(i)), f"expected {{filter: TEXT, value: NUMBER}}, got {condition!r}")
            check(condition["value"], (*place, str(i), "value"))
        return
    for element in setting if isinstance(setting, list) else [setting]:
        if not _is_number(element):
            raise MergekitError(place, f"expected a number, a list of numbers or a list of filters, got {element!r}")


def evaluate(setting: Any, tensor: str, t: float) -> float | None:
    """The value for a tensor; None where no filter matches.

    Args:
        setting: one that `check` lets pass.
        tensor: its name; a filter is a part of it, and the first that matches wins.
        t: depth in the slice, 0 for its first layer and 1 for its last. A gradient's points lie evenly on it and
            are joined by lines; truth values are not interpolated.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return number(setting)
    if not setting:
        return None
    if isinstance(setting[0], dict):
        matching = (c for c in setting if c.get("filter") in (None, "*") or c["filter"] in tensor)
        return next((evaluate(c["value"], tensor, t) for c in matching), None)
    return _interpolate(setting, t)


def number(value: Any) -> float:
    """A number of the file; YAML takes 1e-5 for a text."""
    return float(value)


def _interpolate(points: Sequence[Any], t: float) -> float:
    position = t * (len(points) - 1)
    low = int(position)
    if any(isinstance(point, bool) for point in points):
        return number(points[low])
    share = position - low
    return (1 - share) * number(points[low]) + share * number(points[min(low + 1, len(points) - 1)])


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
    return isinstance(value, bool | int | float | str)

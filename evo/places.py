"""Where in a YAML file a value stands, so that an error can name its line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

Place = tuple[str, ...]
"""Keys, and positions in lists, that lead to a value."""


def line_numbers(text: str) -> dict[Place, int]:
    """Place -> line, from 1."""
    lines: dict[Place, int] = {}

    def visit(node: yaml.Node, place: Place) -> None:
        lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*place, str(key.value))
                lines[inner] = key.start_mark.line + 1
                visit(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                visit(value, (*place, str(i)))

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        visit(root, ())
    return lines


def at(path: Path, lines: Mapping[Place, int], place: Place, message: str, top: str = "config") -> str:
    """The message with its file, line and place; of a value that is not in the file, with those of what holds it."""
    known = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in lines), ())
    return f"{path}:{lines.get(known, 1)}: {'.'.join(place) or top}: {message}"

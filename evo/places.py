"""Where in a YAML file a value stands, so that an error can name its line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from evo.errors import did_you_mean

Place = tuple[str, ...]
"""Keys, and positions in lists, that lead to a value."""


def parse(text: str) -> tuple[Any, dict[Place, int]]:
    """What a YAML text says, and the line, from 1, of every value. Keys are text, and each is there once.

    Raises:
        yaml.YAMLError: saying where the text is none, or says what nobody can have meant.
    """
    return yaml.load(text, Loader=_Loader), _line_numbers(yaml.compose(text, Loader=yaml.SafeLoader))


def read(file: Path) -> tuple[Any, dict[Place, int]]:
    """What a file of YAML says, and its lines: see `parse`.

    Raises:
        ValueError: naming the file, if it cannot be read or is no YAML.
    """
    try:
        return parse(file.read_text(encoding="utf-8"))  # YAML's, whatever the locale's is
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {file}: expected text in UTF-8: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses what PyYAML reads without a word."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Raises ConstructorError for text that no path or name can be."""
        if isinstance(node.value, str) and "\0" in node.value:
            raise ConstructorError(None, None, "a text with a zero in it (\\0)", node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises ConstructorError for keys that are no text, or there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                what = getattr(key, "value", None) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise ConstructorError(
                    None, None, f"expected text as a key, got {what} (put it in quotes)", key.start_mark
                )
            if key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _line_numbers(root: yaml.Node | None) -> dict[Place, int]:
    lines: dict[Place, int] = {}

    def visit(node: yaml.Node, place: Place, inside: tuple[yaml.Node, ...]) -> None:
        if node in inside:
            raise ConstructorError(None, None, "an anchor that is part of itself", node.start_mark)
        lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*place, str(key.value))
                lines[inner] = key.start_mark.line + 1
                visit(value, inner, (*inside, node))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                visit(value, (*place, str(i)), (*inside, node))

    if root is not None:
        visit(root, (), ())
    return lines


def at(path: Path | None, lines: Mapping[Place, int], place: Place, message: str, top: str = "config") -> str:
    """The message with its file, line and place; of a value that is not in the file, with those of what holds it.

    Without a path, what is wrong was said in Python, and has a place alone.
    """
    known = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in lines), ())
    where = f"{path}:{lines.get(known, 1)}: " if path else ""
    return f"{where}{'.'.join(place) or top}: {message}"


def listed(
    path: Path | None, lines: Mapping[Place, int], found: Iterable[tuple[Place, str]], top: str = "config"
) -> str:
    """A line for each place: of a value that may be of several kinds there is a message for each kind."""
    messages: dict[Place, list[str]] = {}
    for place, message in found:
        messages.setdefault(place, []).append(message)
    return "\n".join(at(path, lines, place, "; or: ".join(said), top) for place, said in messages.items())


def describe(error: Mapping[str, Any], allowed: Sequence[str]) -> str:
    """One of pydantic's errors: what was expected and what came.

    Args:
        error: of `ValidationError.errors()`.
        allowed: keys that may be where it is, if it is about one that may not.
    """
    key, kind, message = str(error["loc"][-1] if error["loc"] else ""), error["type"], str(error["msg"])
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key!r}: expected one of {', '.join(allowed)}{did_you_mean(key, allowed)}"
    if kind in ("missing", "missing_argument"):
        return f"the key {key!r} is missing"
    if kind == "too_short":
        return "expected at least {min_length}, got {actual_length}".format(**error["ctx"])
    expected = _EXPECTED.get(kind) or message.removeprefix("Value error, ")
    shown = kind in _EXPECTED or not isinstance(error.get("input"), dict | list | tuple)
    expected, *meant = expected.partition("; did you mean ")  # what came goes before it
    came = f", got {error.get('input')!r}" if shown else ""
    return "".join([expected, came, *meant])


_EXPECTED = {
    "tuple_type": "expected a list",
    "sequence_str": "expected a list",
    "dict_type": "expected keys with values",
    "dataclass_type": "expected keys with values",
    "model_type": "expected keys with values",
}
"""Where pydantic names a type of Python's."""

"""Reads mergekit's YAML into a recipe: every tensor's parameters, then as few rules as say the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from evo.chat_template import template_of
from evo.checkpoint import Checkpoint
from evo.merge import get_method
from evo.mergekit.chat_templates import AUTO
from evo.mergekit.document import Document, Parameters, Slice
from evo.mergekit.methods import CannotSayError, Merge
from evo.mergekit.settings import MergekitError, evaluate, idle
from evo.places import Place
from evo.vocabulary import n_padded
from search_spaces.layout import Layout, Part, Role
from search_spaces.recipe import Recipe, Rule, Source, assign

_Said = tuple[str, tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")


def to_recipe(document: Document, sources: Mapping[str, Checkpoint], named: Mapping[str, Source]) -> Recipe:
    """The recipe that gives what mergekit gives.

    Args:
        document: the file.
        sources: name -> checkpoint, for all of document.paths.
        named: what the recipe calls them.

    Raises:
        MergekitError: with the place of what cannot be said here.
    """
    layout = sources[document.origin].layout
    if (layers := document.slices[-1].layers) and layers[1] != layout.n_blocks:
        where = (*document.slices[-1].inputs[0].place, "layer_range")
        raise MergekitError(
            where, f"the slices end at layer {layers[1]}, the models at {layout.n_blocks}: layers are neither left out "
            "nor repeated here",
        )  # fmt: skip
    if document.tokenizer and (n := n_padded(sources[document.interface])):
        document.notes.append(
            f"{document.tokenizer}: mergekit cuts off the {n} rows of the embedding that no token has"
        )
    _note_idle_filters(document, [part.tensor for part in layout.parts])
    tensors = [_Tensor(part, _say(document, part, layout.n_blocks)) for part in layout.parts]
    return Recipe(
        named,
        document.origin,
        document.interface,
        _rules(tensors, layout),
        dtype=document.dtype,
        chat_template=_chat_template(document, sources),
    )


def _chat_template(document: Document, sources: Mapping[str, Checkpoint]) -> str | None:
    """The text of the result's; None for the interface's."""
    if document.chat_template != AUTO:
        return document.chat_template
    models = [name for name in (document.interface, *sources) if name not in document.adapters]
    of = {name: text.strip() for name in models if (text := template_of(sources[name].path))}
    text = next((text for text, _ in Counter(of.values()).most_common(1)), None)  # the interface's, of equally many
    owner = next((name for name in of if of[name] == text), document.interface)
    document.notes.append(f"chat_template: auto is that of {owner}")
    return None if owner == document.interface else text


def _note_idle_filters(document: Document, tensors: Sequence[str]) -> None:
    scopes = [*document.shared, *(p for s in document.slices for p in (s.shared, *(i.own for i in s.inputs)))]
    for scope in scopes:
        for name, setting in scope.settings.items():
            document.notes += [f"{'.'.join((*scope.place, name, i))}: {why}" for i, why in idle(setting, tensors)]


def _say(document: Document, part: Part, n_blocks: int) -> _Said:
    """Method, coefficients and knobs of a tensor."""
    within, t = _slice_of(document, part, n_blocks)
    tensor = part.tensor
    dialect = document.dialect
    shared = {
        name: _value(name, default, [within.shared, *document.shared], tensor, t)
        for name, default in dialect.shared.items()
    }
    own = {
        i.name: {
            name: _value(name, default, [i.own, within.shared, *document.shared], tensor, t)
            for name, default in dialect.own.items()
        }
        for i in within.inputs
        if i.name != document.base
    }
    merge = Merge(tuple(i.name for i in within.inputs), document.base, shared, own, document.origin)
    try:
        coefficients, knobs = dialect.say(merge)
        get_method(document.method).arguments(knobs, tuple(coefficients))
    except CannotSayError as error:
        raise MergekitError(_place_of(error.parameter, document, within), f"{error} ({tensor})") from None
    except ValueError as error:
        raise MergekitError(("parameters",), f"{document.method}: {error} ({tensor})") from None
    return document.method, tuple(coefficients.items()), tuple(knobs.items())


def _slice_of(document: Document, part: Part, n_blocks: int) -> tuple[Slice, float]:
    """The slice that a tensor belongs to, and its depth in it. What comes before all layers belongs to the first
    slice, what comes behind them to the last; both take a gradient's first point.
    """
    if (block := part.block) is None:
        return document.slices[0 if part.role is Role.EMBEDDING else -1], 0.0
    for s in document.slices:
        start, end = s.layers or (0, n_blocks)
        if start <= block < end:
            return s, (block - start) / (end - start - 1) if end - start > 1 else 1.0
    raise AssertionError("slices cover all layers")


def _value(name: str, default: float | None, scopes: list[Parameters], tensor: str, t: float) -> float:
    truth = isinstance(default, bool)
    for scope in scopes:
        if name in scope.settings and (value := evaluate(scope.settings[name], tensor, t, truth=truth)) is not None:
            return value
    if default is None:
        place = next(scope.place for scope in scopes if scope.place)
        raise MergekitError(
            place, f"{name} is missing for {tensor}: expected {name} under parameters, and where it has filters "
            "an entry without one behind them",
        )  # fmt: skip
    return float(default)


def _place_of(parameter: str, document: Document, within: Slice) -> Place:
    """Where the file sets a parameter first."""
    scopes = [*(i.own for i in within.inputs), within.shared, *document.shared]
    found = next((scope.place for scope in scopes if parameter in scope.settings), None)
    return (*found, parameter) if found is not None else ("merge_method",)


@dataclass(frozen=True)
class _Tensor:
    part: Part
    said: _Said

    @property
    def block(self) -> int:
        return -1 if self.part.block is None else self.part.block


_KEYS: dict[str, Callable[[Part], str]] = {
    "roles": lambda part: part.role,
    "tensors": lambda part: _NUMBERS.sub("*", part.tensor),
    "names": lambda part: part.tensor,
}
"""What rules may select by, the simplest first."""


def _rules(tensors: Sequence[_Tensor], layout: Layout) -> tuple[Rule, ...]:
    """As few rules as say the same of every tensor."""
    for kind, key in _KEYS.items():
        rules = tuple(_grouped(tensors, kind, key))
        assigned = assign(rules, layout)
        if all((rule := assigned[x.part]) is not None and _said(rule) == x.said for x in tensors):
            return rules
    raise AssertionError("names tell all tensors apart")


def _grouped(tensors: Sequence[_Tensor], kind: str, key: Callable[[Part], str]) -> Iterator[Rule]:
    everything: dict[int, set[str]] = {}
    groups: dict[_Said, dict[int, set[str]]] = {}
    for x in tensors:
        everything.setdefault(x.block, set()).add(key(x.part))
        groups.setdefault(x.said, {}).setdefault(x.block, set()).add(key(x.part))
    for (method, coefficients, knobs), blocks in groups.items():
        for keys, of in _joined(blocks, everything).items():
            n_with = sum(1 for here in everything.values() if keys is None or keys & here)
            yield Rule(
                method,
                dict(coefficients),
                roles=tuple(r for r in Role if r in keys) if kind == "roles" and keys is not None else None,
                blocks=None if len(of) == n_with else tuple(of),
                tensors=tuple(sorted(keys)) if kind != "roles" and keys is not None else None,
                knobs=dict(knobs),
            )


def _joined(blocks: dict[int, set[str]], everything: dict[int, set[str]]) -> dict[frozenset[str] | None, list[int]]:
    """Blocks with the same keys together; None stands for all keys that a block has."""
    found: dict[frozenset[str] | None, list[int]] = {}
    for block, keys in sorted(blocks.items()):
        found.setdefault(None if keys == everything[block] else frozenset(keys), []).append(block)
    return found


def _said(rule: Rule) -> _Said:
    return rule.method, tuple(rule.coefficients.items()), tuple(rule.knobs.items())

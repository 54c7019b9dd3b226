"""Says a recipe in mergekit's YAML, where it has the words: dense checkpoints, and one method for all tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from evo.adapter import Adapter
from evo.checkpoint import Checkpoint
from evo.copies import tied_heads
from evo.dtypes import NAMES
from evo.encodings.plain import Plain
from evo.merge import get_method
from evo.mergekit.methods import CannotSayError
from evo.mergekit.settings import evaluate
from evo.vocabulary import common_rows, n_padded
from search_spaces.recipe import Recipe, Rule

__all__ = ["MERGEKIT_FILE", "CannotSayError", "write_mergekit"]

MERGEKIT_FILE = "mergekit.yaml"
_DTYPES = {code: name for name, code in NAMES.items()}


@dataclass(frozen=True)
class _Tensor:
    """What is said of one tensor."""

    own: Mapping[str, Mapping[str, float]]
    """Model -> its parameters."""
    shared: Mapping[str, float | bool]


@dataclass(frozen=True)
class _Context:
    """What all tensors of a recipe have in common."""

    method: str
    base: str
    donors: tuple[str, ...]
    seen_from_base: bool = False
    """Of spherical methods: whether their points are task vectors."""


def write_mergekit(recipe: Recipe, sources: Mapping[str, Checkpoint]) -> tuple[str, list[str]]:
    """The YAML's text, and notes on where mergekit's result will differ.

    Raises:
        CannotSayError: if mergekit has no words for the recipe.
    """
    base = sources[recipe.base]
    if base.layout.n_experts:
        raise CannotSayError("mergekit 0.1.5 merges the routed experts of a block as one tensor, or drops them")
    _check_sources(sources)
    dtype = _dtype(base)
    assigned = {part.tensor: rule for part, rule in recipe.assign(base.layout).items()}
    tied = tied_heads(base)
    rules = {name: _as_linear(assigned[tied.get(name, name)], recipe.base) for name in assigned}
    context = _context(recipe, list(rules.values()))
    tensors = {name: _say(context, rule) for name, rule in rules.items()}
    adapters = {name: source.rests_on or recipe.footing for name, source in recipe.sources.items()
                if isinstance(sources[name], Adapter)}  # fmt: skip
    places = {name: source.place for name, source in recipe.sources.items()}
    places |= {name: f"{places[model]}+{places[name]}" for name, model in adapters.items()}
    data = _document(recipe, context, tensors, dtype, places)
    notes = []
    if adapters:
        notes.append(f"mergekit rounds adapters ({', '.join(adapters)}) into their models before it merges")
    if get_method(context.method).random:
        notes.append(
            "mergekit draws random masks of its own, and rescales by one factor a tensor: not the same weights"
        )
    if "tokenizer_source" in data and (n := n_padded(sources[recipe.interface])):
        notes.append(f"mergekit's tokenizer_source cuts off the {n} rows of the embedding that no token has")
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110), notes


def _check_sources(sources: Mapping[str, Checkpoint]) -> None:
    if unscored := [name for name, source in sources.items() if source.layout.unscored]:
        raise CannotSayError(f"{', '.join(unscored)}: mergekit merges or drops the tensors that text does not use")
    if common_rows(sources):
        raise CannotSayError("mergekit merges vocabularies that differ token by token, not over common rows")


def _dtype(base: Checkpoint) -> str:
    outputs = [entry.encoding.output for entry in base.entries.values()]
    found = Counter(output.dtype if isinstance(output, Plain) else str(output) for output in outputs)
    if len(found) > 1 or next(iter(found)) not in _DTYPES:
        raise CannotSayError(f"mergekit writes one of {', '.join(_DTYPES.values())} for all tensors; these hold "
                             + " and ".join(sorted(found)))  # fmt: skip
    return _DTYPES[next(iter(found))]


def _as_linear(rule: Rule | None, base: str) -> Rule | None:
    """Picking whole tensors is linear too; what mergekit calls passthrough has one model in all."""
    if rule is None or rule.method != "passthrough" or rule.knobs.get("scale", 1.0) != 1.0:
        return rule
    copied = get_method("passthrough").copy_of(tuple(rule.coefficients.values()), scale=1.0)
    chosen = [base, *rule.coefficients][copied or 0]
    return None if chosen == base else replace(rule, method="linear", coefficients={chosen: 1.0}, knobs={})


def _context(recipe: Recipe, rules: Sequence[Rule | None]) -> _Context:
    methods = {rule.method for rule in rules if rule is not None} or {"linear"}
    if len(methods) > 1:
        raise CannotSayError(f"a file of mergekit's has one merge_method, this recipe has {', '.join(sorted(methods))}")
    (method,) = methods
    if method not in _SPEAKERS:
        raise CannotSayError(f"mergekit 0.1.5 has no {method}")
    donors = tuple(dict.fromkeys(name for rule in rules if rule for name in rule.coefficients if name != recipe.base))
    origins = {bool(rule.knobs.get("origin", 0.0)) for rule in rules if rule}
    if len(origins) > 1:
        raise CannotSayError("some tensors are seen from the base and some from zero")
    return _Context(method, recipe.base, donors, bool(origins) and origins.pop())


def _document(
    recipe: Recipe, context: _Context, tensors: Mapping[str, _Tensor], dtype: str, places: Mapping[str, str]
) -> dict[str, Any]:
    weighs_base = any(context.base in tensor.own for tensor in tensors.values())
    models = [context.base, *context.donors] if weighs_base or not _has_base(context) else list(context.donors)
    data: dict[str, Any] = {"merge_method": context.method, "models": [_model(places[m], m, tensors) for m in models]}
    base_model = None
    if _has_base(context):
        base_model = context.base
    elif context.method in ("linear", "karcher") and recipe.interface in models:
        base_model = recipe.interface  # names the config and the tokenizer only
    if base_model:
        data["base_model"] = places[base_model]
    shared = {name for tensor in tensors.values() for name in tensor.shared}
    if shared:
        data["parameters"] = {
            name: _setting({t: said.shared[name] for t, said in tensors.items() if name in said.shared})
            for name in sorted(shared)
        }
    data |= {"dtype": "float32", "out_dtype": dtype}
    if recipe.interface != base_model:
        data["tokenizer_source"] = places[recipe.interface]
    if recipe.chat_template is not None:
        data["chat_template"] = recipe.chat_template
    return data


def _has_base(context: _Context) -> bool:
    """Whether mergekit's base_model is the recipe's base, rather than no part of the merge."""
    if context.method in ("nuslerp", "multislerp"):
        return context.seen_from_base
    return context.method not in ("linear", "karcher", "passthrough")


def _model(place: str, name: str, tensors: Mapping[str, _Tensor]) -> dict[str, Any]:
    parameters = {p for tensor in tensors.values() for p in tensor.own.get(name, ())}
    said = {
        parameter: _setting({t: x.own[name][parameter] for t, x in tensors.items() if parameter in x.own.get(name, ())})
        for parameter in sorted(parameters, reverse=True)
    }
    return {"model": place, **({"parameters": said} if said else {})}


def _setting(values: Mapping[str, float | bool]) -> Any:
    """A number, or filters: names of tensors, or what those of a value begin with."""
    usual, n = Counter(values.values()).most_common(1)[0]
    if n == len(values):
        return usual
    filters = [{"filter": prefix, "value": value} for prefix, value in _prefixes("", list(values), values, usual)]
    setting = [*filters, {"value": usual}]
    for name, value in values.items():
        if evaluate(setting, name, 0.0, truth=isinstance(value, bool)) != value:
            raise CannotSayError(
                f"mergekit looks for filters anywhere in a name, and no part of some would leave out {name}"
            )
    return setting


def _prefixes(
    prefix: str, names: list[str], values: Mapping[str, float | bool], usual: float | bool
) -> list[tuple[str, float | bool]]:
    """The shortest prefixes, whole components long, under which all tensors have one value, and not the usual."""
    here = {values[name] for name in names}
    if len(here) == 1:
        return [] if here == {usual} else [(prefix, here.pop())]
    by_component: dict[str, list[str]] = {}
    for name in names:
        component, dot, _ = name[len(prefix) :].partition(".")
        by_component.setdefault(prefix + component + dot, []).append(name)
    return [found for p, inner in by_component.items() for found in _prefixes(p, inner, values, usual)]


def _say(context: _Context, rule: Rule | None) -> _Tensor:
    if rule is None:
        rule = Rule(context.method, dict.fromkeys(context.donors, 0.0), knobs={"origin": float(context.seen_from_base)}
                    if context.method in ("nuslerp", "multislerp") else {})  # fmt: skip
    if context.base in rule.coefficients and context.method not in ("linear", "passthrough"):
        raise CannotSayError(f"mergekit's {context.method} leaves out a donor that is the base")
    coefficients = {name: rule.coefficients.get(name, 0.0) for name in context.donors}
    arguments = get_method(rule.method).arguments(rule.knobs, tuple(rule.coefficients))
    per_donor = {
        name: dict(zip(rule.coefficients, value, strict=True)) for name, value in arguments.items()
        if isinstance(value, tuple)
    }  # fmt: skip
    knobs = {name.rstrip("_"): value for name, value in arguments.items() if not isinstance(value, tuple)}
    return _SPEAKERS[context.method](context, coefficients, knobs, per_donor)


def _linear(context: _Context, c: Mapping[str, float], knobs: Mapping[str, float], _: Any) -> _Tensor:
    own = {context.base: {"weight": 1.0 - sum(c.values())}, **{name: {"weight": w} for name, w in c.items()}}
    return _Tensor(own, {"normalize": False})


def _sparse(context: _Context, c: Mapping[str, float], knobs: Mapping[str, float], per_donor: Any) -> _Tensor:
    own = {
        name: {"weight": w, **{knob: values[name] for knob, values in per_donor.items() if name in values}}
        for name, w in c.items()
    }
    for name, epsilon in per_donor.get("epsilon", {}).items():
        density = per_donor["density"][name]
        if density < 1.0 and not epsilon < density < 1.0 - epsilon:
            raise CannotSayError(
                f"mergekit's {context.method} takes densities between epsilon and 1 - epsilon, and {name}'s is "
                f"{density:g} with an epsilon of {epsilon:g}"
            )
    return _Tensor(own, {name: bool(v) if name in ("normalize", "rescale") else v for name, v in knobs.items()})


def _slerp(context: _Context, c: Mapping[str, float], *_: Any) -> _Tensor:
    if len(c) != 1:
        raise CannotSayError(f"mergekit's {context.method} takes two models, this recipe has {1 + len(c)}")
    return _Tensor({}, {"t": next(iter(c.values()))})


def _spherical(context: _Context, c: Mapping[str, float], *_: Any) -> _Tensor:
    total = sum(c.values())
    points = dict(c) if context.seen_from_base else {context.base: 1.0 - total, **c}
    if context.method == "nuslerp" and len(points) != 2:
        raise CannotSayError(f"mergekit's nuslerp takes two models, this recipe has {len(points)}")
    if (context.seen_from_base and abs(total) < 1e-6) or min(points.values()) < 0:
        raise CannotSayError(f"mergekit's {context.method} needs weights from 0 on, with a sum above 0")
    return _Tensor({name: {"weight": w} for name, w in points.items()}, {})


def _karcher(context: _Context, c: Mapping[str, float], knobs: Mapping[str, float], _: Any) -> _Tensor:
    if knobs["origin"] or any(w != 1.0 / (len(c) + 1) for w in c.values()):
        raise CannotSayError("mergekit's karcher weighs all models alike")
    return _Tensor({}, {"max_iter": int(knobs["max_iter"]), "tol": knobs["tol"]})


def _whole(context: _Context, c: Mapping[str, float], knobs: Mapping[str, float], _: Any) -> _Tensor:
    if any(w != 1.0 for w in c.values()):
        raise CannotSayError(f"mergekit's {context.method} has no weights: coefficients other than 1 cannot be said")
    if len(c) != 1 and context.method in ("nearswap", "arcee_fusion"):
        raise CannotSayError(f"mergekit's {context.method} takes two models, this recipe has {1 + len(c)}")
    if len(c) < 2 and context.method == "model_stock":
        raise CannotSayError("mergekit's model_stock takes a base and two models or more")
    return _Tensor({}, {name: bool(v) if name == "filter_wise" else v for name, v in knobs.items()})


def _passthrough(context: _Context, c: Mapping[str, float], knobs: Mapping[str, float], _: Any) -> _Tensor:
    if c:
        raise CannotSayError(f"mergekit's passthrough scales the tensors of one model, this recipe has {1 + len(c)}")
    return _Tensor({context.base: {"scale": knobs["scale"]}}, {})


_SPEAKERS: dict[str, Callable[..., _Tensor]] = {
    "linear": _linear,
    **dict.fromkeys(
        ("task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
         "breadcrumbs_ties"), _sparse,
    ),
    "slerp": _slerp,
    "nuslerp": _spherical,
    "multislerp": _spherical,
    "karcher": _karcher,
    "passthrough": _passthrough,
    **dict.fromkeys(("sce", "model_stock", "nearswap", "arcee_fusion", "ram"), _whole),
}  # fmt: skip
"""Method -> what mergekit is told of a tensor; raises CannotSayError."""

"""mergekit's merge methods in our terms: which parameters they read, and the coefficients and knobs they come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from evo.merge import get_method

Said = tuple[dict[str, float], dict[str, float]]
"""Coefficients and knobs of a rule."""
REQUIRED = None


class CannotSayError(ValueError):
    """A merge that the other side has no words for."""

    def __init__(self, message: str, parameter: str = "merge_method") -> None:
        super().__init__(message)
        self.parameter = parameter


class Base(Enum):
    """What a method makes of base_model."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    IGNORED = "ignored"


@dataclass(frozen=True)
class Merge:
    """The merge of one tensor, as mergekit sees it."""

    inputs: tuple[str, ...]
    """Models in the file's order."""
    base: str | None
    """base_model; None if there is none, or the method ignores it."""
    shared: Mapping[str, float]
    own: Mapping[str, Mapping[str, float]]
    """Model -> its parameters."""
    origin: str
    """Our recipe's base."""

    @property
    def donors(self) -> tuple[str, ...]:
        """The inputs besides the base."""
        return tuple(name for name in self.inputs if name != self.base)

    def each(self, parameter: str) -> dict[str, float]:
        """Donor -> value."""
        return {name: self.own[name][parameter] for name in self.donors}


@dataclass(frozen=True)
class Dialect:
    """A method of mergekit's."""

    say: Callable[[Merge], Said]
    """Raises CannotSayError."""
    base: Base = Base.REQUIRED
    shared: Mapping[str, float | None] = field(default_factory=dict)
    """Parameter -> default; a parameter whose default is a truth value is one."""
    own: Mapping[str, float | None] = field(default_factory=dict)
    """The same, of each model."""
    n_inputs: tuple[int, int] = (1, 1000)
    n_donors: tuple[int, int] = (1, 1000)


def _linear(merge: Merge) -> Said:
    weights = merge.each("weight")
    total = sum(weights.values())
    if merge.shared["normalize"]:
        if total == 0:
            raise CannotSayError("the weights sum to 0 and cannot be normalised", "weight")
        weights = {name: w / total for name, w in weights.items()}
    elif abs(total - 1) > 1e-6:
        raise CannotSayError(
            f"the weights sum to {total:g} with normalize: false; expected 1. The nearest are weights divided by "
            "their sum (normalize: true), or task_arithmetic",
            "weight",
        )
    return _but(weights, merge.origin), {}


def _task_arithmetic(merge: Merge) -> Said:
    weights = merge.each("weight")
    total = sum(weights.values())
    factor = merge.shared["lambda"] / (total if merge.shared["normalize"] and abs(total) >= 1e-8 else 1.0)
    return {name: w * factor for name, w in weights.items()}, {}


def _sparse(merge: Merge) -> Said:
    knobs = {name: value for name, value in merge.shared.items() if name in ("lambda", "normalize")}
    for name in sorted(merge.own[merge.donors[0]].keys() - {"weight"}):
        values = merge.each(name)
        if name == "density":
            values = {donor: min(1.0, max(0.0, value)) for donor, value in values.items()}
        alike = len(set(values.values())) == 1
        knobs |= {name: min(values.values())} if alike else {f"{name}:{d}": value for d, value in values.items()}
    return merge.each("weight"), knobs


def _without_rescale(merge: Merge) -> Said:
    if merge.shared["rescale"]:
        raise CannotSayError("rescaling is not here for this method; the nearest is dare_ties, or a lambda", "rescale")
    return _sparse(merge)


def _with_rescale(merge: Merge) -> Said:
    coefficients, knobs = _sparse(merge)
    return coefficients, {**knobs, "rescale": merge.shared["rescale"]}


def _slerp(merge: Merge) -> Said:
    return {merge.donors[0]: merge.shared["t"]}, {}


def _nuslerp(merge: Merge) -> Said:
    if not merge.shared["nuslerp_flatten"]:  # else nobody asks for rows
        raise CannotSayError(
            "slerp of single rows or columns is not here; the nearest is nuslerp_flatten: true", "nuslerp_flatten"
        )
    (_, w), (other, v) = merge.each("weight").items()
    t = 0.5 if abs(w + v) < 1e-6 else v / (w + v)
    if merge.base is not None:
        return {merge.donors[0]: 1.0 - t, other: t}, {"origin": 1.0}
    return _on_sphere({merge.donors[0]: 1.0 - t, other: t}, merge.origin)


def _multislerp(merge: Merge) -> Said:
    weights = merge.each("weight")
    if len(weights) == 1:
        return dict.fromkeys(weights, 1.0), {"origin": float(merge.base is not None)}
    total = sum(weights.values())
    if abs(total - 1) > 1e-6 and not merge.shared["normalize_weights"]:
        raise CannotSayError(f"the weights sum to {total:g}; expected 1, or normalize_weights: true", "weight")
    if abs(total) < 1e-8:
        raise CannotSayError("the weights sum to 0 and cannot be normalised", "weight")
    weights = {name: w / total for name, w in weights.items()}
    return (weights, {"origin": 1.0}) if merge.base is not None else _on_sphere(weights, merge.origin)


def _on_sphere(weights: dict[str, float], origin: str) -> Said:
    if min(weights.values()) < 0:
        raise CannotSayError("a negative weight without a base_model is not here; expected 0 or more", "weight")
    return _but(weights, origin), {}


def _karcher(merge: Merge) -> Said:
    shares = dict.fromkeys(merge.inputs, 1.0 / len(merge.inputs))
    n, tol = get_method("karcher").knobs["max_iter"].high, get_method("karcher").knobs["tol"].low
    closest = {"max_iter": min(merge.shared["max_iter"], n), "tol": max(merge.shared["tol"], tol)}
    return _but(shares, merge.origin), closest  # files ask for 1200 and 1e-10, which float32 does not tell from these


def _whole(merge: Merge) -> Said:
    knobs = {**merge.shared, **{n: min(1.0, v) for n, v in merge.shared.items() if n == "select_topk"}}
    return dict.fromkeys(merge.donors, 1.0), knobs


def _passthrough(merge: Merge) -> Said:
    (name,) = merge.inputs
    return {name: 1.0}, {"scale": merge.own[name]["scale"]}


def _but(weights: dict[str, float], origin: str) -> dict[str, float]:
    """Our recipe's base gets what the others leave over; where it is alone it is named, for rules name somebody."""
    others = {name: w for name, w in weights.items() if name != origin}
    return others or {origin: 1.0}


_TASK_VECTORS = {"normalize": False, "rescale": False, "lambda": 1.0}
_WEIGHT = {"weight": REQUIRED}
_SPARSE = {**_WEIGHT, "density": 1.0}
_PAIR = (2, 2)

DIALECTS: dict[str, Dialect] = {
    "linear": Dialect(_linear, Base.IGNORED, {"normalize": True}, _WEIGHT),
    "task_arithmetic": Dialect(_task_arithmetic, shared=_TASK_VECTORS, own=_WEIGHT),
    "ties": Dialect(_without_rescale, shared={**_TASK_VECTORS, "normalize": True}, own=_SPARSE),
    "dare_linear": Dialect(_with_rescale, shared={**_TASK_VECTORS, "rescale": True}, own=_SPARSE),
    "dare_ties": Dialect(_with_rescale, shared={**_TASK_VECTORS, "rescale": True}, own=_SPARSE),
    "della": Dialect(
        _with_rescale,
        shared={**_TASK_VECTORS, "rescale": True, "normalize": True},
        own={**_SPARSE, "epsilon": 0.15},
    ),
    "della_linear": Dialect(_with_rescale, shared={**_TASK_VECTORS, "rescale": True}, own={**_SPARSE, "epsilon": 0.15}),
    "breadcrumbs": Dialect(_without_rescale, shared=_TASK_VECTORS, own={**_SPARSE, "gamma": 0.01}),
    "breadcrumbs_ties": Dialect(_without_rescale, shared=_TASK_VECTORS, own={**_SPARSE, "gamma": 0.01}),
    "slerp": Dialect(_slerp, shared={"t": REQUIRED}, n_inputs=_PAIR),
    "nuslerp": Dialect(
        _nuslerp,
        Base.OPTIONAL,
        {"nuslerp_row_wise": False, "nuslerp_flatten": True},
        _WEIGHT,
        n_donors=(2, 2),
    ),
    "multislerp": Dialect(_multislerp, Base.OPTIONAL, {"normalize_weights": True}, _WEIGHT),
    "karcher": Dialect(_karcher, Base.IGNORED, {"max_iter": 10.0, "tol": 1e-5}),
    "sce": Dialect(_whole, shared={"select_topk": 1.0}),
    "model_stock": Dialect(_whole, shared={"filter_wise": False}, n_inputs=(3, 1000)),
    "nearswap": Dialect(_whole, shared={"t": REQUIRED}, n_inputs=_PAIR),
    "arcee_fusion": Dialect(_whole, n_inputs=_PAIR),
    "ram": Dialect(_whole, shared={"epsilon": 1e-5}),
    "passthrough": Dialect(_passthrough, Base.IGNORED, {}, {"scale": 1.0}, n_inputs=(1, 1)),
}
"""Name -> how it reads."""

"""Merge methods: pure functions on float32 tensors, one a file.

They know nothing of checkpoints, names or dtypes. Shapes: D donors; a part is a matrix (R, C), rows being its
first dimension (a vector is one row); a merge sees one block (r, c) of it, every tensor of a call alike.

So that the same bits come out on a CPU and a GPU, and however a part is cut into blocks:
- products and sums are separate operations, each rounded once, never a fused multiply-add;
- a merge multiplies by `1.0 / x`, never divides by a number (CUDA would multiply by its reciprocal); what is measured
  beforehand divides by a tensor of it;
- what depends on a whole part (a threshold, a norm) is measured beforehand, in `Measure`;
- functions that libraries round differently (exp, log, acos) are taken in float64 while measuring.
"""

from __future__ import annotations

import functools
import keyword
import pkgutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evo.errors import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

METHODS = {
    "linear": "evo.merge.linear:LINEAR",
    "task_arithmetic": "evo.merge.task_arithmetic:TASK_ARITHMETIC",
    "ties": "evo.merge.ties:TIES",
    "dare_linear": "evo.merge.dare_linear:DARE_LINEAR",
    "dare_ties": "evo.merge.dare_ties:DARE_TIES",
    "della": "evo.merge.della:DELLA",
    "della_linear": "evo.merge.della_linear:DELLA_LINEAR",
    "breadcrumbs": "evo.merge.breadcrumbs:BREADCRUMBS",
    "breadcrumbs_ties": "evo.merge.breadcrumbs_ties:BREADCRUMBS_TIES",
    "slerp": "evo.merge.slerp:SLERP",
    "nuslerp": "evo.merge.nuslerp:NUSLERP",
    "multislerp": "evo.merge.multislerp:MULTISLERP",
    "karcher": "evo.merge.karcher:KARCHER",
    "sce": "evo.merge.sce:SCE",
    "model_stock": "evo.merge.model_stock:MODEL_STOCK",
    "nearswap": "evo.merge.nearswap:NEARSWAP",
    "arcee_fusion": "evo.merge.arcee_fusion:ARCEE_FUSION",
    "ram": "evo.merge.ram:RAM",
    "aoe": "evo.merge.aoe:AOE",
    "passthrough": "evo.merge.passthrough:PASSTHROUGH",
}
"""Name -> Method, as "module:attribute"."""


@dataclass(frozen=True)
class Knob:
    """A further number that a method takes, besides its coefficients."""

    default: float
    low: float
    high: float
    """Smallest and largest value that makes sense."""
    step: float = 0.0
    """A gene of this knob takes multiples of it; 0 for any value. 1 makes a switch or a count, which takes
    whole numbers only, searched or not."""
    per_donor: bool = False
    """Whether "NAME:DONOR" sets it for one donor; methods then get a tuple of D values."""

    def check(self, name: str, value: float) -> None:
        """Raise ValueError unless the knob can take this value."""
        if not self.low <= value <= self.high:
            raise ValueError(f"knob {name!r}: expected {self.low:g} to {self.high:g}, got {value!r}")
        if self.step == 1.0 and value != int(value):
            raise ValueError(f"knob {name!r}: expected a whole number, got {value!r}")


@dataclass(frozen=True)
class Stats:
    """What has been measured of a whole part. It does not depend on the coefficients, and it is small."""

    whole: Any = None
    """Numbers of the part."""
    rows: Tensor | None = None
    """Shape (R, K): numbers of each row."""

    def at(self, rows: slice) -> Stats:
        """The same for a block of rows."""
        return self if self.rows is None else Stats(self.whole, self.rows[rows])


@dataclass(frozen=True)
class Measure:
    """How a method looks at a whole part before it merges."""

    function: Callable[..., Stats]
    """function(donors, base, **knobs): matrices in their stored dtype -> what was measured. Independent of the
    order in which elements are visited."""
    knobs: tuple[str, ...] = ()
    """Names of the knobs that it takes."""
    per_donor: bool = False
    """Whether it looks at each donor by itself: then it gets one donor and that donor's knobs, and a merge
    gets a list of D Stats instead of one."""
    key: Callable[..., Hashable] = lambda **knobs: tuple(knobs.values())
    """key(**knobs): equal where the measured numbers are the same."""


@dataclass(frozen=True)
class Method:
    """A merge method."""

    merge: Callable[..., Tensor]
    """merge(donors, base, coefficients, **arguments): D float32 blocks, a float32 block, D numbers -> float32.
    Arguments are its knobs and, where it has them, `stats` and `noise`."""
    copy_of: Callable[..., int | None]
    """copy_of(coefficients, **knobs): the input that the result equals in exact arithmetic (0 the base, d + 1
    donor d), or None. There the stored bits are copied, since `base + (donor - base)` rounds."""
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    """Name -> knob. A name that Python keeps for itself is passed with a `_` behind it: lambda_."""
    measure: Measure | None = None
    """If set, a merge gets `stats`: one Stats, or a list of one a donor."""
    copy_once_measured: Callable[..., int | None] | None = None
    """copy_once_measured(coefficients, stats=stats, **knobs): as copy_of, where that takes a look at the part."""
    random: bool = False
    """Whether a merge gets `noise`: D blocks of uniform numbers from [0, 1), which depend on the recipe's seed,
    the donor, the part and the element only."""
    from_ancestor: bool = False
    """Whether the base is meant to be the model that the donors were trained from."""
    is_mixture: bool = False
    """Whether coefficients are shares of a mixture: c_d of donor d, the rest of the base."""

    def arguments(self, knobs: Mapping[str, float], donors: Sequence[str]) -> dict[str, Any]:
        """Knobs as keyword arguments of `merge` and `copy_of`: checked, and with defaults filled in.

        Args:
            knobs: "NAME" or "NAME:DONOR" -> value.
            donors: names of the D donors.

        Raises:
            ValueError: if a name is unknown or a value out of range.
        """
        for name, value in knobs.items():
            self.knob(name, donors).check(name, value)
        found: dict[str, Any] = {}
        for name, knob in self.knobs.items():
            value = knobs.get(name, knob.default)
            argument = f"{name}_" if keyword.iskeyword(name) else name
            found[argument] = tuple(knobs.get(f"{name}:{d}", value) for d in donors) if knob.per_donor else value
        return found

    def knob(self, name: str, donors: Sequence[str]) -> Knob:
        """The knob that "NAME" or "NAME:DONOR" means.

        Raises:
            ValueError: if there is none.
        """
        plain, colon, donor = name.partition(":")
        if plain not in self.knobs:
            expected = f"expected one of {', '.join(self.knobs)}" if self.knobs else "this method has none"
            raise ValueError(f"no knob is called {name!r}: {expected}{did_you_mean(plain, self.knobs)}")
        if colon and not self.knobs[plain].per_donor:
            raise ValueError(f"knob {name!r}: {plain!r} is one number for all donors")
        if colon and donor not in donors:
            raise ValueError(f"knob {name!r}: {donor!r} is no donor, expected one of {', '.join(donors)}")
        return self.knobs[plain]


@functools.cache
def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        ValueError: if there is no method of this name.
    """
    if name not in METHODS:
        raise ValueError(f"no merge method is called {name!r}: expected one of {', '.join(METHODS)}")
    method: Method = pkgutil.resolve_name(METHODS[name])
    return method


def one_hot(coefficients: Sequence[float], **_: object) -> int | None:
    """copy_of for methods that give the base at all 0 and donor d at a 1 among zeros."""
    active = [d for d, coefficient in enumerate(coefficients) if coefficient != 0.0]
    if not active:
        return 0
    return active[0] + 1 if len(active) == 1 and coefficients[active[0]] == 1.0 else None


def base_at_zero(coefficients: Sequence[float], **_: object) -> int | None:
    """copy_of for methods that add something to the base, but never all of a donor."""
    return None if any(coefficients) else 0

"""What the spherical methods share: they mix points with factors that depend on the points' inner products only.

Every such mean lies in the span of its points, so it is worked out in coordinates, D + 1 numbers, from the Gram
matrix of the points, in float64; a merge is then one weighted sum. Letters: P points, G (P, P) their Gram matrix.

The points are the base and the donors, seen from zero, with weights max(0, 1 - sum_d c_d) and c_d. With the knob
`origin` they are the donors' task vectors with weights c_d, seen from the base, which is added in the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from evo.merge import Knob, Measure, Stats
from evo.merge.statistics import gram
from evo.merge.task_vectors import weighted_sum

Gram = list[list[float]]

ORIGIN = Knob(0.0, 0.0, 1.0, step=1.0)
"""1: points are task vectors, seen from the base; 0: the base is a point like the donors."""


def inner_products(donors: Sequence[Tensor], base: Tensor, *, origin: float = 0.0) -> Stats:
    """Stats whose whole is the Gram matrix of the points."""
    return Stats((gram(donors, base) if origin else gram([base, *donors])).tolist())


ANGLES = Measure(inner_products, ("origin",))
ANGLES_FROM_ZERO = Measure(inner_products)


def weights(coefficients: Sequence[float], origin: float = 0.0) -> list[float]:
    """Weights of the points; they sum to 1, unless they cancel."""
    found = list(coefficients) if origin else [max(0.0, 1.0 - sum(coefficients)), *coefficients]
    total = sum(found)
    return [w / total for w in found] if abs(total) >= 1e-8 else found


def mix(donors: Sequence[Tensor], base: Tensor, factors: Sequence[float], origin: float = 0.0) -> Tensor:
    """The sum of the points, each times its factor."""
    if origin:
        return weighted_sum([donor - base for donor in donors], factors).add_(base)
    return weighted_sum([base, *donors], factors)


def copy_of_only(coefficients: Sequence[float], *, origin: float = 0.0, **_: object) -> int | None:
    """copy_of for means that give a point which alone has a weight, and the base if none has."""
    found = weights(coefficients, origin)
    alone = [p for p, w in enumerate(found) if w != 0.0]
    if not alone:
        return 0
    return alone[0] + bool(origin) if len(alone) == 1 and found[alone[0]] == 1.0 else None


def inner(x: Sequence[float], y: Sequence[float], g: Gram) -> float:
    """Inner product of two points that are given in coordinates."""
    return sum(a * b * g[i][j] for i, a in enumerate(x) for j, b in enumerate(y) if a and b)


def norm(x: Sequence[float], g: Gram) -> float:
    """Length of a point that is given in coordinates."""
    return math.sqrt(max(0.0, inner(x, x, g)))


def unit(p: int, n_points: int) -> list[float]:
    """Coordinates of point p."""
    return [float(q == p) for q in range(n_points)]


def arc(x: Sequence[float], y: Sequence[float], t: float, g: Gram, *, straight_from: float) -> list[float]:
    """Shoemake's slerp: sin((1 - t) theta) / sin(theta) x + sin(t theta) / sin(theta) y.

    Lengths are interpolated with the points, as mergekit has it. Points whose cosine is beyond +-straight_from
    have no arc to speak of and are interpolated linearly.
    """
    length = norm(x, g) * norm(y, g)
    cosine = min(1.0, max(-1.0, inner(x, y, g) / length)) if length > 0.0 else 0.0
    if abs(cosine) > straight_from:
        a, b = 1.0 - t, t
    else:
        theta = math.acos(cosine)
        a, b = math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    return [a * p + b * q for p, q in zip(x, y, strict=True)]

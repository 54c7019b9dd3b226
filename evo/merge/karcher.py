"""Weighted Karcher mean on the hypersphere (arXiv 2603.04972; H. Karcher, Riemannian center of mass, 1977)."""

import math
from collections.abc import Sequence

from torch import Tensor

from evo.merge import Knob, Method, Stats
from evo.merge.sphere import ANGLES, ORIGIN, Gram, copy_of_only, inner, mix, norm, unit, weights


def karcher(
    donors: Sequence[Tensor],
    base: Tensor,
    coefficients: Sequence[float],
    *,
    stats: Stats,
    origin: float,
    max_iter: float,
    tol: float,
) -> Tensor:
    """(sum_p w_p |x_p|) * mu: mu minimises sum_p w_p theta(mu, u_p)^2 over the directions u_p = x_p / |x_p|.

    Equal coefficients 1 / (D + 1) weigh base and donors alike (see `sphere`).
    """
    g, w = stats.whole, weights(coefficients, origin)
    lengths = [g[p][p] ** 0.5 for p in range(len(g))]
    seen = [p for p, length in enumerate(lengths) if length > 0.0]  # others have no direction
    total = sum(w[p] for p in seen)
    if not seen or total == 0.0:
        return mix(donors, base, w, origin)
    directions = [[x / lengths[p] for x in unit(p, len(g))] for p in seen]
    mean = _mean_direction(directions, [w[p] / total for p in seen], g, int(max_iter), tol)
    size = sum(weight * length for weight, length in zip(w, lengths, strict=True))
    return mix(donors, base, [size * x for x in mean], origin)


def _mean_direction(
    directions: Sequence[Sequence[float]], w: Sequence[float], g: Gram, max_iter: int, tol: float
) -> list[float]:
    """Gradient descent with step 1: mu <- exp_mu(sum_p w_p log_mu(u_p)), from the normalised mean."""
    mean = _sum(directions, w)
    size = norm(mean, g)
    mean = [x / size for x in mean] if size >= tol else list(directions[0])
    for _ in range(max_iter):
        cosines = [min(1.0, max(-1.0, inner(mean, u, g))) for u in directions]
        angles = [math.acos(c) for c in cosines]
        pulls = [
            weight * theta / math.sin(theta) if tol <= theta < math.pi else 0.0
            for weight, theta in zip(w, angles, strict=True)
        ]
        # log_mu(u) = theta / sin(theta) (u - cos(theta) mu)
        along = sum(pull * c for pull, c in zip(pulls, cosines, strict=True))
        tangent = [t - along * m for t, m in zip(_sum(directions, pulls), mean, strict=True)]
        step = norm(tangent, g)
        if step < tol:
            break
        moved = [math.cos(step) * m + math.sin(step) / step * t for m, t in zip(mean, tangent, strict=True)]
        size = norm(moved, g)  # 1, but for a tangent that is all rounding: opposite directions have no arc
        if size < 0.5:
            break
        mean = [x / size for x in moved]
    return mean


def _sum(points: Sequence[Sequence[float]], factors: Sequence[float]) -> list[float]:
    return [sum(f * x for f, x in zip(factors, column, strict=True)) for column in zip(*points, strict=True)]


KARCHER = Method(
    karcher,
    copy_of=copy_of_only,
    knobs={
        "origin": ORIGIN,
        "max_iter": Knob(10.0, 0.0, 1000.0, step=1.0),
        "tol": Knob(1e-5, 1e-9, 1e-1),
    },
    measure=ANGLES,
)

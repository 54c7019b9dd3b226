"""Multi-SLERP: barycentric interpolation on a hypersphere (mergekit's method, by C. Goddard, who describes it at
https://goddard.blog/posts/multislerp-wow-what-a-cool-idea).
"""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Method, Stats
from evo.merge.sphere import ANGLES, ORIGIN, copy_of_only, mix, norm, weights

_EPS = 1e-8


def multislerp(
    donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, stats: Stats, origin: float
) -> Tensor:
    """(sum_p w_p |x_p|) * m / |m|, with m = sum_p w_p x_p / |x_p| over the points (see `sphere`).

    The description goes on: project the points to the tangent space at m, average them there with the same
    weights, come back by the exponential map. That average, sum_p w_p (u_p - <u_p, m'> m') with m' = m / |m|,
    is m - <m, m'> m' = 0, so the mean direction is the result. Where the directions cancel (m = 0) lengths are
    averaged with them: sum_p w_p x_p.
    """
    g, w = stats.whole, weights(coefficients, origin)
    lengths = [g[p][p] ** 0.5 for p in range(len(g))]
    direction = [weight / (length + _EPS) for weight, length in zip(w, lengths, strict=True)]
    size = norm(direction, g)
    if size < _EPS:
        return mix(donors, base, w, origin)
    mean_length = sum(weight * length for weight, length in zip(w, lengths, strict=True))
    return mix(donors, base, [x * (mean_length / size) for x in direction], origin)


MULTISLERP = Method(multislerp, copy_of=copy_of_only, knobs={"origin": ORIGIN}, measure=ANGLES)

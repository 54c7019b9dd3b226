"""NuSLERP: slerp with weights, of models or of task vectors (mergekit's method; slerp is Shoemake's, 1985)."""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Method, Stats
from evo.merge.sphere import ANGLES, ORIGIN, arc, copy_of_only, mix, unit, weights


def nuslerp(
    donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, stats: Stats, origin: float
) -> Tensor:
    """Fold the points (see `sphere`) by slerp, each with the weight that it has among those so far.

    x_1 = p_1, x_i = slerp(x_{i-1}, p_i; t = w_i / (w_1 + ... + w_i)). Two points give mergekit's formula,
    t = w_2 / (w_1 + w_2). The whole tensor is one vector.
    """
    g, w = stats.whole, weights(coefficients, origin)
    if not any(w):
        return mix(donors, base, w, origin)
    point, total = unit(0, len(g)), w[0]
    for p in range(1, len(g)):
        total += w[p]
        t = w[p] / total if abs(total) >= 1e-6 else 0.5
        point = arc(point, unit(p, len(g)), t, g, straight_from=1.0 - 1e-16)
    return mix(donors, base, point, origin)


NUSLERP = Method(nuslerp, copy_of=copy_of_only, knobs={"origin": ORIGIN}, measure=ANGLES)

"""Spherical linear interpolation (Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985)."""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Method, Stats
from evo.merge.sphere import ANGLES_FROM_ZERO, arc, mix, unit


def slerp(donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, stats: Stats) -> Tensor:
    """Start at the base; each donor in turn pulls to itself, by the share c_d of the arc.

    x_0 = base, x_d = slerp(x_{d-1}, donor_d; t = c_d). The whole tensor is one vector. With cosines beyond
    +-0.9995 the arc is a line, mergekit's threshold.
    """
    g = stats.whole
    point = unit(0, len(g))
    for d, t in enumerate(coefficients, start=1):
        point = arc(point, unit(d, len(g)), t, g, straight_from=0.9995)
    return mix(donors, base, point)


def _copy_of(coefficients: Sequence[float], **_: object) -> int | None:
    """The last donor that pulls, if it pulls all the way."""
    for d in reversed(range(len(coefficients))):
        if coefficients[d] != 0.0:
            return d + 1 if coefficients[d] == 1.0 else None
    return 0


SLERP = Method(slerp, copy_of=_copy_of, measure=ANGLES_FROM_ZERO)

"""What a candidate promises that has answered some problems: the hypervolume that it is expected to add to a front.

Its mean losses over the split are Gaussian, independently, with an estimator's mean and standard error. Cut the box
into the cells of a grid through the members of the front; a cell that no member dominates gains the product of the
lengths that the candidate covers of its sides, whose expectations have a closed form. (Expected hypervolume
improvement: Emmerich, Yang, Deutz, Wang and Fonseca, A multicriteria generalization of Bayesian global optimization,
2016. Times the chance of being feasible: Schonlau, Welch and Jones 1998.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Promise:
    """A front, as it was at one moment."""

    front: Floats
    """Mean losses of its members, (K, M)."""
    box: Floats
    """Losses that the hypervolume is measured to, (M,), > 0; it is measured from zero."""
    limits: Floats
    """Losses above which a candidate is infeasible, (M,); infinite where there is no limit."""

    def of(self, mean: Floats, deviation: Floats) -> Floats:
        """Expected gain of each of N candidates, as a share of the box, (N,).

        Args:
            mean: estimates of their losses, (N, M).
            deviation: standard errors of these, (N, M).
        """
        sides, lowest = [], []
        for m, (their, size) in enumerate(zip(self.front.T / self.box[:, None], self.box, strict=True)):
            edges = np.unique([0.0, *their[their < 1.0], 1.0])
            covered = _below(edges, mean[:, m, None] / size, deviation[:, m, None] / size)
            sides.append(np.diff(covered, axis=1))  # (N, cells along m)
            lowest.append(edges[:-1])
        corners = np.stack(np.meshgrid(*lowest, indexing="ij"), axis=-1)[..., None, :]
        free = ~(self.front / self.box <= corners).all(axis=-1).any(axis=-1)
        gain = reduce(lambda a, b: a[..., None] * b.reshape(len(b), *[1] * (a.ndim - 1), -1), sides)
        feasible = ndtr((self.limits - mean) / np.maximum(deviation, _TINY)).prod(axis=1)
        return np.asarray((gain * free).reshape(len(mean), -1).sum(axis=1) * feasible)


def _below(edges: Floats, mean: Floats, deviation: Floats) -> Floats:
    """E max(0, edge - Y) for Gaussian Y."""
    deviation = np.maximum(deviation, _TINY)
    z = (edges - mean) / deviation
    return np.asarray(deviation * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) + (edges - mean) * ndtr(z))


_TINY = 1e-12

"""Pareto fronts and hypervolume, by moocore; losses are minimised.

Shapes: N points, M objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray


def nondominated(losses: ArrayLike) -> NDArray[np.bool_]:
    """Shape (N,): which of the points (N, M) no other point dominates; equal points do not dominate each other."""
    points = np.asarray(losses, float)
    if len(points) == 0:
        return np.zeros(0, bool)
    return np.asarray(moocore.is_nondominated(points, keep_weakly=True), bool)


@dataclass(frozen=True)
class Scale:
    """Maps losses to [0, 1] between an ideal and a reference point, so that objectives are comparable.

    The reference is error 1.0 and 1.1 times the wordiest parent's mean tokens: a fixed box that every
    useful model is in.
    """

    ideal: NDArray[np.float64]
    """Shape (M,), mapped to 0."""
    reference: NDArray[np.float64]
    """Shape (M,), mapped to 1."""

    @classmethod
    def of_parents(cls, objectives: tuple[str, ...], parents: ArrayLike) -> Scale:
        """The box for given objectives and the parents' losses (N, M)."""
        worst = np.asarray(parents, float).max(axis=0)
        reference = [1.0 if name == "error" else 1.1 * w for name, w in zip(objectives, worst, strict=True)]
        return cls(np.zeros(len(objectives)), np.array(reference))

    def __call__(self, losses: ArrayLike) -> NDArray[np.float64]:
        """Scaled losses, of the shape given."""
        scaled: NDArray[np.float64] = (np.asarray(losses, float) - self.ideal) / (self.reference - self.ideal)
        return scaled

    def hypervolume(self, losses: ArrayLike) -> float:
        """Share of the box that the points (N, M) dominate; points outside the box add nothing."""
        points = np.asarray(losses, float)
        if len(points) == 0:
            return 0.0
        return float(moocore.hypervolume(self(points), ref=np.ones(points.shape[1])))


def knee(losses: ArrayLike, scale: Scale) -> int:
    """Index of the point nearest to the ideal, in scaled losses; ties go to the lower first loss."""
    scaled = scale(losses)
    return int(np.lexsort((scaled[:, 0], np.linalg.norm(scaled, axis=1)))[0])

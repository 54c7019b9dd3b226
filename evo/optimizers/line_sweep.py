"""Evenly spaced points of the line between two parents: the baseline of arXiv 2510.10977."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge

from evo.optimizers import Outcome, SearchProblem
from search_spaces.genes import Genome


class LineSweep:
    """All points in one generation; then there is nothing left to try.

    Args:
        points: how many, both ends included.

    Raises:
        ValueError: if the space does not contain the line between its base and its donor.
    """

    def __init__(self, problem: SearchProblem, *, points: Annotated[int, Ge(2)] = 21) -> None:
        if problem.corners is None:
            raise ValueError("line_sweep needs a space that holds the line between two parents: use space 'line'")
        self.batch_size = points
        low, high = problem.corners
        self._points = [low + np.float32(t) * (high - low) for t in np.linspace(0.0, 1.0, points)]

    def ask(self, n: int) -> list[Genome]:
        """See Optimizer."""
        points, self._points = self._points[:n], self._points[n:]
        return points

    def tell(self, index: int, outcome: Outcome) -> None:
        """Learns nothing."""

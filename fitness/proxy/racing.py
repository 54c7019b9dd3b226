"""A race: after each block of problems, is there a member of the front that the candidate cannot beat?

A candidate beats a member if its mean loss over the split is lower by more than a tolerance, in some objective.
It stops when one and the same member is beaten in no objective, with the stated confidence: for each objective
the hypothesis "it is lower by the tolerance or more" is tested and rejected (an intersection-union test, which
needs no correction for the number of objectives; one for the number of members is made). So a front found by
racing misses nothing by more than the tolerance, in confidence.

What a member did on every problem is known. So is a floor: what no candidate can undercut (no error, no token)
or, for tokens, what is assumed of all: the briefest reference answer to each problem. A candidate that is seen
below that floor refutes it, and is raced on the bare one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fitness.proxy.betting import evidence
from fitness.proxy.order import Order

Floats = NDArray[np.float64]

GROWTH = 2.0
"""Each look at the race comes when this many times the problems of the look before have been answered."""


@dataclass(frozen=True)
class Race:
    """The rules of one run's race."""

    order: Order
    """Of problems."""
    tolerance: Floats
    """Differences of mean losses that are not worth a full evaluation, (M,), >= 0."""
    floor: Floats
    """On each problem the lowest loss that is assumed of any model, (P, M), >= 0."""
    alpha: float
    """How likely, at most, a candidate is stopped that beats every member."""

    def beaten_by(self, seen: Floats, members: Floats) -> int | None:
        """The position of a member that the candidate cannot beat, or None: it stays in the race.

        Args:
            seen: the candidate's losses on the first n problems of the order, (n, M).
            members: losses of the front's members on all problems in the split's own order, (K, P, M).
        """
        left, least = np.arange(len(members)), np.full(len(members), np.inf)
        for m in range(seen.shape[1]):
            if not len(left):
                return None
            least = np.minimum(least, self._evidence(seen[:, m], members[left, :, m], m))
            enough = least >= len(members) / self.alpha
            left, least = left[enough], least[enough]
        return int(left[least.argmax()]) if len(left) else None

    def _evidence(self, seen: Floats, members: Floats, objective: int) -> Floats:
        """Against "lower than this member's by the tolerance", for each member, (K,)."""
        problems, n_chosen = self.order.problems, self.order.n_chosen
        floor = self.floor[problems, objective]
        if (seen < floor[: len(seen)]).any():
            floor = np.zeros_like(floor)
        above, theirs = seen - floor[: len(seen)], members[:, problems] - floor
        bars = theirs.sum(axis=1) - self.tolerance[objective] * len(floor) - above[:n_chosen].sum()
        return evidence(above[n_chosen:], self.order.weights, bars, np.maximum(theirs[:, n_chosen:], 0.0))


def looks(first: int, n_problems: int) -> list[int]:
    """How many problems have been answered at each look, up to all of them.

    Args:
        first: at the first look.
        n_problems: of the split.
    """
    ends = [min(first, n_problems)]
    while ends[-1] < n_problems:
        ends.append(min(n_problems, max(ends[-1] + 1, int(GROWTH * ends[-1]))))
    return ends

"""In which order a split's problems are asked: first chosen ones, then all others by a weighted draw.

The order is one for all candidates, so every comparison is paired. The chosen ones are a census: what was seen
there is known, and generalised to nothing. The others come by sampling without replacement, each draw taking a
problem of those that remain with probability proportional to its weight, which tests on the rest are built on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fitness.proxy.kriging import Floats, informative

UNIFORM = 0.5
"""Share of the weights that all problems divide evenly: references do not know everything."""


@dataclass(frozen=True)
class Order:
    """The order of one run."""

    problems: NDArray[np.int64]
    """Positions of all problems of the split, (P,), in the order in which they are asked."""
    n_chosen: int
    """The first so many are chosen, the others drawn."""
    weights: Floats
    """Of the drawn ones, in the order of the draw, > 0, (P - n_chosen,)."""


def choose(references: Floats, n_chosen: int, seed: int) -> Order:
    """The order that reference models suggest.

    Args:
        references: their losses, (R, P, M), R >= 2.
        n_chosen: how many problems are chosen; 0 draws all of them.
        seed: of the draw.
    """
    n_problems = references.shape[1]
    chosen, deviation = informative(references, min(n_chosen, n_problems))
    rest = np.setdiff1d(np.arange(n_problems), chosen)
    share = deviation[rest] / deviation[rest].sum()
    weights = (1.0 - UNIFORM) * share + UNIFORM / max(1, len(rest))
    clocks = np.random.default_rng(seed).exponential(size=len(rest)) / weights  # Efraimidis and Spirakis 2006
    drawn = np.argsort(clocks)
    return Order(np.concatenate([chosen, rest[drawn]]), len(chosen), weights[drawn])

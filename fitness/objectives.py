"""Turns a score into the numbers that a search minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fitness.types import Score

OBJECTIVES: Mapping[str, Callable[[Score], float]] = {
    "error": lambda score: 1.0 - score.accuracy,
    "tokens": lambda score: score.tokens_mean,
}
"""Name -> loss of a score; lower is better."""


def losses(score: Score, objectives: Sequence[str]) -> NDArray[np.float64]:
    """Shape (n_objectives,), in the order asked for."""
    return np.array([OBJECTIVES[name](score) for name in objectives])


PER_PROBLEM: Mapping[str, Callable[[Score], NDArray[np.float64]]] = {
    "error": lambda score: 1.0 - score.correct.mean(axis=1),
    "tokens": lambda score: score.n_tokens.mean(axis=1),
}
"""Name -> losses of a score on each problem, (P,); their mean is the loss."""


def per_problem(score: Score, objectives: Sequence[str]) -> NDArray[np.float64]:
    """Shape (P, n_objectives), in the order asked for."""
    return np.stack([PER_PROBLEM[name](score) for name in objectives], axis=1)


def worst(objectives: Sequence[str], max_tokens: int) -> NDArray[np.float64]:
    """Losses of a model that solves nothing and never ends, (n_objectives,)."""
    return np.array([{"error": 1.0, "tokens": float(max_tokens)}[name] for name in objectives])

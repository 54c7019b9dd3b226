"""Losses on all problems as a Gaussian field whose covariance the reference models show.

The best linear predictor of the mean over the split from the problems seen so far (kriging; Bayesian
quadrature), and the order of problems that makes its variance fall fastest. One matrix holds what the choice
should look at: how divided the references are on a problem (its variance: for correctness p(1 - p), which ranks
as entropy does; for tokens the variance of the length), and how well it speaks for the others (its covariance
with their sum: discrimination).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUGGET = 0.2
"""Variance of a problem's own, beyond what references share, as a share of the mean variance of problems."""


UNDERSTATED = 1.5
"""By how much the field's own standard errors fall short: candidates err where no reference does. Measured in
experiments/proxy, where errors are 1.4 to 1.8 of them for 3 or 9 line points and 16 to 200 problems."""


class Kriging:
    """A predictor of mean losses. Biased towards the references where few problems have been seen.

    Args:
        references: losses of the reference models, (R, P, M), R >= 2.
        n_parents: how many of them, at the front, are parents; it makes no difference here.
        objectives: names of the M losses; they make no difference here.
    """

    def __init__(self, references: Floats, n_parents: int = 0, objectives: Sequence[str] = ()) -> None:
        self._mean = references.mean(axis=0)
        self._covariances = [_covariance(references[:, :, m]) for m in range(references.shape[2])]
        self._known: dict[bytes, list[_Field]] = {}  # candidates share an order, so few sets of problems occur

    def estimate(self, problems: NDArray[np.int64], losses: Floats) -> Floats:
        """Mean losses over the split, (M,).

        Args:
            problems: positions of the problems seen, (n,).
            losses: on these, (n, M).
        """
        away = losses - self._mean[problems]
        found = [field.weights @ away[:, m] for m, field in enumerate(self._fields(problems))]
        return np.asarray(self._mean.mean(axis=0) + found)

    def deviation(self, problems: NDArray[np.int64], losses: Floats) -> Floats:
        """Standard errors of the estimates, (M,); arguments as there. The candidate sets the field's scale."""
        away = losses - self._mean[problems]
        variances = [
            field.variance * (away[:, m] @ field.precision @ away[:, m]) / len(problems)
            for m, field in enumerate(self._fields(problems))
        ]
        return np.asarray(UNDERSTATED * np.sqrt(np.maximum(variances, 0.0)))

    def _fields(self, problems: NDArray[np.int64]) -> list[_Field]:
        fields = self._known.setdefault(problems.tobytes(), [])
        if not fields:
            fields += [_Field.given(covariance, problems) for covariance in self._covariances]
        return fields


@dataclass(frozen=True)
class _Field:
    """One objective's field, given n problems."""

    weights: Floats
    """What the mean over the split moves by when a problem seen moves by one, (n,)."""
    precision: Floats
    """Inverse covariance of the problems seen, (n, n)."""
    variance: float
    """Of the mean over the split that they leave."""

    @classmethod
    def given(cls, covariance: Floats, problems: NDArray[np.int64]) -> _Field:
        precision = np.asarray(np.linalg.inv(covariance[np.ix_(problems, problems)]), float)
        with_mean = covariance[problems].mean(axis=1)
        weights = precision @ with_mean
        return cls(weights, precision, float(covariance.mean() - weights @ with_mean))


def informative(references: Floats, n: int) -> tuple[NDArray[np.int64], Floats]:
    """The n problems that, one after another, leave least variance of the mean losses (greedy A-optimal design).

    Args:
        references: (R, P, M).
        n: how many.

    Returns:
        Their positions, (n,), and for every problem the standard deviation that is left, relative to the
        objective's scale and averaged over objectives, (P,).
    """
    left = [_covariance(references[:, :, m]) for m in range(references.shape[2])]
    left = [covariance / covariance.sum() for covariance in left]  # of the mean, 1 for each objective
    chosen: list[int] = []
    for _ in range(n):
        gain = sum(c.sum(axis=1) ** 2 / np.maximum(c.diagonal(), _TINY) for c in left)
        gain = np.asarray(gain)
        gain[chosen] = -1.0
        best = int((gain / gain.max()).round(9).argmax())  # ties of 0/1 losses are no matter of how a CPU rounds
        chosen.append(best)
        left = [c - np.outer(c[best], c[best]) / max(c[best, best], _TINY) for c in left]
    deviation = np.mean([np.sqrt(np.maximum(c.diagonal(), 0.0)) for c in left], axis=0)
    return np.array(chosen, np.int64), deviation


_TINY = 1e-12


def _covariance(losses: Floats) -> Floats:
    """Of the problems, over reference models (R, P); positive definite, with a nugget that makes it so."""
    away = losses - losses.mean(axis=0)
    covariance = away.T @ away / max(1, len(losses) - 1)
    nugget = NUGGET * covariance.diagonal().mean() + _TINY
    return np.asarray(covariance + nugget * np.eye(losses.shape[1]))

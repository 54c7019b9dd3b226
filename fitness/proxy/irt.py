"""MERGE3's estimator (arXiv 2502.10436): item response theory, with a child's ability a mixture of its parents'.

P(solved) = sigmoid(a_j . theta - b_j) for problem j; items and abilities are fitted to the reference models, the
mixture's shares to the problems that the child was seen on. mp-IRT fills in the others with the model; the
estimate is the even mean of that and of the plain mean of what was seen (gmp-IRT with c = 1/2). The paper has no
model of lengths: here a problem's tokens are the same mixture of the parents' tokens, shares by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DIMENSIONS = 2
PRIOR = 1.0
"""Standard deviation of the Gaussian priors, which few references need."""


class ItemResponse:
    """A predictor of mean losses; biased where the model is wrong, which it tells nothing of.

    Args:
        references: losses of the reference models, (R, P, M); the parents come first.
        n_parents: how many parents.
        objectives: names of the M losses; "error" is modelled by items, others by mixtures.
    """

    def __init__(self, references: Floats, n_parents: int, objectives: Sequence[str]) -> None:
        self._parents, self._objectives = references[:n_parents], objectives
        if "error" in objectives:
            solved = 1.0 - references[:, :, objectives.index("error")]
            self.items, abilities = _fit(solved)
            self._abilities = abilities[:n_parents]

    def estimate(self, problems: NDArray[np.int64], losses: Floats, weights: Floats | None = None) -> Floats:
        """Mean losses over the split, (M,); see Kriging.estimate.

        Args:
            problems: positions of the problems seen, (n,).
            losses: on these, (n, M).
            weights: of these in the plain mean, (n,); default: even.
        """
        estimates = []
        for m, name in enumerate(self._objectives):
            seen = losses[:, m]
            predicted = self._errors(problems, seen) if name == "error" else self._mixed(problems, seen, m)
            filled = predicted.copy()
            filled[problems] = seen
            estimates.append((np.average(seen, weights=weights) + filled.mean()) / 2)
        return np.array(estimates)

    def deviation(self, problems: NDArray[np.int64], losses: Floats) -> Floats:
        """Standard errors of plain means of a sample without replacement, (M,): the model has none of its own."""
        left = 1.0 - len(problems) / self._parents.shape[1]
        return np.asarray(np.sqrt(left * losses.var(axis=0) / max(1, len(problems) - 1)))

    def _errors(self, problems: NDArray[np.int64], seen: Floats) -> Floats:
        slopes = self.items[:, :-1] @ self._abilities.T  # (P, parents): logits are linear in the shares
        offsets = self.items[:, -1]
        n = slopes.shape[1]
        even = np.full(n, 1.0 / n)
        shares = _logistic(slopes[problems], 1.0 - seen, offsets[problems], even)
        return 1.0 - _sigmoid(slopes @ shares - offsets)

    def _mixed(self, problems: NDArray[np.int64], seen: Floats, objective: int) -> Floats:
        theirs = self._parents[:, :, objective].T  # (P, parents)
        scale = max(1.0, float(np.abs(theirs).mean()))
        even = np.full(theirs.shape[1], 1.0 / theirs.shape[1])
        a, y = theirs[problems] / scale, (seen - theirs[problems] @ even) / scale
        shares = even + np.linalg.solve(a.T @ a + 1e-3 * np.eye(len(even)), a.T @ y)
        return np.asarray(theirs @ shares)


def _fit(solved: Floats, rounds: int = 30) -> tuple[Floats, Floats]:
    """Items (P, D + 1), slopes then difficulty, and abilities (R, D) of highest posterior, one given the other."""
    n_models, n_items = solved.shape
    u, s, _ = np.linalg.svd(solved - solved.mean(axis=0), full_matrices=False)
    abilities = np.zeros((n_models, DIMENSIONS))
    k = min(DIMENSIONS, n_models)
    abilities[:, :k] = u[:, :k] * np.sqrt(n_models) * np.sign(s[:k])
    items = np.zeros((n_items, DIMENSIONS + 1))
    for _ in range(rounds):
        design = np.column_stack([abilities, -np.ones(n_models)])
        zero = np.zeros(n_models)
        items = np.array(
            [
                _logistic(design, y, zero, np.zeros(DIMENSIONS + 1), item, 1)
                for item, y in zip(items, solved.T, strict=True)
            ]
        )
        abilities = np.array(
            [
                _logistic(items[:, :-1], y, items[:, -1], np.zeros(DIMENSIONS), theta, 1)
                for theta, y in zip(abilities, solved, strict=True)
            ]
        )
    return items, abilities


def _logistic(
    design: Floats, y: Floats, offset: Floats, prior: Floats, start: Floats | None = None, steps: int = 20
) -> Floats:
    """Coefficients x of highest posterior of y ~ Bernoulli(sigmoid(design x - offset)), by damped Newton steps."""
    x = prior.copy() if start is None else start
    for _ in range(steps):
        p = _sigmoid(design @ x - offset)
        gradient = design.T @ (y - p) - (x - prior) / PRIOR**2
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + np.eye(len(x)) / PRIOR**2
        step = np.linalg.solve(hessian, gradient)
        x = x + step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
    return x


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -30.0, 30.0))))

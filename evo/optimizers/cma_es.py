"""CMA-ES (Hansen, arXiv 1604.00772) by pycma, on an augmented Tchebycheff scalarisation.

f(x) = max_m w_m z_m(x) + rho * sum_m w_m z_m(x), with z the losses scaled between ideal and reference
(Steuer and Choo 1983). The weights say which point of the front one run goes to.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

from evo.optimizers import Outcome, SearchProblem
from evo.optimizers.batched import Batched
from search_spaces.genes import Genome

_DIAGONAL_ABOVE = 1000  # genes; full covariance costs G^2 memory and G^3 time
_INFEASIBLE, _FAILED = 1e3, 1e6  # CMA-ES uses ranks only: these sort after every feasible f, by violation


class CmaEs(Batched):
    """One CMA-ES that restarts from a random mean when it has converged.

    Args:
        population: genomes a generation; default pycma's 4 + floor(3 ln G).
        sigma: first step size, in genes.
        weights: one weight per objective, larger = more important; they are normalised.
        rho: of the augmentation.
        start: the first mean: the best of parents and baselines, or the center of the box.

    Raises:
        ValueError: if there are not as many weights as objectives.
    """

    def __init__(
        self,
        problem: SearchProblem,
        *,
        population: Annotated[int, Ge(2)] | None = None,
        sigma: Annotated[float, Gt(0), Le(1)] = 0.3,
        weights: Sequence[float] | None = None,
        rho: Annotated[float, Ge(0)] = 0.05,
        start: Literal["best", "center"] = "best",
    ) -> None:
        super().__init__(population or 4 + int(3 * math.log(problem.n_genes)))
        self._asked: deque[tuple[Any, list[NDArray[np.float64]]]] = deque()
        self._problem = problem
        n_objectives = len(problem.scale.reference)
        self._weights = np.array(weights if weights is not None else [1.0] * n_objectives, float)
        if self._weights.shape != (n_objectives,) or not (self._weights > 0).all():
            raise ValueError(f"optimizer.weights: expected {n_objectives} positive numbers, got {weights}")
        self._weights /= self._weights.sum()
        self._rho, self._sigma = rho, sigma
        self._rng = np.random.default_rng(problem.seed)
        best = min(problem.starts, key=lambda s: self.scalarise(s.outcome), default=None) if start == "best" else None
        self._es = self._start(np.full(problem.n_genes, 0.5) if best is None else best.genome)

    def ask_batch(self) -> list[Genome]:
        """See Batched."""
        if self._es.stop():
            self._es = self._start(self._rng.random(self._problem.n_genes))
        points = self._es.ask()
        self._asked.append((self._es, points))
        return [np.clip(x, 0.0, 1.0).astype(np.float32) for x in points]

    def tell_batch(self, outcomes: Sequence[Outcome]) -> None:
        """See Batched."""
        es, points = self._asked.popleft()
        es.tell(points, [self.scalarise(outcome) for outcome in outcomes])

    def scalarise(self, outcome: Outcome) -> float:
        """F of an outcome: feasible ones by losses, then infeasible ones by violation, then failed ones."""
        if outcome.losses is None:
            return _FAILED
        if outcome.violation > 0:
            return _INFEASIBLE + outcome.violation
        weighted = self._weights * self._problem.scale(outcome.losses)
        return float(weighted.max() + self._rho * weighted.sum())

    def _start(self, mean: NDArray[np.floating[Any]]) -> Any:
        import cma

        n = self._problem.n_genes
        options = {
            "popsize": self.batch_size,
            "bounds": [0.0, 1.0],
            "CMA_diagonal": n > _DIAGONAL_ABOVE,
            # pycma draws from numpy's global generator unless it is given one of our own.
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "seed": math.nan,
            "verbose": -9,
        }
        if n == 1:  # pycma keeps steps below a third of the box by scaling axes, and raises where there is one
            options["maxstd_boundrange"] = math.inf
        return cma.CMAEvolutionStrategy(np.asarray(mean, float), self._sigma, options)

"""Uniform random genomes: the baseline that any optimizer must beat."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge

from evo.optimizers import Outcome, SearchProblem
from search_spaces.genes import Genome


class RandomSearch:
    """Each gene uniform in [0, 1], independently.

    Args:
        population: genomes a generation.
    """

    def __init__(self, problem: SearchProblem, *, population: Annotated[int, Ge(1)] = 16) -> None:
        self.batch_size = population
        self._n_genes = problem.n_genes
        self._rng = np.random.default_rng(problem.seed)

    def ask(self, n: int) -> list[Genome]:
        """See Optimizer."""
        return list(self._rng.random((n, self._n_genes), dtype=np.float32))

    def tell(self, index: int, outcome: Outcome) -> None:
        """Learns nothing."""

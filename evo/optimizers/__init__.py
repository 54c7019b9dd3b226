"""Optimizers: what to try next. One a file, ask/tell on plain arrays.

They know genomes and losses; nothing of models, recipes, files or MLflow. Shapes: G genes, M objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evo.pareto import Scale
from search_spaces.genes import Genome

OPTIMIZERS = {
    "cma_es": "evo.optimizers.cma_es:CmaEs",
    "nsga2": "evo.optimizers.nsga2:Nsga2",
    "random": "evo.optimizers.random_search:RandomSearch",
    "line_sweep": "evo.optimizers.line_sweep:LineSweep",
}
"""Name -> class(problem, **options), keyword-only options being the config's keys."""


@dataclass(frozen=True)
class Outcome:
    """What an optimizer is told of a candidate, as what it is."""

    losses: NDArray[np.float64] | None
    """Shape (M,), or None if it could not be measured."""
    violation: float = 0.0
    """Sum of constraint violations; 0 is feasible."""


@dataclass(frozen=True)
class Start:
    """A genome that has been evaluated before the search begins."""

    genome: Genome
    outcome: Outcome


@dataclass(frozen=True)
class SearchProblem:
    """What an optimizer is told before it starts."""

    n_genes: int
    scale: Scale
    """Makes losses comparable; fixed for the run."""
    seed: int
    starts: tuple[Start, ...] = ()
    """Parents and baselines, where the space has them."""
    corners: tuple[Genome, Genome] | None = None
    """Genomes of the two ends of the line, where the space has them."""


class Optimizer(Protocol):
    """Proposes genomes.

    With the same seed and the same asks and tells in the same order, an optimizer proposes the same
    genomes: this is how a run resumes.
    """

    batch_size: int
    """How many proposals make the next generation."""

    def ask(self, n: int) -> list[Genome]:
        """Propose the next n genomes; fewer, or none, when there is nothing left to try.

        CMA-ES is told of a generation before it is asked for the next: pycma takes one tell for each ask.
        """
        ...

    def tell(self, index: int, outcome: Outcome) -> None:
        """Take the outcome of a proposal, counted from 0 over all asks. In any order."""
        ...

"""Genes, genomes and the protocol that every search space keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from search_spaces.recipe import Recipe

Genome = NDArray[np.float32]
"""Shape (n_genes,), every gene in [0, 1]. One scale for all genes, because optimizers step in it."""


@dataclass(frozen=True)
class Gene:
    """One searched number."""

    name: str
    """Where it acts, e.g. "block3.attention:reasoner"."""
    low: float = 0.0
    """Coefficient at gene 0."""
    high: float = 1.0
    """Coefficient at gene 1."""
    step: float = 0.0
    """Coefficients are rounded to its nearest multiple within [low, high]; 0 for no rounding."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"gene {self.name}: expected low < high, got {self.low} and {self.high}")

    def value(self, gene: float) -> float:
        """Coefficient of a gene in [0, 1]; without a step exactly `low` at 0 and `high` at 1."""
        value = (1.0 - gene) * self.low + gene * self.high
        return min(max(round(value / self.step) * self.step, self.low), self.high) if self.step else value

    def gene(self, value: float) -> float | None:
        """Inverse of `value`, or None where the coefficient lies outside [low, high]."""
        return (value - self.low) / (self.high - self.low) if self.low <= value <= self.high else None


class SearchSpace(Protocol):
    """What may vary: a set of genes, and what a genome of them means."""

    genes: tuple[Gene, ...]

    def decode(self, genome: Genome) -> Recipe:
        """The recipe of a genome.

        Raises:
            ValueError: unless `genome` has shape (n_genes,) and lies in [0, 1].
        """
        ...

    def uniform(self, shares: Mapping[str, float]) -> Genome | None:
        """The genome of the plain mixture that gives each source the same share everywhere.

        Args:
            shares: source name -> share; a source that is left out has share 0.

        Returns:
            shape (n_genes,), or None where the space cannot express this mixture exactly.
        """
        ...

    def swaps(self) -> dict[str, Genome]:
        """Recipes in the manner of R1T-Chimera: one set of roles from the first donor and the rest from the base
        ("only-ROLES"), or the other way round ("but-ROLES"). Empty where the space does not tell roles apart or
        its method does not mix linearly.
        """
        ...


def check_genome(genome: Genome, n_genes: int) -> None:
    """Raise ValueError unless a genome has shape (n_genes,) and every gene lies in [0, 1]."""
    if genome.shape != (n_genes,):
        raise ValueError(f"expected a genome of shape ({n_genes},), got {genome.shape}")
    if not np.all((genome >= 0.0) & (genome <= 1.0)):  # also catches NaN
        raise ValueError(f"every gene must lie in [0, 1], got {genome.min()} to {genome.max()}")

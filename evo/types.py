"""Candidates and what became of them: the data that optimizers, ledger and reports exchange."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fitness.types import Score
from search_spaces.genes import Genome
from search_spaces.recipe import Recipe


class Origin(StrEnum):
    """Where a candidate comes from."""

    PARENT = "parent"
    """One of the checkpoints that are merged, unchanged."""
    BASELINE = "baseline"
    """A plain merge that any search has to beat."""
    SEARCH = "search"
    """Proposed by the optimizer."""


class Status(StrEnum):
    """How an evaluation ended. An infeasible candidate is DONE: it was measured, and found wanting."""

    DONE = "done"
    FAILED = "failed"
    """Could not be measured; `detail` says why. Never on a front."""
    PARTIAL = "partial"
    """Stopped or parked by the proxy before all problems were asked; losses are an estimate. Never on a front."""


@dataclass(frozen=True)
class Candidate:
    """One point of the search space, with its lineage."""

    id: int
    """Position in the order of proposals, from 0."""
    name: str
    """What tables call it: a parent's name, "average", "line-0.25", or "c17"."""
    origin: Origin
    generation: int
    """0 for parents and baselines, then 1, 2, ..."""
    recipe: Recipe
    genome: Genome | None = None
    """None where the space cannot express the recipe."""
    parents: tuple[int, ...] = ()
    """Candidates that it was bred from, where the optimizer says so."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome of evaluating one candidate on one split."""

    candidate_id: int
    status: Status
    seconds: float
    losses: NDArray[np.float64] | None = None
    """Shape (n_objectives,), lower is better; None if failed."""
    violations: dict[str, float] = field(default_factory=dict)
    """Constraint -> by how much it is violated (> 0). Empty: feasible."""
    score: Score | None = None
    """Of a partial evaluation: on the problems that were asked, in the order in which they were."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Seconds by phase, tensors written, sample completions, or the reason of a failure."""

"""What makes a candidate infeasible, in one place."""

from __future__ import annotations

from collections.abc import Sequence

from evo.config import Constraints
from evo.front import Row
from evo.types import Evaluation, Origin, Status


def accuracy_floor(constraints: Constraints, parents: Sequence[Row]) -> float:
    """What a candidate must reach: the worst parent's accuracy less some of its standard errors."""
    worst = min((row.search.summary or {} for row in parents), key=lambda summary: float(summary["accuracy"]))
    return float(worst["accuracy"] - constraints.accuracy_floor_stderrs * worst["accuracy_stderr"])


def violations(
    evaluation: Evaluation,
    origin: Origin,
    objectives: Sequence[str],
    constraints: Constraints,
    parents: Sequence[Row],
) -> dict[str, float]:
    """By how much each constraint is violated, on the search split; empty if none is.

    A candidate that lost the race is measured by its member alone. A parked one is measured by its estimate, and by
    what was cut off as a share of the whole split, which is certain: the problems that it was asked were chosen for
    being long as well. Parents define the accuracy floor, so it is not asked of them.

    Args:
        evaluation: of a candidate.
        origin: of the candidate.
        objectives: what its losses are.
        constraints: of the run.
        parents: of the run, as far as they have been scored.
    """
    if evaluation.status is Status.PARTIAL and "promise" not in evaluation.detail:
        return {"collapsed": 1.0} if evaluation.detail["stopped_by"] is None else {}
    if evaluation.score is None or evaluation.losses is None:
        return {}
    accuracy, truncated = evaluation.score.accuracy, evaluation.score.truncated
    if evaluation.status is Status.PARTIAL:
        truncated *= evaluation.score.n_problems / max(int((row.search.summary or {})["n_problems"]) for row in parents)
        if "error" in objectives:
            accuracy = 1.0 - float(evaluation.losses[objectives.index("error")])
    found = {"truncated": truncated - constraints.max_truncated}
    if origin is not Origin.PARENT:
        found["accuracy"] = accuracy_floor(constraints, parents) - accuracy
    return {name: amount for name, amount in found.items() if amount > 0}

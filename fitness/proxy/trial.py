"""One candidate's way through the proxy: look after look, until it is stopped or has answered everything.

Plain data, made when the candidate is handed to a worker: which members were on the front then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fitness.objectives import per_problem
from fitness.proxy.racing import Race, looks
from fitness.proxy.screen import Screen
from fitness.types import Score

Floats = NDArray[np.float64]


class Estimator(Protocol):
    """Estimates mean losses over a split from some of its problems."""

    def estimate(self, problems: NDArray[np.int64], losses: Floats) -> Floats:
        """From losses (n, M) on n problems of the split to mean losses over all of them, (M,)."""
        ...


@dataclass(frozen=True)
class Stop:
    """Why a candidate went no further."""

    reason: str
    losses: Floats
    """What to tell of it, (M,)."""
    member: int | None = None
    """Id of the member of the front that it cannot beat; None if it has collapsed."""


@dataclass(frozen=True)
class Trial:
    """The rules for one candidate."""

    objectives: tuple[str, ...]
    race: Race
    racing: bool
    """Whether the race stops anybody; the order and the looks are the same without."""
    screen: Screen
    estimator: Estimator
    ids: tuple[int, ...]
    """Of the front's members."""
    members: Floats
    """Their losses on all problems of the split, (K, P, M)."""
    worst: Floats
    """Losses of a model that answers nothing and never ends, (M,)."""
    first: int
    """Problems at the first look."""

    def blocks(self) -> list[NDArray[np.int64]]:
        """Positions of the problems that are asked before each look, in order."""
        ends = looks(self.first, len(self.race.order.problems)) if self.racing else [len(self.race.order.problems)]
        if self.screen.n_problems and self.screen.n_problems < ends[0]:
            ends = [self.screen.n_problems, *ends]
        return np.split(self.race.order.problems, ends[:-1])

    def judge(self, score: Score, problems: NDArray[np.int64]) -> Stop | None:
        """Whether to stop after some problems.

        Args:
            score: on the problems asked so far, in the order of the race.
            problems: their positions in the split, (n,).
        """
        if len(problems) < len(self.race.order.problems) and (reason := self.screen.collapsed(score, problems)):
            return Stop(f"collapsed: {reason}", self.worst)
        if not self.racing or not self.first <= len(problems) < len(self.race.order.problems):
            return None  # too early, or all is known
        seen = per_problem(score, self.objectives)
        found = self.race.beaten_by(seen, self.members)
        if found is None:
            return None
        member = self.members[found]
        return Stop(
            f"cannot beat candidate {self.ids[found]}, after {len(problems)} of {len(member)} problems",
            np.maximum(self.paired(seen, problems, member), member.mean(axis=0)),
            self.ids[found],
        )

    def paired(self, seen: Floats, problems: NDArray[np.int64], member: Floats) -> Floats:
        """The member's losses plus the estimated difference to it, (M,)."""
        difference = self.estimator.estimate(problems, seen) - self.estimator.estimate(problems, member[problems])
        return np.asarray(member.mean(axis=0) + difference)


def joined(scores: Sequence[Score]) -> Score:
    """Scores of blocks as one, in the order given."""
    return Score(
        problem_ids=tuple(id for score in scores for id in score.problem_ids),
        verdicts=np.concatenate([score.verdicts for score in scores]),
        n_tokens=np.concatenate([score.n_tokens for score in scores]),
        n_think_tokens=np.concatenate([score.n_think_tokens for score in scores]),
        orderliness={
            name: np.concatenate([score.orderliness[name] for score in scores]) for name in scores[0].orderliness
        },
    )

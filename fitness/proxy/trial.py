"""One candidate's way through the proxy: look after look, until it is stopped, is parked or has answered everything.

Plain data, made when the candidate is handed to a worker: which members were on the front then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fitness.objectives import per_problem
from fitness.proxy.promise import Promise
from fitness.proxy.racing import Race, looks
from fitness.proxy.screen import Screen
from fitness.types import Score

Floats = NDArray[np.float64]


class Estimator(Protocol):
    """Estimates mean losses over a split from some of its problems."""

    def estimate(self, problems: NDArray[np.int64], losses: Floats) -> Floats:
        """From losses (n, M) on n problems of the split to mean losses over all of them, (M,)."""
        ...

    def deviation(self, problems: NDArray[np.int64], losses: Floats) -> Floats:
        """Standard errors of these, (M,)."""
        ...


@dataclass(frozen=True)
class Stop:
    """Why a candidate went no further."""

    reason: str
    losses: Floats
    """What to tell of it, (M,)."""
    member: int | None = None
    """Id of the member of the front that it cannot beat, if that is why."""
    promise: float | None = None
    """What it promised when it was parked, if that is why: it may be asked the other problems later."""


@dataclass(frozen=True)
class Answered:
    """What a parked candidate has answered."""

    score: Score
    problems: NDArray[np.int64]
    """Positions in the split, in the order of the score, (n,)."""


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
    promise: Promise
    enough: float = 0.0
    """Gain of hypervolume that must be expected of a candidate at a look, else it is parked; 0 parks nobody."""
    before: Answered | None = None
    """Of a candidate that was parked and goes on."""

    def blocks(self) -> list[NDArray[np.int64]]:
        """Positions of the problems that are asked before each look, in order."""
        n_problems = len(self.race.order.problems)
        ends = looks(self.first, n_problems) if self.racing or self.enough else [n_problems]
        if self.screen.n_problems and self.screen.n_problems < ends[0]:
            ends = [self.screen.n_problems, *ends]
        done = len(self.before.problems) if self.before else 0
        ends = [end for end in ends if end > done]
        return np.split(self.race.order.problems, [done, *ends[:-1]])[1:]

    def judge(self, score: Score, problems: NDArray[np.int64]) -> Stop | None:
        """Whether to stop after some problems.

        Args:
            score: on the problems asked so far, in the order of the race.
            problems: their positions in the split, (n,).
        """
        if len(problems) == len(self.race.order.problems):
            return None
        if reason := self.screen.collapsed(score, problems):
            return Stop(f"collapsed: {reason}", self.worst)
        if len(problems) < self.first:
            return None
        return self.beaten(score, problems) or self._parked(per_problem(score, self.objectives), problems)

    def beaten(self, score: Score, problems: NDArray[np.int64]) -> Stop | None:
        """Whether the race is lost; arguments as there."""
        seen = per_problem(score, self.objectives)
        found = self.race.beaten_by(seen, self.members) if self.racing else None
        if found is None:
            return None
        member = self.members[found]
        return Stop(
            f"cannot beat candidate {self.ids[found]}, after {len(problems)} of {len(member)} problems",
            np.maximum(self.paired(seen, problems, member), member.mean(axis=0)),
            member=self.ids[found],
        )

    def paired(self, seen: Floats, problems: NDArray[np.int64], member: Floats) -> Floats:
        """The member's losses plus the estimated difference to it, (M,)."""
        difference = self.estimator.estimate(problems, seen) - self.estimator.estimate(problems, member[problems])
        return np.asarray(member.mean(axis=0) + difference)

    def _parked(self, seen: Floats, problems: NDArray[np.int64]) -> Stop | None:
        mean, deviation = self.estimator.estimate(problems, seen), self.estimator.deviation(problems, seen)
        promised = float(self.promise.of(mean[None], deviation[None])[0])
        if promised >= self.enough:
            return None
        told = ", ".join(f"{name} {value:.3g}" for name, value in zip(self.objectives, mean, strict=True))
        return Stop(
            f"parked after {len(problems)} of {len(self.race.order.problems)} problems: {told} estimated, "
            f"promises {promised:.2g} of the box",
            mean,
            promise=promised,
        )


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

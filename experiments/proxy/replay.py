"""A search with the proxy on recorded answers: what evo.loop, evo.proxy and fitness.proxy.trial do with a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum

import numpy as np
from recording import Floats, Pool

from evo.pareto import nondominated
from fitness.proxy.kriging import Kriging
from fitness.proxy.order import choose
from fitness.proxy.promise import Promise
from fitness.proxy.racing import Race, looks


def front(losses: Floats) -> Floats:
    """Those of some models, (N, P, 2), whose means no other's dominate."""
    return losses[nondominated(losses.mean(axis=1))]


def beats_all(losses: Floats, members: Floats, tolerance: Floats) -> bool:
    """Whether a model, (P, 2), is better than each of the members, (K, P, 2), by the tolerance in some objective."""
    return bool((losses.mean(axis=0) < members.mean(axis=1) - tolerance).any(axis=1).all())


class State(Enum):
    """What has become of a candidate."""

    OPEN = 0
    """Still racing, or parked."""
    STOPPED = 1
    FULL = 2


class Replay:
    """Candidates are proposed in their order; any of them can be asked on.

    Args:
        pool: the candidates' answers.
        references: losses of parents and line points, (R, P, 2).
        box: the hypervolume's, (2,).
        seed: of the order of problems.
        chosen: problems; 0 for none.
        tolerance: see evo.config.ProxyConfig, like the next two.
        alpha: of the race.
        parks: whether candidates are parked, or race to the end.
        seconds: of a block, from its tokens.
    """

    def __init__(
        self,
        pool: Pool,
        references: Floats,
        box: Floats,
        seed: int,
        *,
        chosen: int,
        tolerance: float,
        alpha: float,
        parks: bool,
        seconds: Callable[[Floats], float],
    ) -> None:
        n_candidates, n_problems = pool.losses.shape[:2]
        floor = np.stack([np.zeros(n_problems), references[:, :, 1].min(axis=0)], axis=1)
        self._losses, self._box, self._tolerance, self._parks = pool.losses, box, tolerance * box, parks
        self._order = choose(references, chosen, seed)
        self._ends, self._seconds = looks(chosen or 16, n_problems), seconds
        self._race, self._estimator = Race(self._order, self._tolerance, floor, alpha), Kriging(references)
        self._state, self._n_asked = np.full(n_candidates, State.OPEN), np.zeros(n_candidates, int)
        self.members = front(references)
        """Losses of the front's members, (K, P, 2)."""
        self.estimates, self.deviations = np.zeros((2, n_candidates, 2))
        """At the last look before the full split."""
        self.tokens = np.zeros(n_candidates)
        """That each candidate took."""
        self.tokens_later = 0.0
        """Those of parked candidates that went on."""
        self.seconds_spent = sum(seconds(reference[:, 1]) for reference in references)
        self.decision_seconds, self.n_wrong = 0.0, 0

    def propose(self, i: int) -> None:
        """A new candidate: parked at the first look, if any are."""
        self._look(i)
        while self._state[i] is State.OPEN and not self._parks:
            self._look(i)

    def go_on(self, enough: float) -> bool:
        """The most promising parked candidate, while it promises enough; whether there was one."""
        parked = np.flatnonzero((self._state == State.OPEN) & (self._n_asked > 0))
        if not len(parked):
            return False
        promised = self._promise(parked)
        if promised.max() < enough:
            return False
        i = int(parked[promised.argmax()])
        before = self.tokens[i]
        self._judge(i)  # the front has moved since
        while self._state[i] is State.OPEN and self._promise(np.array([i]))[0] >= enough:
            self._look(i)
        self.tokens_later += self.tokens[i] - before
        return True

    def share_of(self, state: State) -> float:
        """Of all candidates."""
        return float((self._state == state).mean())

    def _look(self, i: int) -> None:
        start = self._n_asked[i]
        end = next(end for end in self._ends if end > start)
        block, self._n_asked[i] = self._losses[i, self._order.problems[start:end]], end
        self.tokens[i] += block[:, 1].sum()
        self.seconds_spent += self._seconds(block[:, 1])
        if end == self._losses.shape[1]:
            self._state[i] = State.FULL
            self.members = front(np.concatenate([self.members, self._losses[i][None]]))
        else:
            self._judge(i)

    def _judge(self, i: int) -> None:
        asked, start = self._order.problems[: self._n_asked[i]], time.perf_counter()
        seen = self._losses[i, asked]
        beaten = self._race.beaten_by(seen, self.members) is not None
        self.estimates[i], self.deviations[i] = (
            self._estimator.estimate(asked, seen),
            self._estimator.deviation(asked, seen),
        )
        self.decision_seconds += time.perf_counter() - start
        if beaten:
            self._state[i] = State.STOPPED
            self.n_wrong += beats_all(self._losses[i], self.members, self._tolerance)

    def _promise(self, candidates: np.ndarray) -> Floats:
        start = time.perf_counter()
        promise = Promise(self.members.mean(axis=1), self._box, np.full(2, np.inf))
        found = promise.of(self.estimates[candidates], self.deviations[candidates])
        self.decision_seconds += time.perf_counter() - start
        return found
